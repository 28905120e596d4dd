"""Floating-point types of 4 to 8 bits: decoding tables, and encoding with correct rounding.

    value = (-1)^sign * 2^(e - bias) * (1 + m / 2^M)   for e > 0, else (-1)^sign * 2^(1 - bias) * m / 2^M

Encoding rounds to nearest, ties to even, and saturates at the largest finite value.  NaN stays NaN where the type has
one and is refused where it has none; infinity stays infinite only where the type has it and `saturate` is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bitgrain.errors import BadValueError


@dataclass(frozen=True, slots=True)
class SmallFloat:
    """One floating-point type.

    Args:
        specials: what the all-ones exponent and the odd codes mean: "none" (all codes are numbers), "fn" (only the
                  all-ones code is NaN), "fnuz" (only negative zero's code is NaN) or "ieee" (infinities and NaNs).
        storage:  the torch dtype that holds it one per byte, if torch has one.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: str
    storage: torch.dtype | None = None

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def max(self) -> float:
        """Largest finite value."""
        table = decode_table(self)
        return float(table[torch.isfinite(table)].max())

    @property
    def has_nan(self) -> bool:
        return self.specials != "none"


E0M3 = SmallFloat("fp4_e0m3", 0, 3, 0, "none")  # a sign and quarters up to 1.75: MXINT4
E2M1 = SmallFloat("fp4_e2m1", 2, 1, 1, "none")
E2M3 = SmallFloat("fp6_e2m3", 2, 3, 1, "none")
E3M2 = SmallFloat("fp6_e3m2", 3, 2, 3, "none")
E4M3FN = SmallFloat("fp8_e4m3fn", 4, 3, 7, "fn", torch.float8_e4m3fn)
E4M3FNUZ = SmallFloat("fp8_e4m3fnuz", 4, 3, 8, "fnuz", torch.float8_e4m3fnuz)
E5M2 = SmallFloat("fp8_e5m2", 5, 2, 15, "ieee", torch.float8_e5m2)

SMALL_FLOATS = {f.name: f for f in (E0M3, E2M1, E2M3, E3M2, E4M3FN, E4M3FNUZ, E5M2)}


@cache
def decode_table(kind: SmallFloat) -> Tensor:
    """float32 [2**bits]: the value of every code; do not write to it."""
    code = torch.arange(1 << kind.bits)
    mantissa_size = 1 << kind.mantissa_bits
    mantissa = (code % mantissa_size).double() / mantissa_size
    exponent = (code // mantissa_size) % (1 << kind.exponent_bits)
    sign = 1.0 - 2.0 * (code >> (kind.bits - 1)).double()
    normal = (1.0 + mantissa) * torch.exp2((exponent - kind.bias).double())
    subnormal = mantissa * 2.0 ** (1 - kind.bias)
    value = sign * torch.where(exponent > 0, normal, subnormal)
    magnitude = code % (1 << (kind.bits - 1))
    if kind.specials == "fn":
        value[magnitude == (1 << (kind.bits - 1)) - 1] = float("nan")
    elif kind.specials == "fnuz":
        value[1 << (kind.bits - 1)] = float("nan")
    elif kind.specials == "ieee":
        top = exponent == (1 << kind.exponent_bits) - 1
        value[top] = float("nan")
        infinite = top & (mantissa == 0)
        value[infinite] = sign[infinite] * float("inf")
    return value.float()


def decode(codes: Tensor, kind: SmallFloat) -> Tensor:
    """float32 values of uint8 codes, same shape."""
    return decode_table(kind).to(codes.device)[codes.long()]


@cache
def _rounding(kind: SmallFloat) -> tuple[Tensor, Tensor]:
    """(magnitudes in rising order, the smallest float32 that rounds to each but the first); do not write to them."""
    positive = decode_table(kind)[: 1 << (kind.bits - 1)]
    magnitudes = positive[torch.isfinite(positive)].contiguous()
    middle = (magnitudes[1:] + magnitudes[:-1]) / 2
    # a tie goes to the even code: up from an odd one, and only what is above the middle goes up from an even one
    above = torch.nextafter(middle, torch.full_like(middle, float("inf")))
    odd = torch.arange(len(middle)) % 2 == 1
    return magnitudes, torch.where(odd, middle, above)


def _magnitude_codes(values: Tensor, kind: SmallFloat) -> Tensor:
    """int32 codes of |values|, rounded to nearest even and saturated; that of NaN means nothing."""
    return torch.bucketize(values.float().abs(), _rounding(kind)[1].to(values.device), out_int32=True, right=True)


def round_to(values: Tensor, kind: SmallFloat) -> Tensor:
    """float32 values rounded to the nearest representable one (ties to even), saturated; NaN stays NaN."""
    values = values.float()
    rounded = _rounding(kind)[0].to(values.device)[_magnitude_codes(values, kind)]
    return torch.copysign(torch.where(torch.isnan(values), values, rounded), values)


def encode(values: Tensor, kind: SmallFloat, saturate: bool = True) -> Tensor:
    """uint8 codes of float values, rounded to nearest even.

    Raises:
        BadValueError: a NaN, and the type has none.
    """
    values = values.float()
    nan = torch.isnan(values)
    if bool(nan.any()) and not kind.has_nan:
        raise BadValueError(f"encoding to {kind.name}", f"{int(nan.sum())} NaN values", "finite values", "the type has no NaN; clean the input")
    half = 1 << (kind.bits - 1)
    codes = _magnitude_codes(values, kind)
    if kind.specials == "ieee" and not saturate:
        infinity = int((decode_table(kind)[:half] == float("inf")).nonzero()[0])
        codes = codes.masked_fill_(torch.isinf(values), infinity)
    negative = torch.signbit(values)
    if kind.specials == "fnuz":
        negative &= codes > 0
    codes += negative.int() * half
    if kind.has_nan:
        codes = codes.masked_fill_(nan, half if kind.specials == "fnuz" else half - 1)
    return codes.to(torch.uint8)


def decode_e8m0(codes: Tensor) -> Tensor:
    """float32 2^(code - 127) of uint8 codes; 255 is NaN.  Code 0 is 2^-127, a float32 subnormal, and exact."""
    value = torch.exp2(codes.double() - 127.0).float()
    return value.masked_fill_(codes == 255, float("nan"))
