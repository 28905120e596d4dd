"""Models of the operators that quantize activations: what the vendor documents, as torch code on host tensors.

Source: torch_npu's API reference (repository Ascend/op-plugin, docs/zh/custom_APIs/torch_npu), its operators' argument handling
(op_plugin/ops/opapi) and their tests (test/test_custom_ops), read 2026; OCP Microscaling Formats 1.0 for the shared exponent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.npu.contract_checks import INT4_PER_WORD, need, need_absent, need_dtype, need_filled, need_shape, pack_words
from bitgrain.kernels.npu.contract_types import FLOAT4
from bitgrain.numerics.block_scales import encode_block_scale, shared_exponent
from bitgrain.numerics.small_floats import E2M1, SMALL_FLOATS, encode

HALF = (torch.float16, torch.bfloat16)
MX_BLOCK = 32
_ELEMENTS = {torch.float8_e4m3fn: "fp8_e4m3fn", torch.float8_e5m2: "fp8_e5m2", FLOAT4: "fp4_e2m1"}


def npu_quantize(tensor: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: torch.dtype, axis: int = 1, div_mode: bool = True) -> Tensor:
    """int8: round(tensor / scales + zero_points), from -128 to 127.

    Args:
        tensor: float16, bfloat16 or float32.
        scales: float32 (bfloat16 too), [1] or one per entry of `axis`.
        zero_points: int32 or int8 of the same shape, ADDED after the division.
        dtype:  torch.qint8; the model has no other.
        div_mode: True; the other mode multiplies by scales of the tensor's own dtype.
    Raises:
        LayoutError: the call breaks the contract.
    """
    name = "npu_quantize"
    need_dtype(tensor, (*HALF, torch.float32), name, "input")
    need(dtype == torch.qint8, name, f"dtype {dtype}", "torch.qint8")
    need(div_mode, name, "div_mode False", "True: float32 scales of a 16-bit input")
    need(-tensor.dim() <= axis < tensor.dim(), name, f"axis {axis}", f"one of {tensor.dim()} dimensions")
    size = tensor.shape[axis]
    need_dtype(scales, (torch.float32, torch.bfloat16), name, "scales")
    need_shape(scales, ((1,), (size,)), name, "scales")
    shape = [1] * tensor.dim()
    shape[axis] = scales.numel()
    moved = tensor.float() / scales.float().view(shape)
    if zero_points is not None:
        need_dtype(zero_points, (torch.int8, torch.int32), name, "zero_points")
        need_shape(zero_points, (tuple(scales.shape),), name, "zero_points")
        moved = moved + zero_points.float().view(shape)
    return torch.round(moved).clamp(-128, 127).to(torch.int8)


def npu_dynamic_quant(
    x: Tensor, *, smooth_scales: Tensor | None = None, group_index: Tensor | None = None, dst_type: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(round(x / scale), scale) per row: scale = max |x| / 127, or / 7 for 4 bits; symmetric.

    A row of zeros has scale 0 and codes 0.

    Args:
        x:        float16 or bfloat16 [..., K].
        dst_type: None or torch.int8: int8 [..., K]; torch.quint4x2: int32 words [..., K / 8].
    Returns:
        codes, and float32 scales [...].
    Raises:
        LayoutError: the call breaks the contract.
    """
    name = "npu_dynamic_quant"
    need_dtype(x, HALF, name, "x")
    need(x.dim() > 1, name, f"{x.dim()} dimensions", "more than one")
    need_filled(name, x=x)
    need_absent(name, smooth_scales=smooth_scales, group_index=group_index)
    need(dst_type in (None, torch.int8, torch.quint4x2), name, f"dst_type {dst_type}", "int8 or quint4x2")
    small = dst_type == torch.quint4x2
    need(not small or x.shape[-1] % INT4_PER_WORD == 0, name, f"last dimension {x.shape[-1]}", f"a multiple of {INT4_PER_WORD}")
    scale = x.float().abs().amax(-1) / (7 if small else 127)
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = torch.round(x.float() / divisor[..., None]).to(torch.int8)
    return (pack_words(codes) if small else codes), scale


def npu_dynamic_mx_quant(
    tensor: Tensor, *, axis: int = -1, round_mode: str = "rint", dst_type: object = FLOAT4, block_size: int = MX_BLOCK, scale_alg: int | None = 0
) -> tuple[Tensor, Tensor]:
    """(codes, scales) of blocks of 32 along K: shared exponent floor(log2(max |x|)) less the element's largest exponent.

    Codes are x / 2^shared rounded to nearest, ties to even, cut at the largest number.

    Args:
        tensor:   float16 or bfloat16 [M, K].
        dst_type: torch.float8_e4m3fn or float8_e5m2; or float4_e2m1fn_x2: uint8 [M, K / 2], the even element in the low nibble.
    Returns:
        codes, and uint8 e8m0 scales [M, ceil(K / 64), 2], in pairs; a missing last one is 0.
    Raises:
        LayoutError: the call breaks the contract.
    """
    name = "npu_dynamic_mx_quant"
    need_dtype(tensor, HALF, name, "input")
    need_filled(name, input=tensor)
    need(tensor.dim() == 2 and axis in (-1, 1), name, f"axis {axis} of {tensor.dim()} dimensions", "the last of two: the model's")
    need(round_mode == "rint" and block_size == MX_BLOCK and scale_alg in (None, 0), name, f"{round_mode}, {block_size}, {scale_alg}", f"rint, {MX_BLOCK} and the OCP rule, 0")
    need(dst_type in _ELEMENTS, name, f"dst_type {dst_type}", "fp8 or packed float4")
    m, k = tensor.shape
    need(dst_type != FLOAT4 or k % 2 == 0, name, f"K = {k}", "an even one for packed float4")
    element = _ELEMENTS[dst_type]
    grouped = torch.nn.functional.pad(tensor.float(), (0, -k % (2 * MX_BLOCK))).view(m, -1, MX_BLOCK)
    shared = shared_exponent(grouped.abs().amax(-1), element, "floor")
    kind = SMALL_FLOATS[element]
    values = (grouped / shared[..., None]).view(m, -1)[:, :k]
    scales = encode_block_scale(shared, "e8m0")
    if k % (2 * MX_BLOCK) and k % (2 * MX_BLOCK) <= MX_BLOCK:
        scales[:, -1] = 0
    if isinstance(dst_type, torch.dtype):
        codes = values.clamp(-kind.max, kind.max).to(dst_type)
    else:
        nibbles = encode(values, E2M1)
        codes = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    return codes, scales.view(m, -1, 2)
