"""Launches of the products with decoded weights, and of the gathering of rows.  Imported only when one runs: it imports triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from bitgrain.kernels.triton.availability import interpreted
from bitgrain.kernels.triton.row_decoders import decode_dense
from bitgrain.kernels.triton.weight_product_kernel import add_splits, decode_rows, weight_product


@dataclass(frozen=True, slots=True)
class Decoding:
    """A weight as a decoder reads it.

    Args:
        decode:   the decoder, a function of triton.
        exact:    its values are exact in 16-bit floats of either kind.
        block_k:  columns that are decoded at once.
    """

    decode: Any
    parts: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    settings: tuple[int | float, ...]
    exact: bool
    block_k: int


# Programs that keep a large device busy; a product of fewer tiles is split along K.
WANTED_PROGRAMS = 256
# Columns below which a split does not pay for its partial sums.
SMALLEST_SPLIT = 512
BLOCK_N = 64
LARGEST_BLOCK_M = 64
# Rows from which on a weight whose decoding gathers is decoded once, into a workspace, instead of once for each tile of rows.
EXPAND_ROWS = 256


def columns_per_split(n: int, k: int, block_k: int) -> int:
    """How many columns a program adds up.  A matter of the weight alone: a row's sum has one order, however many rows there are."""
    splits = max(1, min(WANTED_PROGRAMS // -(-n // BLOCK_N), k // SMALLEST_SPLIT))
    per_split = -(-k // splits)
    return max(block_k, -(-per_split // block_k) * block_k)


def multiply(x: Tensor, weight: Decoding, n: int, bias: Tensor | None, dtype: torch.dtype, pieces: bool) -> Tensor:
    """y [M, N] of `dtype` = x [M, K] W^T (+ bias [N]); sums are float32, in the same order for every M.

    Args:
        pieces: the device multiplies bfloat16; else what is not exact in 16 bits is multiplied in float32.
    """
    x = x.contiguous()
    (m, k), wide = x.shape, interpreted()
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    if m >= EXPAND_ROWS and not weight.exact:
        weight = expanded(weight, n, k, x.device)
    per_split = columns_per_split(n, k, weight.block_k)
    splits = triton.cdiv(k, per_split)
    target = out if splits == 1 else torch.empty(splits, m, n, dtype=torch.float32, device=x.device)
    block_m = min(LARGEST_BLOCK_M, max(16, triton.next_power_of_2(m)))
    grid = (triton.cdiv(n, BLOCK_N), triton.cdiv(m, block_m), splits)
    biased = bias is not None
    weight_product[grid](
        x, target, bias if biased else x, weight.parts, weight.sizes, m, n, k, per_split, DECODE=weight.decode, SETTINGS=weight.settings, EXACT=weight.exact,
        PIECES=pieces, BIAS=biased and splits == 1, PARTIAL=splits > 1, WIDE=wide, BLOCK_M=block_m, BLOCK_N=BLOCK_N, BLOCK_K=weight.block_k, enable_fp_fusion=False,
    )  # fmt: skip
    if splits > 1:
        block = 1024
        add_splits[(triton.cdiv(m * n, block),)](target, out, bias if biased else x, m * n, n, SPLITS=splits, BIAS=biased, WIDE=wide, BLOCK=block)
    return out


def expanded(weight: Decoding, n: int, k: int, device: torch.device) -> Decoding:
    """The same weight decoded into a float32 workspace: a product with it adds up the same numbers in the same order."""
    values = rows_of(weight, torch.arange(n, device=device), k, torch.float32)
    return Decoding(decode_dense, (values,), (0,), (0,), weight.exact, weight.block_k)


def rows_of(weight: Decoding, index: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """[len(index), K] of `dtype`: rows of W [N, K], each value rounded once; index int64."""
    out = torch.empty(len(index), k, dtype=dtype, device=index.device)
    if out.numel():
        block_n = min(16, triton.next_power_of_2(len(index)))
        decode_rows[(triton.cdiv(len(index), block_n), triton.cdiv(k, weight.block_k))](
            index.contiguous(), out, weight.parts, weight.sizes, len(index), k, DECODE=weight.decode, SETTINGS=weight.settings, WIDE=interpreted(),
            BLOCK_N=block_n, BLOCK_K=weight.block_k, enable_fp_fusion=False,
        )  # fmt: skip
    return out
