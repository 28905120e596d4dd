"""Orders in which packed codes are written other than their natural one.

Two families occur on disk: the even-odd nibble interleave inside each 32-bit word, and the 16 x 64 tile permutation
that the Marlin kernels read.  Both are permutations, so packing and unpacking are exact inverses.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from bitgrain.errors import LayoutError

# Nibble i of a word holds element EVEN_ODD[i]; reading nibbles in order and indexing with the inverse restores it.
EVEN_ODD = (0, 2, 4, 6, 1, 3, 5, 7)
EVEN_ODD_INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)


def interleave_even_odd(codes: Tensor) -> Tensor:
    """Reorder each run of 8 columns of codes [R, n] (n % 8 == 0) into even-odd order."""
    return _permute_runs(codes, EVEN_ODD)


def deinterleave_even_odd(codes: Tensor) -> Tensor:
    """Inverse of interleave_even_odd."""
    return _permute_runs(codes, EVEN_ODD_INVERSE)


def _permute_runs(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    if codes.shape[-1] % len(order):
        raise LayoutError("interleave", f"{codes.shape[-1]} columns", f"a multiple of {len(order)}", "check the packed dimension")
    index = torch.tensor(order, device=codes.device)
    return codes.reshape(*codes.shape[:-1], -1, len(order)).index_select(-1, index).reshape(codes.shape)


@lru_cache(maxsize=1)
def marlin_tile_order() -> Tensor:
    """int64 [1024]: position p of four packed 16 x 16 tiles holds element order[p] of the row-major tiles.

    Lane i of a warp owns column i // 4 (and that plus 8) and the row pairs 2*(i % 4) and 2*(i % 4) + 8, the fragment
    layout of the m16n8k16 tensor-core instruction; the eight values of a word are stored even-odd.
    Source: IST-DASLab marlin, 2f6d7c1 (layout described there; written anew).
    """
    order = []
    for lane in range(32):
        column, pair = lane // 4, 2 * (lane % 4)
        rows = (pair, pair + 1, pair + 8, pair + 9)
        fragment = [16 * row + column + 8 * half for half in (0, 1) for row in rows]
        for tile in range(4):
            order += [256 * tile + fragment[i] for i in EVEN_ODD]
    return torch.tensor(order)


def marlin_scale_order(grouped: bool) -> list[int]:
    """Order of scales along N inside runs of 64 (one scale per group) or 32 (one per channel)."""
    if grouped:
        return [i + 8 * j for i in range(8) for j in range(8)]
    return [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]


def pack_marlin_tiles(codes: Tensor) -> Tensor:
    """Pack 4-bit codes uint8 [K, N] (K % 16 == 0, N % 64 == 0) into Marlin words int32 [K / 16, 2 * N]."""
    from bitgrain.numerics.bitpack import bytes_as_words, pack_dense

    rows, columns = codes.shape
    _check_tiles(rows, columns)
    tiles = codes.view(rows // 16, 16, columns // 16, 16).permute(0, 2, 1, 3).reshape(-1, 1024)
    ordered = tiles[:, marlin_tile_order().to(codes.device)].reshape(rows // 16, columns * 16)
    return bytes_as_words(pack_dense(ordered.contiguous(), 4))


def unpack_marlin_tiles(words: Tensor) -> Tensor:
    """4-bit codes uint8 [K, N] of Marlin words int32 [K / 16, 2 * N]."""
    from bitgrain.numerics.bitpack import unpack_dense, words_as_bytes

    rows, columns = 16 * words.shape[0], words.shape[1] // 2
    _check_tiles(rows, columns)
    ordered = unpack_dense(words_as_bytes(words), 4, columns * 16).view(-1, 1024)
    tiles = torch.empty_like(ordered)
    tiles[:, marlin_tile_order().to(words.device)] = ordered
    return tiles.view(rows // 16, columns // 16, 16, 16).permute(0, 2, 1, 3).reshape(rows, columns).contiguous()


def _check_tiles(rows: int, columns: int) -> None:
    if rows % 16 or columns % 64:
        raise LayoutError("Marlin tiles", f"K = {rows}, N = {columns}", "K % 16 == 0 and N % 64 == 0", "the layout cannot hold this shape")


def permute_marlin_scales(scales: Tensor, grouped: bool) -> Tensor:
    """Natural scales [G, N] into the order that Marlin stores."""
    order = torch.tensor(marlin_scale_order(grouped), device=scales.device)
    return scales.reshape(-1, len(order))[:, order].reshape(scales.shape)


def restore_marlin_scales(scales: Tensor, grouped: bool) -> Tensor:
    """Inverse of permute_marlin_scales."""
    order = torch.tensor(marlin_scale_order(grouped), device=scales.device)
    natural = torch.empty_like(scales.reshape(-1, len(order)))
    natural[:, order] = scales.reshape(-1, len(order))
    return natural.reshape(scales.shape)
