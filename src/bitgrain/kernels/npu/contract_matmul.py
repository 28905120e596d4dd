"""Models of the matrix products for one weight: what the vendor documents, as torch code on host tensors.

Source: torch_npu's API reference (repository Ascend/op-plugin, docs/zh/custom_APIs/torch_npu), its operators' argument handling
(op_plugin/ops/opapi) and their tests (test/test_custom_ops), read 2026.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.npu.contract_checks import (
    INT4_PER_WORD,
    LARGEST_SIDE,
    is_transposed,
    need,
    need_absent,
    need_dtype,
    need_filled,
    need_shape,
    pack_words,
    product,
    unpack_words,
    unpacked_matrix,
)
from bitgrain.kernels.npu.contract_types import FLOAT4, MX_SCALE
from bitgrain.numerics.small_floats import E2M1, decode, decode_e8m0

HALF = (torch.float16, torch.bfloat16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MX_BLOCK = 32
FRACTAL_NZ = 29
# what a product of int8 matrices takes for each type of output, with a scale per token and without: (scale, bias)
_F32, _BF16, _F16, _I32, _I64 = torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64
INT8_TYPES = {
    (torch.int8, False): ((_I64, _F32), (_I32,)),
    (_F16, False): ((_I64, _F32), (_I32,)),
    (_F16, True): ((_F32,), (_I32, _F32)),
    (_BF16, False): ((_F32, _BF16), (_I32, _BF16, _F32)),
    (_BF16, True): ((_F32, _BF16), (_I32, _BF16, _F32)),
    (_I32, False): ((_F32, _BF16), (_I32,)),
}


def npu_quant_matmul(
    x1: Tensor, x2: Tensor, scale: Tensor, *, offset: Tensor | None = None, pertoken_scale: Tensor | None = None, bias: Tensor | None = None,
    output_dtype: torch.dtype | None = None, x1_dtype: object = None, x2_dtype: object = None, pertoken_scale_dtype: object = None,
    scale_dtype: object = None, group_sizes: list[int] | None = None, y_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y [M, N] of integer, or of MX, matrices x1 [M, K] and x2 [K, N].

    int32 bias:  (x1 x2 + bias) * scale * pertoken_scale + offset
    float bias:  x1 x2 * scale * pertoken_scale + bias
    int32 output: x1 x2 + bias, unscaled
    A float32 scale without a scale per token is cut to its 19 upper bits, unless the output is bfloat16 or int32
    (the operator converts it by npu_trans_quant_param first).

    Args:
        x1, x2: int8, x2 contiguous or the transpose of a contiguous matrix; or int32 that hold eight 4-bit integers each, x1
                [M, K / 8]; or fp8, with a scale per token; or fp8 or packed 4-bit floats with scale_dtype e8m0, as _mx_product()
                takes them.
        scale:  [1] or [N].
        pertoken_scale: float32 [M].
        bias:   [N].  The types that go together stand in INT8_TYPES.
    Raises:
        LayoutError: the call breaks the contract.
    """
    name = "npu_quant_matmul"
    need_filled(name, x1=x1, x2=x2, scale=scale)
    need(x1.dim() == 2 and x2.dim() == 2, name, f"{x1.dim()} and {x2.dim()} dimensions", "two matrices: the model has no batches")
    need_absent(name, y_scale=y_scale)
    if scale_dtype is not None:
        need_absent(name, offset=offset)
        return _mx_product(x1, x2, scale, pertoken_scale, bias, output_dtype, (x1_dtype, x2_dtype, scale_dtype, pertoken_scale_dtype), group_sizes)
    need_absent(name, x1_dtype=x1_dtype, x2_dtype=x2_dtype, pertoken_scale_dtype=pertoken_scale_dtype, group_sizes=group_sizes)
    if x1.dtype in FP8:
        return _fp8_product(x1, x2, scale, pertoken_scale, bias, output_dtype, offset)
    need(x1.dtype == x2.dtype and x1.dtype in (torch.int8, _I32), name, f"{x1.dtype} and {x2.dtype}", "int8, or int32 that hold int4, on both sides")
    if x1.dtype == _I32:
        return _int4_product(x1, x2, scale, pertoken_scale, bias, output_dtype, offset)
    need(x2.is_contiguous() or is_transposed(x2), name, "x2 with gaps", "a contiguous matrix, or the transpose of one")
    return _scaled(product(*_sides(x1, x2, name)), scale, offset, pertoken_scale, bias, output_dtype)


def _sides(x1: Tensor, x2: Tensor, name: str) -> tuple[Tensor, Tensor]:
    need(x1.shape[1] == x2.shape[0], name, f"[{x1.shape[0]}, {x1.shape[1]}] by {list(x2.shape)}", "one K")
    need(max(x2.shape) <= LARGEST_SIDE, name, f"x2 {list(x2.shape)}", f"sides of at most {LARGEST_SIDE}")
    return x1, x2


def _scaled(total: Tensor, scale: Tensor, offset: Tensor | None, pertoken: Tensor | None, bias: Tensor | None, output: torch.dtype | None) -> Tensor:
    """The epilogue of int8 products; `total` is float64 [M, N] of whole numbers."""
    name, (m, n), output = "npu_quant_matmul", total.shape, output or torch.int8
    need((output, pertoken is not None) in INT8_TYPES, name, f"output {output}, scale per token: {pertoken is not None}", "a pair of INT8_TYPES")
    scales, biases = INT8_TYPES[output, pertoken is not None]
    need_dtype(scale, scales, name, "scale")
    need_shape(scale, ((1,), (n,)), name, "scale")
    need(offset is None or output == torch.int8, name, "offset", "an offset with int8 outputs only")
    if bias is not None:
        need_dtype(bias, biases, name, "bias")
        need_shape(bias, ((n,),), name, "bias")
    if bias is not None and bias.dtype == _I32:
        total = total + bias.double()
    if output == _I32:
        return total.to(_I32)
    if scale.dtype == _F32 and pertoken is None and output != _BF16:
        scale = npu_trans_quant_param(scale)
    factor = _stored_scale(scale) if scale.dtype == _I64 else scale.float()
    y = total * factor.double()
    if pertoken is not None:
        need_dtype(pertoken, (_F32,), name, "pertoken_scale")
        need_shape(pertoken, ((m,),), name, "pertoken_scale")
        y = y * pertoken.double()[:, None]
    if bias is not None and bias.dtype != _I32:
        y = y + bias.double()
    if output == torch.int8:
        moved = y if offset is None else y + offset.double()
        return torch.round(moved).clamp(-128, 127).to(torch.int8)
    return y.float().to(output)


def _int4_product(
    x1: Tensor, x2: Tensor, scale: Tensor, pertoken: Tensor | None, bias: Tensor | None, output: torch.dtype | None, offset: Tensor | None
) -> Tensor:
    """Both sides 4-bit; the output is eight times as wide as x2 only where x2 is packed along N."""
    name = "npu_quant_matmul"
    need(x1.is_contiguous(), name, "x1 with gaps", "contiguous words [M, K / 8]")
    need(output in (HALF if pertoken is not None else (_F16,)), name, f"output {output} of int4", "float16, or bfloat16 with a scale per token")
    need_absent(name, offset=offset, **({"bias": bias} if pertoken is not None else {}))
    total = product(*_sides(unpack_words(x1), unpacked_matrix(x2, name), name))
    return _scaled(total, scale, None, pertoken, bias, output)


def _fp8_product(
    x1: Tensor, x2: Tensor, scale: Tensor, pertoken: Tensor | None, bias: Tensor | None, output: torch.dtype | None, offset: Tensor | None
) -> Tensor:
    """x1 x2 * scale * pertoken of fp8 matrices; a bias, and a product without scales per token, are not in the model."""
    name = "npu_quant_matmul"
    need_absent(name, bias=bias, offset=offset)
    need(x2.dtype in FP8, name, f"{x1.dtype} and {x2.dtype}", "fp8 on both sides")
    need(output in (*HALF, _F32), name, f"output {output} of fp8", "float16, bfloat16 or float32")
    need_dtype(scale, (_F32,), name, "scale")
    need_shape(scale, ((1,), (x2.shape[1],)), name, "scale")
    need(pertoken is not None, name, "no pertoken_scale", "one of each row")
    assert pertoken is not None
    need_dtype(pertoken, (_F32,), name, "pertoken_scale")
    need_shape(pertoken, ((x1.shape[0],),), name, "pertoken_scale")
    y = product(*_sides(x1.float(), x2.float(), name)) * scale.double() * pertoken.double()[:, None]
    return y.float().to(output)


def _mx_product(
    x1: Tensor, x2: Tensor, scale: Tensor, pertoken: Tensor | None, bias: Tensor | None, output: torch.dtype | None, types: tuple[object, ...], groups: list[int] | None
) -> Tensor:
    """y = sum over blocks j of 2^(a[m, j] - 127) 2^(b[j, n] - 127) dot(x1, x2) + bias.

    Args:
        x1:       fp8 [M, K], or uint8 [M, K / 2] with x1_dtype float4: the even element in the low nibble.
        x2:       the same as [K, N], or the transpose of [N, K / 2].
        scale:    uint8 [ceil(K / 64), N, 2]: scales in pairs, transposed as x2 is.
        pertoken: uint8 [M, ceil(K / 64), 2].
        bias:     float32 [N].
    """
    name, (x1_type, x2_type, scale_type, pertoken_type) = "npu_quant_matmul", types
    need(scale_type == MX_SCALE and pertoken_type == MX_SCALE and pertoken is not None, name, f"scales of {scale_type}, {pertoken_type}", "e8m0 on both sides")
    need(groups in (None, [1, 1, MX_BLOCK]), name, f"group_sizes {groups}", f"[1, 1, {MX_BLOCK}]")
    need(output in (*HALF, _F32), name, f"output {output}", "float16, bfloat16 or float32")
    assert pertoken is not None
    if x1.dtype == torch.uint8:
        need(x1_type == FLOAT4 and x2_type == FLOAT4 and x2.dtype == torch.uint8, name, f"bytes as {x1_type}, {x2_type}", "x1_dtype and x2_dtype float4 on both sides")
        need(x1.is_contiguous() and is_transposed(x2), name, "packed bytes in another order", "x1 [M, K / 2], x2 the transpose of [N, K / 2]")
        values, matrix = _float4(x1), _float4(x2.t()).t()
    else:
        need(x1.dtype in FP8 and x2.dtype in FP8, name, f"{x1.dtype} and {x2.dtype}", "fp8 on both sides")
        need_absent(name, x1_dtype=x1_type, x2_dtype=x2_type)
        values, matrix = x1.float(), x2.float()
    _sides(values, matrix, name)
    (m, k), n = values.shape, matrix.shape[1]
    pairs = -(-k // (2 * MX_BLOCK))
    need_dtype(scale, (torch.uint8,), name, "scale")
    need_shape(scale, ((pairs, n, 2),), name, "scale")
    need_dtype(pertoken, (torch.uint8,), name, "pertoken_scale")
    need_shape(pertoken, ((m, pairs, 2),), name, "pertoken_scale")
    need(1 in scale.shape[:2] or 1 in x2.shape or scale[..., 0].is_contiguous() or is_transposed(x2) == (scale.stride(0) < scale.stride(1)), name, "scale and x2 in different orders", "both transposed, or neither")
    left = values.double() * _columns(pertoken.flatten(1), k)
    right = matrix.double() * _columns(scale.permute(1, 0, 2).flatten(1), k).t()
    y = left @ right
    if bias is not None:
        need_dtype(bias, (_F32,), name, "bias")
        need_shape(bias, ((n,),), name, "bias")
        y = y + bias.double()
    return y.float().to(output)


def _float4(packed: Tensor) -> Tensor:
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return decode(nibbles, E2M1)


def _columns(codes: Tensor, k: int) -> Tensor:
    """float64 [rows, K] of e8m0 codes [rows, blocks]; bytes beyond the last column do not count."""
    return decode_e8m0(codes).double().repeat_interleave(MX_BLOCK, 1)[:, :k]


def npu_trans_quant_param(scale: Tensor, offset: Tensor | None = None, round_mode: int = 0) -> Tensor:
    """int64 of float32 scales: their 19 upper bits in bits 0 to 31, bit 46 set; the 13 lower bits are cut off.

    Raises:
        LayoutError: another type, gaps, or an offset or rounding that the model does not have.
    """
    name = "npu_trans_quant_param"
    need_dtype(scale, (_F32,), name, "scale")
    need(scale.is_contiguous() and scale.numel() > 0 and scale.dim() in (1, 2), name, f"scale {list(scale.shape)}", "a contiguous vector or matrix")
    need_absent(name, offset=offset)
    need(round_mode == 0, name, f"round_mode {round_mode}", "0: the model cuts")
    bits = scale.view(_I32).to(_I64) & 0xFFFFE000
    return bits | (1 << 46)


def _stored_scale(param: Tensor) -> Tensor:
    """float32 of what npu_trans_quant_param() returned."""
    low = param & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(_I32).view(_F32)


def npu_weight_quant_batchmatmul(
    x: Tensor, weight: Tensor, antiquant_scale: Tensor, antiquant_offset: Tensor | None = None, quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None, bias: Tensor | None = None, antiquant_group_size: int = 0, inner_precise: int = 0, weight_dtype: object = None,
) -> Tensor:  # fmt: skip
    """y [M, N] = x ((weight + antiquant_offset) * antiquant_scale) + bias, of x's dtype.  The offset is ADDED.

    The decoded weight is rounded to x's dtype, as the vendor's own tests compute it; sums are wide.

    Args:
        x:      float16 or bfloat16 [M, K].
        weight: int8 [K, N]; or int32 words of eight 4-bit integers, [K, N / 8], or the transpose of [N, K / 8].
        antiquant_scale:  of x's dtype: [1], [1, 1], [N], [1, N], or with a group size [ceil(K / group), N].
        antiquant_offset: as the scale.
        bias:   [N] or [1, N], contiguous; float16 for float16 x, float32 for bfloat16 x.
        antiquant_group_size: rows of the weight per scale: a multiple of 32 from 32 to K - 1; 0: no groups.
    Raises:
        LayoutError: the call breaks the contract.
    """
    name = "npu_weight_quant_batchmatmul"
    need_filled(name, x=x, weight=weight, antiquant_scale=antiquant_scale)
    need_absent(name, quant_scale=quant_scale, quant_offset=quant_offset, weight_dtype=weight_dtype)
    need(x.dim() == 2 and weight.dim() == 2, name, f"{x.dim()} and {weight.dim()} dimensions", "two matrices")
    need_dtype(x, HALF, name, "x")
    need_dtype(weight, (torch.int8, _I32), name, "weight")
    matrix = unpacked_matrix(weight, name) if weight.dtype == _I32 else weight
    _sides(x, matrix, name)
    k, n = matrix.shape
    rows = -(-k // antiquant_group_size) if antiquant_group_size else 1
    if antiquant_group_size:
        fits = antiquant_group_size % 32 == 0 and 32 <= antiquant_group_size < k
        need(fits, name, f"groups of {antiquant_group_size} for K = {k}", "a multiple of 32 from 32 to K - 1")
        need_shape(antiquant_scale, ((rows, n),), name, "antiquant_scale")
    else:
        need_shape(antiquant_scale, ((1,), (1, 1), (n,), (1, n)), name, "antiquant_scale")
    need(inner_precise == 0, name, f"inner_precise {inner_precise}", "0: the precise mode")
    decoded = antiquant(matrix, x.dtype, antiquant_scale, antiquant_offset, antiquant_group_size, name)
    y = product(x, decoded)
    if bias is not None:
        check_bias(bias, x.dtype, ((n,), (1, n)), name)
        y = y + bias.double()
    return y.float().to(x.dtype)


def antiquant(matrix: Tensor, dtype: torch.dtype, scale: Tensor, offset: Tensor | None, group: int, name: str) -> Tensor:
    """(matrix + offset) * scale [K, N], rounded to `dtype`; scale and offset [rows, N] or shorter, of `dtype`."""
    need_dtype(scale, (dtype,), name, "antiquant_scale")
    spread = scale.repeat_interleave(group, 0)[: matrix.shape[0]] if group else scale
    values = matrix.float()
    if offset is not None:
        need_dtype(offset, (dtype,), name, "antiquant_offset")
        need_shape(offset, (tuple(scale.shape),), name, "antiquant_offset")
        values = values + (offset.repeat_interleave(group, 0)[: matrix.shape[0]] if group else offset).float()
    return (values * spread.float()).to(dtype)


def check_bias(bias: Tensor, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...], name: str) -> None:
    """Biases of products with 16-bit inputs: a bfloat16 one is refused."""
    need_dtype(bias, (_F16 if dtype == _F16 else _F32,), name, "bias")
    need_shape(bias, shapes, name, "bias")
    need(bias.is_contiguous(), name, "bias with gaps", "a contiguous one")


def npu_convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    """int32 [..., n / 8] of int32 [..., n] with values from -8 to 7; the first of eight in the lowest nibble.

    Raises:
        LayoutError: another type or range, gaps, or a last dimension that is no multiple of 8.
    """
    name = "npu_convert_weight_to_int4pack"
    need_filled(name, weight=weight)
    need_dtype(weight, (_I32,), name, "weight")
    need(weight.dim() in (2, 3) and weight.is_contiguous(), name, f"weight {list(weight.shape)}", "two or three dimensions without gaps")
    need(weight.shape[-1] % INT4_PER_WORD == 0, name, f"last dimension {weight.shape[-1]}", f"a multiple of {INT4_PER_WORD}")
    need(bool((weight >= -8).all() & (weight <= 7).all()), name, "values beyond 4 bits", "values from -8 to 7")
    return pack_words(weight)


def npu_format_cast(tensor: Tensor, acl_format: int, customize_dtype: object = None) -> Tensor:
    """The same values in another layout, which the host does not have: the tensor itself.

    FRACTAL_NZ tiles are 16 by 32 bytes; the model takes whole tiles only (the device fills the rest, at a cost of memory).

    Raises:
        LayoutError: another format, float32, gaps, or sides that are not whole tiles.
    """
    name = "npu_format_cast"
    need(acl_format == FRACTAL_NZ, name, f"format {acl_format}", f"{FRACTAL_NZ}, FRACTAL_NZ")
    need_absent(name, customize_dtype=customize_dtype)
    need_dtype(tensor, (torch.int8, *HALF), name, "tensor")
    need(tensor.dim() in (2, 3) and tensor.is_contiguous(), name, f"tensor {list(tensor.shape)}", "two or three dimensions without gaps")
    columns = 32 // tensor.element_size()
    need(tensor.shape[-2] % 16 == 0 and tensor.shape[-1] % columns == 0, name, f"tensor {list(tensor.shape)}", f"multiples of 16 and {columns}")
    return tensor
