"""Linear modules of small floats in blocks: MX formats and NVFP4, with activations of any kind."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import Any

import torch
from torch import Tensor

from bitgrain.errors import BadValueError
from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.kernels.triton import activation_quantization
from bitgrain.kernels.triton.availability import TritonKernel, missing
from bitgrain.kernels.triton.block_float_launch import Launch, run, run_scaled
from bitgrain.numerics.block_scales import decode_block_scale
from bitgrain.numerics.small_floats import SMALL_FLOATS, decode
from bitgrain.platforms.probe import target
from bitgrain.weights import ActivationSpec, BlockFloatWeight, Weight, WeightSpec

# Rows of the weight that are looked at together while it is prepared.
ROW_BLOCK = 4096
# Elements and scales that instructions for scaled blocks take, by the type of the scales: (elements, columns of a block).
SCALED = {"e8m0": (("fp4_e2m1", "fp8_e4m3fn", "fp8_e5m2"), 32), "e4m3": (("fp4_e2m1",), 16)}
# Types of x for which those instructions run: their sums hold fewer digits than a float32 result is to have.
NARROW = ("bfloat16", "float16")
# Exponent up to which shifted values go: their sums stay finite in float32.
LARGEST_SHIFTED = 100
SIGNIFICANT_BITS = {"fp4_e0m3": 3, "int8": 7}  # others: one more than the mantissa's


class TritonBlockFloat(TritonKernel):
    """y = x W^T with W decoded in registers: exact of 16-bit and 32-bit x.

    Quantized activations meet the codes of the weight in instructions for scaled blocks where the device has them and takes their types;
    elsewhere in wider floats.
    """

    name = "triton.block_float"

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        if problem.activation.is_none:
            return Fidelity.EXACT
        return Fidelity.NATIVE if problem.dtype in NARROW and self._scaled(problem.weight, problem.activation) else Fidelity.EMULATED

    def refusal(self, problem: LinearProblem) -> Refusal | None:
        if problem.weight.kind != "block_float":
            return Refusal(f"takes small floats in blocks, not {problem.weight.kind} weights")
        why = missing(self.platform)
        return Refusal(why) if why else None

    def _scaled(self, weight: WeightSpec, activation: ActivationSpec) -> bool:
        """Whether the device multiplies the codes of both sides itself."""
        return "scaled_dot" in target(self.platform).features and multiplies_blocks(weight, activation)

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, BlockFloatWeight)  # refusal() asked for the kind
        _refuse_nan(weight)
        low, high = planes(weight)
        scale = _without_zero_blocks(weight)
        tensors = {"low": low, "scale": scale}
        if high is not None:
            tensors["high"] = high
        if weight.second is not None:
            tensors["second"] = weight.second.contiguous()
        meta = {
            "element": weight.element, "block": weight.block, "scale_type": weight.scale_type, "second_group": weight.second_group,
            "scaled": self._scaled(weight.spec, activation.without_values()), "range": _exponents(weight.element, scale, weight.scale_type),
        }  # fmt: skip
        return Prepared(weight.shape, tensors, activation, meta)

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, prepared.shape[0])
        platform = target(self.platform)
        if prepared.meta["scaled"] and str(x.dtype).removeprefix("torch.") in NARROW:
            return run_scaled(x, prepared, bias, Launch(x.shape[0], *prepared.shape, platform.cores, scaled=True))
        values, scale = quantized(prepared.activation, x)
        wide = values.dtype == torch.bfloat16 and "bf16" not in platform.features
        how = multiplication(prepared, values.dtype, scale)
        launch = Launch(x.shape[0], *prepared.shape, platform.cores, wide=wide or how.mode == 2 or values.dtype == torch.float32)
        return run(values, scale, prepared, bias, x.dtype, how, launch, wide)


def multiplies_blocks(weight: WeightSpec, activation: ActivationSpec) -> bool:
    """Whether instructions for scaled blocks take both types: blocks on both sides, or floats with a scale per row beside e8m0 blocks."""
    elements, block = SCALED.get(weight.scale_dtype, ((), 0))
    if weight.element not in elements or weight.group_size != block or weight.second_scale == "group" or not activation_quantization.covered(activation):
        return False
    if activation.granularity != "group":
        floats = activation.element in ("fp8_e4m3fn", "fp8_e5m2") and activation.outlier_threshold is None
        return floats and weight.scale_dtype == "e8m0"
    same = activation.scale_type == weight.scale_dtype and activation.group_size == block
    return same and activation.element in elements and activation.second_scale != "group"


def quantized(activation: ActivationSpec, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(values, scale) with x about values * scale.

    Returns:
        values [M, K] of x's dtype, or float32 where one scale per row or group does not say it all; scale float32 [M or 1, groups] or None.
    """
    if activation.is_none:
        return x.contiguous(), None
    apart = activation.granularity == "group" and activation.group_size % 4 != 0  # groups that begin inside of a byte of codes
    if apart or not activation.symmetric or activation.outlier_threshold is not None or activation.zero:
        return activation_quantization.fake_quantize(activation, x), None
    values, scale, _ = activation_quantization.quantize(activation, x, x.dtype)
    return (values.to(x.dtype) if activation.is_integer else values), scale


@dataclass(frozen=True, slots=True)
class Multiplication:
    """How scales take part in a product; see block_float_gemm.

    Args:
        mode:  0: folded into decoded values, 1: after each piece, 2: in float32.
        piece: columns that are multiplied by scales at once; 0: all.
        shift: exponent that folded e8m0 scales are reduced by.
    """

    mode: int
    piece: int
    shift: int


def multiplication(prepared: Prepared, dtype: torch.dtype, x_scale: Tensor | None) -> Multiplication:
    """The fastest exact way: decoded values with their scales where x's type holds them, else sums of pieces, else float32 values."""
    meta = prepared.meta
    second = prepared.tensors.get("second")
    seconds = meta["second_group"] if second is not None and second.shape[1] > 1 else 0
    group = prepared.activation.group_size if x_scale is not None and x_scale.shape[1] > 1 else 0
    sizes = [size for size in (seconds, group) if size]
    shift = _fold(meta, dtype) if not group else None
    if shift is not None and (not seconds or seconds % 4 == 0):
        return Multiplication(0, seconds, shift)
    sizes.append(meta["block"])
    piece = min(sizes)
    if piece % 4 == 0 and all(size % piece == 0 for size in sizes):
        return Multiplication(1, piece, 0)
    return Multiplication(2, group, 0)


def _fold(meta: dict[str, Any], dtype: torch.dtype) -> int | None:
    """The shift with which every decoded value times its scale is a normal number of `dtype`; None where they are not exact."""
    bits, low, high = meta["range"]
    info = torch.finfo(dtype)
    if bits > {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}[dtype]:
        return None
    lowest, highest = round(log2(info.tiny)), int(log2(info.max))
    if low >= lowest and high <= highest:
        return 0
    shift = round((low + high) / 2)  # the middle of the range becomes one
    fits = low - shift >= lowest and high - shift <= min(highest, LARGEST_SHIFTED)
    return shift if meta["scale_type"] == "e8m0" and fits else None


def planes(weight: BlockFloatWeight) -> tuple[Tensor, Tensor | None]:
    """(codes of 4 or 8 bits, or the lower four of 6, as [N, bytes] uint8; the upper two of 6, four in a byte, [N, bytes], or None)."""
    if weight.bits != 6:
        return weight.packed.contiguous(), None
    lower, upper = [], []
    for start in range(0, weight.shape[0], ROW_BLOCK):
        codes = weight.rows(start, min(weight.shape[0], start + ROW_BLOCK)).codes()
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4))
        pairs, fours = (codes & 15).view(len(codes), -1, 2), (codes >> 4).view(len(codes), -1, 4)
        lower.append(pairs[..., 0] | pairs[..., 1] << 4)
        upper.append(fours[..., 0] | fours[..., 1] << 2 | fours[..., 2] << 4 | fours[..., 3] << 6)
    return torch.cat(lower), torch.cat(upper)


def _without_zero_blocks(weight: BlockFloatWeight) -> Tensor:
    """The scales; of e8m0, those of blocks of zeros, which mean nothing, become the largest one, so that they do not widen the range."""
    if weight.scale_type != "e8m0":
        return weight.scale.contiguous()
    blank = []
    for start in range(0, weight.shape[0], ROW_BLOCK):
        codes = weight.rows(start, min(weight.shape[0], start + ROW_BLOCK)).codes()
        present = codes != 0 if weight.element == "int8" else (codes & ((1 << (weight.bits - 1)) - 1)) != 0
        present = torch.nn.functional.pad(present, (0, -codes.shape[1] % weight.block))
        blank.append(~present.view(len(codes), -1, weight.block).any(-1))
    empty = torch.cat(blank)
    return torch.where(empty, weight.scale.masked_fill(empty, 0).amax(), weight.scale)


def _exponents(element: str, scale: Tensor, scale_type: str) -> tuple[int, int, int]:
    """(significant bits of a decoded value times its scale, exponents that all such values but zero lie between)."""
    kind = SMALL_FLOATS.get(element)
    bits = SIGNIFICANT_BITS.get(element) or (kind.mantissa_bits + 1 if kind else 8)
    step = -6 if kind is None else 1 - kind.bias - kind.mantissa_bits
    top = 2 if kind is None else int(log2(kind.max)) + 1
    if scale_type == "e8m0":
        low, high = (int(end) - 127 for end in torch.aminmax(scale))
        return bits, step + low, top + high
    values = decode_block_scale(scale, scale_type).abs()
    positive = values[values > 0]
    if not positive.numel():
        return bits + 4, step, top
    return bits + 4, step + int(log2(float(positive.min())) // 1), top + int(log2(float(positive.max())) // 1) + 1


def _refuse_nan(weight: BlockFloatWeight) -> None:
    """Raise BadValueError for codes that are no numbers."""
    kind = SMALL_FLOATS.get(weight.element)
    if kind is None or not kind.has_nan:
        return
    table = ~torch.isfinite(decode(torch.arange(256, dtype=torch.uint8), kind)).to(weight.packed.device)
    bad = sum(int(table[part.long()].sum()) for part in weight.packed.split(ROW_BLOCK))
    if bad:
        raise BadValueError("weight", f"{bad} NaN or infinite codes", "finite values", "the file is damaged; fetch or write it again")
