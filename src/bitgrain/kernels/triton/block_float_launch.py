"""Grids, tiles and arguments of the products with small floats in blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.kernels.base import Prepared
from bitgrain.kernels.triton import activation_quantization
from bitgrain.numerics.small_floats import SMALL_FLOATS
from bitgrain.weights.block_float import ELEMENT_BITS

if TYPE_CHECKING:
    from bitgrain.kernels.triton.block_float import Multiplication

SCALE_CODES = {"e8m0": 0, "e4m3": 1, "e5m3": 2}
FORMATS = {"fp4_e2m1": "e2m1", "fp8_e4m3fn": "e4m3", "fp8_e5m2": "e5m2"}
# Columns that a part of K has at least, rows of x up to which parts of K run side by side, programs per core that they are to fill.
SMALLEST_CHUNK, FEW_ROWS, PROGRAMS_PER_CORE = 512, 64, 2
LARGEST_TILE_K, SCALED_TILE_K = 64, 128
# Rows of a weight that instructions for scaled blocks take at once; smaller tiles would be multiplied as wider floats.
SCALED_TILE_N = 128


@dataclass(frozen=True, slots=True)
class Launch:
    """Tiles and parts of one product.  Everything but the tile of rows depends on the matrix alone: a row's sums are those of any M."""

    m: int
    n: int
    k: int
    cores: int
    wide: bool = False  # products of float32: no instruction takes whole tiles of them
    scaled: bool = False

    @property
    def tile_m(self) -> int:
        return 16 if self.m <= 16 else (32 if self.m <= 32 or self.wide else 64)

    @property
    def tile_n(self) -> int:
        return SCALED_TILE_N if self.scaled else (64 if self.n > 32 else 32)

    def chunk(self, step: int) -> tuple[int, int]:
        """(columns of a part of K, a multiple of `step`; how many parts there are)."""
        programs = -(-self.n // self.tile_n)
        wanted = max(1, min(PROGRAMS_PER_CORE * self.cores // programs, self.k // SMALLEST_CHUNK))
        size = -(-self.k // (wanted * step)) * step
        return size, -(-self.k // size)

    def tiles(self) -> tuple[int, int]:
        return -(-self.m // self.tile_m), -(-self.n // self.tile_n)


def run(
    x: Tensor, x_scale: Tensor | None, prepared: Prepared, bias: Tensor | None, dtype: torch.dtype, how: Multiplication, launch: Launch, wide: bool
) -> Tensor:
    """y [M, N] of `dtype` by block_float_gemm, for x [M, K] contiguous.

    Args:
        wide: multiply in float32 because the device has no products of x's type.
    """
    import triton

    from bitgrain.kernels.triton.block_float_gemm import block_float_gemm

    tensors, meta = prepared.tensors, prepared.meta
    low, high, second = tensors["low"], tensors.get("high"), tensors.get("second")
    tile_k = min(LARGEST_TILE_K, max(16, triton.next_power_of_2(how.piece or launch.k)))
    chunk, parts = launch.chunk(_multiple(how.piece, tile_k))
    # a piece that is no multiple of the tile begins anew with each chunk
    beside = parts > 1 and launch.m <= FEW_ROWS
    kind = SMALL_FLOATS.get(meta["element"])
    block = meta["block"]
    x_groups = 0 if x_scale is None else x_scale.shape[1]
    grouped = 2 if second is not None and second.shape[1] > 1 else int(second is not None)
    x_scaled = 2 if x_groups > 1 else int(x_groups > 0)
    y = torch.empty(launch.m, launch.n, dtype=dtype, device=x.device)
    out = torch.empty(parts, launch.m, launch.n, dtype=torch.float32, device=x.device) if beside else y
    ends = {
        "x_scale_step": 0 if x_scale is None or x_scale.shape[0] == 1 else 1, "second_step": 0 if second is None or second.shape[0] == 1 else second.shape[1],
        "unit": 2.0**how.shift,
    }  # fmt: skip
    arguments = (x if x_scale is None else x_scale, low, low if high is None else high, tensors["scale"], low if second is None else second, x if bias is None else bias)
    block_float_gemm[(*launch.tiles(), parts if beside else 1)](
        x, *arguments, out,
        launch.m, launch.n, launch.k, low.shape[1], 0 if high is None else high.shape[1], block, tensors["scale"].shape[1], meta["second_group"] or launch.k,
        0 if second is None else second.shape[1], x_group=prepared.activation.group_size or launch.k, x_groups=x_groups, chunk=chunk,
        piece=how.piece or chunk, shift=how.shift, **ends,
        MODE=how.mode, WIDTH=ELEMENT_BITS[meta["element"]], BITS=kind.bits if kind else 0, MANTISSA=kind.mantissa_bits if kind else 0, BIAS=kind.bias if kind else 0,
        SCALE=SCALE_CODES[meta["scale_type"]], EXPAND=block if block & (block - 1) == 0 and tile_k % block == 0 and not how.piece else 0,
        SECOND=grouped, X_SCALED=x_scaled, BIASED=bias is not None, INSIDE=1 if beside else parts, PARTS=beside,
        WIDE=wide or _interpreted(), BLOCK_M=launch.tile_m, BLOCK_N=launch.tile_n, BLOCK_K=tile_k,
    )  # fmt: skip
    return _added(out, parts, arguments, y, launch, ends, x_scaled == 1, grouped == 1, bias is not None) if beside else y


def run_scaled(x: Tensor, prepared: Prepared, bias: Tensor | None, launch: Launch) -> Tensor:
    """y [M, N] of x's dtype by scaled_gemm, with x quantized as the weight was prepared for."""
    from bitgrain.kernels.triton.block_float_gemm import scaled_gemm

    tensors, meta, activation = prepared.tensors, prepared.meta, prepared.activation
    low, scale, second = tensors["low"], tensors["scale"], tensors.get("second")
    kind, own = SMALL_FLOATS[meta["element"]], SMALL_FLOATS[activation.element]
    if activation.granularity == "group":
        found = activation_quantization.block_codes(activation, x)
        codes, blocks, x_scale = found.codes, found.scale, found.second
        if x_scale is not None and activation.second_divides:
            x_scale = x_scale.reciprocal()
    else:
        values, x_scale, _ = activation_quantization.quantize(activation, x, own.storage)
        codes, blocks = values.view(torch.uint8), None
    chunk, parts = launch.chunk(SCALED_TILE_K)
    beside = parts > 1 and launch.m <= FEW_ROWS
    y = torch.empty(launch.m, launch.n, dtype=x.dtype, device=x.device)
    out = torch.empty(parts, launch.m, launch.n, dtype=torch.float32, device=x.device) if beside else y
    ends = {"x_scale_step": 0 if x_scale is None or x_scale.shape[0] == 1 else 1, "second_step": 0 if second is None or second.shape[0] == 1 else 1, "unit": 1.0}
    arguments = (codes if x_scale is None else x_scale, low, low, scale, low if second is None else second, x if bias is None else bias)
    scaled_gemm[(*launch.tiles(), parts if beside else 1)](
        codes, codes if blocks is None else blocks, arguments[0], low, scale, *arguments[4:], out,
        launch.m, launch.n, launch.k, low.shape[1], codes.shape[1], scale.shape[1], chunk=chunk, **ends,
        WIDTH=kind.bits, MANTISSA=kind.mantissa_bits, BIAS=kind.bias, FORMAT=FORMATS[meta["element"]],
        X_WIDTH=own.bits, X_MANTISSA=own.mantissa_bits, X_BIAS=own.bias, X_FORMAT=FORMATS[activation.element],
        SCALE=SCALE_CODES[meta["scale_type"]], GROUP=meta["block"], X_BLOCKED=blocks is not None, X_SCALED=x_scale is not None, SECOND=second is not None,
        BIASED=bias is not None, INSIDE=1 if beside else parts, PARTS=beside, WIDE=_interpreted(),
        BLOCK_M=launch.tile_m, BLOCK_N=launch.tile_n, BLOCK_K=SCALED_TILE_K,
    )  # fmt: skip
    return _added(out, parts, arguments, y, launch, ends, x_scale is not None, second is not None, bias is not None) if beside else y


def _added(
    parts: Tensor, count: int, arguments: tuple[Tensor, ...], y: Tensor, launch: Launch, ends: dict[str, float], x_scaled: bool, second: bool, biased: bool
) -> Tensor:
    """y: parts of K added in their order, with what belongs to whole rows."""
    from bitgrain.kernels.triton.block_float_gemm import add_parts

    add_parts[launch.tiles()](
        parts, arguments[0], arguments[4], arguments[5], y, launch.m, launch.n, **ends, PARTS=count, X_SCALED=x_scaled, SECOND=second, BIAS=biased,
        WIDE=_interpreted(), BLOCK_M=launch.tile_m, BLOCK_N=launch.tile_n,
    )  # fmt: skip
    return y


def _multiple(piece: int, tile_k: int) -> int:
    """What a part of K is a multiple of: whole pieces and whole tiles of them."""
    return piece * (-(-tile_k // piece)) if piece else tile_k


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
