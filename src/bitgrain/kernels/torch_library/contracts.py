"""Models of what torch's operators take and compute on a GPU, for host tensors: what they refuse there is refused here.

Where torch has the operator for the host with the same meaning, the model checks what the GPU asks for and calls it.
Source: pytorch, aten/src/ATen/native/cuda/ScaledBlas.cpp (0174dfa), Blas.cpp, int4mm.cu, int8mm.cu (stored versions of 2025 and 2026).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.numerics.bitpack import unpack_dense
from bitgrain.numerics.small_floats import SMALL_FLOATS, decode

# _int_mm takes more rows than this
INT_ROWS = 16
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
# The unit in which the scales of blocks are laid out: rows and blocks of a tile.
TILE_ROWS, TILE_BLOCKS = 128, 4


def need(met: bool, what: str) -> None:
    """Raise RuntimeError, as the operator does, unless a requirement is met."""
    if not met:
        raise RuntimeError(f"contract: {what}")


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """int32 [M, N] of int8 [M, K] and [K, N]: the exact product."""
    need(a.dtype is torch.int8 and b.dtype is torch.int8, "int8 inputs")
    need(a.shape[0] > INT_ROWS, f"more than {INT_ROWS} rows, got {a.shape[0]}")
    need(a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0, f"K and N that are multiples of 8, got {a.shape[1]} and {b.shape[1]}")
    product: Tensor = torch.ops.aten._int_mm(a, b)
    return product


def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None, use_fast_accum: bool = False) -> Tensor:
    """[M, N] of `out_dtype`: a [M, K] times b [K, N] column-major, scaled, plus bias.

    Scales of 8-bit floats: float32 of one element each; or [M, 1] and [1, N] (one per row).  Of blocks: e8m0 for blocks of 32 8-bit
    floats, e4m3 for blocks of 16 4-bit ones, in the order of block_scale_order.
    """
    need(a.dim() == 2 and b.dim() == 2 and a.shape[1] == b.shape[0], "[M, K] and [K, N]")
    need(a.stride(1) == 1 and b.stride(0) == 1, "a row-major and b column-major")
    need(a.shape[1] % 16 == 0 and b.shape[1] % 16 == 0, f"stored K and N that are multiples of 16, got {a.shape[1]} and {b.shape[1]}")
    need(not use_fast_accum, "full accumulation, which bitgrain always asks for")
    dtype = out_dtype or a.dtype
    if bias is not None:
        need(dtype is not torch.float32, "no bias with a float32 output")
        need(bias.dtype is dtype and bias.numel() == b.shape[1], f"a bias [N] of {dtype}")
    if a.dtype in FLOAT8 and scale_a.dtype is torch.float32:
        return _scaled_rows(a, b, scale_a, scale_b, bias, dtype)
    values = _blocks(a, scale_a) @ _blocks(b.t(), scale_b).t()
    return (values if bias is None else values + bias.float()).to(dtype)


def _scaled_rows(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    need(b.dtype in FLOAT8, "8-bit floats on both sides")
    need(not (a.dtype is torch.float8_e5m2 and b.dtype is torch.float8_e5m2), "not e5m2 on both sides")
    whole = scale_a.numel() == 1 and scale_b.numel() == 1
    rows = tuple(scale_a.shape) == (a.shape[0], 1) and tuple(scale_b.shape) == (1, b.shape[1]) and scale_a.is_contiguous() and scale_b.is_contiguous()
    need(scale_b.dtype is torch.float32 and (whole or rows), f"float32 scales of one element, or [M, 1] and [1, N], got {list(scale_a.shape)} and {list(scale_b.shape)}")
    # of two libraries that may serve rows, one takes e4m3 only and writes bfloat16 only
    need(whole or (dtype is torch.bfloat16 and b.dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz)), "e4m3 and a bfloat16 output with scales of rows")
    if a.shape[0] == 0:
        return torch.empty(0, b.shape[1], dtype=dtype)
    product: Tensor = torch.ops.aten._scaled_mm(a, b, scale_a, scale_b, bias, None, dtype, False)
    return product


def _blocks(stored: Tensor, scale: Tensor) -> Tensor:
    """float32 [R, K] of block floats with scales in the operator's order."""
    if stored.dtype is torch.float4_e2m1fn_x2:
        need(scale.dtype is torch.float8_e4m3fn, "e4m3 scales of 4-bit floats")
        raw, block = stored.view(torch.uint8), 16
        values = decode(unpack_dense(raw.contiguous(), 4, 2 * raw.shape[1]), SMALL_FLOATS["fp4_e2m1"])
    else:
        need(stored.dtype in FLOAT8 and scale.dtype is torch.float8_e8m0fnu, "e8m0 scales of 8-bit floats")
        values, block = stored.float(), 32
    rows, k = values.shape
    shape = (-(-rows // TILE_ROWS) * TILE_ROWS, -(-k // block // TILE_BLOCKS) * TILE_BLOCKS)
    need(scale.numel() == shape[0] * shape[1] and scale.is_contiguous(), f"{shape[0] * shape[1]} contiguous scales, got {scale.numel()}")
    natural = torch.empty(shape[0] * shape[1])
    natural[block_scale_order(shape[0], shape[1], scale.device)] = scale.flatten().float()
    return values * torch.repeat_interleave(natural.view(shape)[:rows, : k // block], block, dim=1)


def block_scale_order(rows: int, blocks: int, device: torch.device) -> Tensor:
    """int64 [rows * blocks]: the place in a row-major [rows, blocks] of each stored scale; rows and blocks are whole tiles.

    Tiles of 128 rows and 4 blocks follow each other along K, then along rows.  In a tile the scale of row r and block c stands at
    16 (r mod 32) + 4 (r div 32) + c.
    Source: cuBLAS 12.9 documentation, "1D Block Scaling Factors Layout".
    """
    place = torch.arange(rows * blocks, device=device)
    tile, inside = place // (TILE_ROWS * TILE_BLOCKS), place % (TILE_ROWS * TILE_BLOCKS)
    across = blocks // TILE_BLOCKS
    row = tile // across * TILE_ROWS + inside // 16 + 32 * (inside % 16 // 4)
    return row * blocks + tile % across * TILE_BLOCKS + inside % 4


def weight_int8pack_mm(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """[M, N] of x's dtype: scale[n] * sum of float32(x) * float32(codes), for x [M, K], int8 [N, K] and scale [N]."""
    need(codes.dtype is torch.int8 and scale.dim() == 1 and x.shape[1] == codes.shape[1], "int8 [N, K] and scale [N]")
    return ((x.float() @ codes.float().t()) * scale.float()).to(x.dtype)


def convert_weight_to_int4pack(packed: Tensor, inner: int) -> Tensor:
    """The operator's own layout of 4-bit codes; uint8 [N, K / 2], the even column in the HIGH nibble."""
    n, k = packed.shape[0], 2 * packed.shape[1]
    need(packed.dtype is torch.uint8 and inner in (2, 4, 8), "uint8 codes, 2, 4 or 8 inner tiles")
    need(n % 8 == 0 and k % (inner * 16) == 0, f"N a multiple of 8 and K of {inner * 16}, got {n} and {k}")
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).view(n, k).int()
    tiles: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, inner)
    return tiles


def weight_int4pack_mm(x: Tensor, packed: Tensor, group: int, scale_and_zero: Tensor) -> Tensor:
    """bfloat16 [M, N] of x [M, K] and W[n, k] = (code - 8) * s[k // group, n] + z[k // group, n], rounded to bfloat16.

    Args:
        scale_and_zero: bfloat16 [K / group, N, 2].
    """
    need(x.dtype is torch.bfloat16 and scale_and_zero.dtype is torch.bfloat16, "bfloat16 inputs and scales")
    need(group in (32, 64, 128, 256), f"groups of 32, 64, 128 or 256, got {group}")
    need(scale_and_zero.dim() == 3 and scale_and_zero.shape[2] == 2 and scale_and_zero.shape[0] * group == x.shape[1], "scales [K / group, N, 2]")
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scale_and_zero)
    return product
