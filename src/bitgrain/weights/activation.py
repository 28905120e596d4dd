"""How a module's input is quantized before the product, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitgrain.numerics.block_scales import decode_block_scale, encode_block_scale, largest_scale, shared_exponent
from bitgrain.numerics.small_floats import SMALL_FLOATS, round_to

# What a block scale that rounds to zero becomes: compressed-tensors' smallest E4M3 scale.
_SMALLEST_BLOCK_SCALE = 0.125


@dataclass(frozen=True, slots=True)
class ActivationSpec:
    """Input quantization of one module; hashable, compared by value.

    quantize:   dynamic symmetric int: s = amax / top, code = round(clamp(x / s, -2**(b-1), 2**(b-1) - 1))
                dynamic asymmetric int: s = (max - min) / (2**bits - 1), z = round(clamp(-2**(b-1) - min / s)),
                code = round(clamp(x / s + z)); min and max always include 0
                dynamic float: s = amax / max of the type, code = x / s rounded to the type
                block scales: s is rounded to `scale_type`, for "e8m0" by `exponent_rule` (see numerics.block_scales);
                with a second scale t: s = t * rounded(amax / (max of the type * t)), for "e8m0" t * power(amax / t)
                a block scale that rounds to zero becomes 2^-3 (below a second scale), so that its elements round to zero
                static: the same with the stored scale and zero point
    Source: compressed-tensors 0.17 quantization/utils and lifecycle/forward (formulas); formats specification, section 4.

    Args:
        element:     "none", "int8", "int4", or a small float such as "fp8_e4m3fn".
        granularity: "tensor", "token" (a row of K) or "group" (`group_size` columns of a token).
        symmetric:   False: with a zero point.
        dynamic:     computed from each input; False: `scale` and `zero` come from the checkpoint.
        scale_type:  "float", or the one-byte type of block scales: "e8m0", "e4m3", "e5m3".
        exponent_rule: "e8m0": how the power of two is chosen, one of numerics.block_scales.EXPONENT_RULES.
        second_scale: "none"; "static": `second` comes from the checkpoint; "dynamic": amax of the whole input / (largest
                     scale of the type * max of the element); "group", for "e8m0": amax of each `second_group` columns of a
                     token / max of the element.
        second_divides: static: `second` is a divisor d, s = rounded(amax / max of the type * d) / d.
        top:         dynamic symmetric int: the code that amax stands for; None is (2**bits - 1) / 2, so that -2**(b-1) is reached.
        clipped:     dynamic: the range is multiplied by `clip`, which comes from the checkpoint; for groups it is the whole
                     token's range, to which x is cut before the groups are looked at.
        outlier_threshold: dynamic: columns where any |x| reaches it stay as they are; the values that reach it do not count in the
                     range, the others of their columns do.
        upper_bound: dynamic float: amax is cut at this value (None: not).
        lower_bound: dynamic float: amax is at least this value (None: not).
        lowest_scale: block scales other than e8m0: the rounded scale, below a second one, is at least this value.
        scale:       static: the multiplier; None until the checkpoint has been read.
        zero:        static: the zero point, in the signed domain.
        second, clip: None until the checkpoint has been read.
        reciprocal:  int: codes are clamp(round(x * (1 / s)) + z): an amax that falls between two codes may go the other way.
        output:      static: the scale with which the product, bias included, is quantized to the same element; None: it is not.
    """

    element: str = "none"
    granularity: str = "tensor"
    group_size: int = 0
    symmetric: bool = True
    dynamic: bool = True
    scale_type: str = "float"
    scale: float | None = None
    zero: int = 0
    upper_bound: float | None = None
    exponent_rule: str = "ceil"
    second_scale: str = "none"
    second: float | None = None
    second_divides: bool = False
    top: float | None = None
    clipped: bool = False
    clip: float | None = None
    outlier_threshold: float | None = None
    second_group: int = 0
    lower_bound: float | None = None
    lowest_scale: float = 0.0
    reciprocal: bool = False
    output: float | None = None

    @property
    def is_none(self) -> bool:
        return self.element == "none"

    @property
    def bits(self) -> int:
        if self.is_none:
            return 16
        return SMALL_FLOATS[self.element].bits if self.element in SMALL_FLOATS else int(self.element.removeprefix("int"))

    @property
    def is_integer(self) -> bool:
        return self.element.startswith("int")

    @property
    def has_stored_values(self) -> bool:
        """Some number comes from the checkpoint, so that two modules may differ in it."""
        return not self.is_none and (not self.dynamic or self.second_scale == "static" or self.clipped)

    @property
    def is_plain(self) -> bool:
        """x is about (codes - zero) * scale with one scale per row or tensor: what quantize() returns says it all."""
        return self.granularity != "group" and self.outlier_threshold is None

    def without_values(self) -> ActivationSpec:
        """The same specification without stored numbers: what a kernel is chosen by."""
        return replace(self, scale=None, zero=0, second=None, clip=None, output=None)

    def describe(self) -> str:
        """Short text such as "int8 token dynamic"."""
        if self.is_none:
            return "16-bit"
        parts = [self.element, f"g{self.group_size}" if self.granularity == "group" else self.granularity]
        parts.append("dynamic" if self.dynamic else "static")
        if not self.symmetric:
            parts.append("asym")
        if self.scale_type != "float":
            wide = f"g{self.second_group} float" if self.second_scale == "group" else f"{self.second_scale} tensor"
            parts.append(self.scale_type if self.second_scale == "none" else f"{self.scale_type} x {wide}")
        if self.outlier_threshold is not None:
            parts.append(f"outliers above {self.outlier_threshold:g} kept")
        return " ".join(parts)

    def of_output(self) -> ActivationSpec:
        """How the product is quantized; NO_ACTIVATION if it is not."""
        return NO_ACTIVATION if self.output is None else replace(self, scale=self.output, zero=0, output=None)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize x.

        Args:
            x: floating point [M, K].
        Returns:
            (codes, scale, zero): codes int8 [M, K] for integers, float32 [M, K] on the type's grid for floats;
            scale and zero float32, [1, 1], [M, 1] or [M, G]; x is about (codes - zero) * scale, outlier columns apart.
        """
        if x.shape[0] == 0:
            # no rows have no range: they are quantized as a row of zeros, and left out
            codes, scale, zero = self.quantize(x.new_zeros(1, x.shape[1]))
            whole = self.granularity == "tensor" or not self.dynamic
            return codes[:0], scale if whole else scale[:0], zero if whole else zero[:0]
        values = x.float()
        ranged = values
        if self.outlier_threshold is not None:
            ranged = values.masked_fill(values.abs() >= self.outlier_threshold, 0.0)
            values = ranged.masked_fill(self._outliers(values), 0.0)
        grouped = self._grouped(values)
        scale, zero = self._parameters(grouped if ranged is values else self._grouped(ranged))
        if self.is_integer:
            low, high = -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
            moved = torch.round(grouped * scale.reciprocal()) + zero if self.reciprocal else grouped / scale + zero
            codes = torch.round(torch.clamp(moved, low, high)).to(torch.int8)
        else:
            kind = SMALL_FLOATS[self.element]
            limited = torch.clamp(grouped / scale, -kind.max, kind.max)
            codes = limited.to(kind.storage).float() if kind.storage is not None else round_to(limited, kind)
        rows = x.shape[0]
        codes = codes.reshape(rows, -1)[:, : x.shape[1]].contiguous()
        if self.granularity == "group":
            return codes, scale.view(rows, -1), zero.view(rows, -1)
        return codes, scale.view(-1, 1), zero.view(-1, 1)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """float32 [M, K]: x after quantization and back; x itself (as float32) when there is none."""
        if self.is_none or x.shape[0] == 0:
            return x.float()
        codes, scale, zero = self.quantize(x)
        values = codes.float()
        if self.granularity == "group":
            scale = torch.repeat_interleave(scale, self.group_size, dim=1)[:, : x.shape[1]]
            zero = torch.repeat_interleave(zero, self.group_size, dim=1)[:, : x.shape[1]] if zero.numel() > 1 else zero
        result = (values - zero) * scale
        if self.outlier_threshold is not None:
            result = torch.where(self._outliers(x), x.float(), result)
        return result

    def _outliers(self, x: Tensor) -> Tensor:
        """bool [1, K]: columns with an entry at or beyond the threshold."""
        assert self.outlier_threshold is not None
        return (x.float().abs() >= self.outlier_threshold).any(0, keepdim=True)

    def _grouped(self, values: Tensor) -> Tensor:
        if self.granularity != "group":
            return values
        if self.clipped:
            assert self.clip is not None, "a clipping ratio was not loaded"
            low, high = values.amin(-1, keepdim=True).clamp(max=0.0), values.amax(-1, keepdim=True).clamp(min=0.0)
            values = torch.clamp(values, low * self.clip, high * self.clip)
        short = -values.shape[1] % self.group_size
        padded = torch.nn.functional.pad(values, (0, short)) if short else values
        return padded.view(values.shape[0], -1, self.group_size)

    def _parameters(self, grouped: Tensor) -> tuple[Tensor, Tensor]:
        if not self.dynamic:
            # values may be missing only while planning, never while running
            assert self.scale is not None, "a static activation scale was not loaded"
            # filled on the device: a copy from the host would wait for it at every call
            return torch.full((1, 1), self.scale, device=grouped.device), torch.full((1, 1), float(self.zero), device=grouped.device)
        low, high = self._range(grouped)
        tiny = torch.finfo(torch.float32).eps
        if not self.symmetric:
            scale = (high - low) / ((1 << self.bits) - 1)
            scale = torch.where(scale == 0, torch.full_like(scale, tiny), scale)
            bottom = -(1 << (self.bits - 1))
            return scale, torch.round(torch.clamp(bottom - low / scale, bottom, -bottom - 1))
        peak = torch.maximum(-low, high)
        if self.upper_bound is not None:
            peak = torch.clamp(peak, max=self.upper_bound)
        if self.lower_bound is not None:
            peak = torch.clamp(peak, min=self.lower_bound)
        if self.scale_type == "e8m0":
            second = self._group_scale(peak) if self.second_scale == "group" else torch.ones((), device=peak.device)
            scale = shared_exponent(peak / second, self.element, self.exponent_rule) * second
        else:
            scale = self._rounded_scale(peak / self.top_code)
            scale = torch.where(scale == 0, torch.full_like(scale, tiny), scale)
        return scale, torch.zeros_like(scale)

    def _range(self, grouped: Tensor) -> tuple[Tensor, Tensor]:
        """(smallest, largest) of each row, group or the whole tensor, 0 included; [1, 1] for the whole."""
        whole = self.granularity == "tensor"
        low = torch.clamp(grouped.amin().reshape(1, 1) if whole else grouped.amin(-1, keepdim=True), max=0.0)
        high = torch.clamp(grouped.amax().reshape(1, 1) if whole else grouped.amax(-1, keepdim=True), min=0.0)
        if self.clipped and self.granularity != "group":
            assert self.clip is not None, "a clipping ratio was not loaded"
            low, high = low * self.clip, high * self.clip
        return low, high

    def _group_scale(self, peak: Tensor) -> Tensor:
        """The second scale of each block: amax of the `second_group` columns that it lies in / max of the type; [M, G, 1]."""
        rows, blocks, per = peak.shape[0], peak.shape[1], self.second_group // self.group_size
        padded = torch.nn.functional.pad(peak.reshape(rows, blocks), (0, -blocks % per)).view(rows, -1, per)
        second = padded.amax(-1) / self.top_code
        second = torch.where(second == 0, torch.ones_like(second), second)
        return torch.repeat_interleave(second, per, dim=1)[:, :blocks].unsqueeze(-1)

    @property
    def top_code(self) -> float:
        """The code that the largest magnitude stands for."""
        if self.top is not None:
            return self.top
        return ((1 << self.bits) - 1) / 2 if self.is_integer else SMALL_FLOATS[self.element].max

    def _rounded_scale(self, scale: Tensor) -> Tensor:
        """`scale` as the type of block scales holds it, below the second scale."""
        if self.scale_type == "float":
            return scale
        second = self._second(scale)
        below = (scale * second if self.second_divides else scale / second).clamp(min=self.lowest_scale)
        rounded = decode_block_scale(encode_block_scale(below, self.scale_type), self.scale_type)
        rounded = torch.where(rounded == 0, torch.full_like(rounded, _SMALLEST_BLOCK_SCALE), rounded)
        return rounded / second if self.second_divides else rounded * second

    def _second(self, scale: Tensor) -> Tensor:
        """The second scale, float32 without dimensions; 1 if there is none."""
        if self.second_scale == "static":
            assert self.second is not None, "a second activation scale was not loaded"
            return torch.full((), self.second, dtype=torch.float32, device=scale.device)
        if self.second_scale == "dynamic":
            return (scale.amax() / largest_scale(self.scale_type)).clamp(min=torch.finfo(torch.float32).tiny)
        return torch.ones((), device=scale.device)


NO_ACTIVATION = ActivationSpec()
