"""The layout marlin-24: symmetric integers of which two in each four columns are kept, in the order of a tensor-core kernel.

    weight_packed  int32 [K / 32, N * bits / 2]: unsigned codes q + 2^(bits-1) of the kept columns, as a matrix [K / 2, N] in
                   16 x 64 tiles, each tile in fragment order, low bits first
    meta           int16 [K / 32, 2 * N]: which two columns of each four are kept, in the kernel's order of rows
    scale_packed   float16 [G, N], in runs of 64 in the kernel's order, or in natural order (see `scales_in_order`)
Columns that are not kept are zero.

Source: compressed-tensors 0.12 compressors/sparse_quantized_compressors/marlin_24.py and its permutations (the layout, written
anew); the order of `meta` is that of CUTLASS' interleaved column-major metadata of 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import BadValueError, ShapeMismatchError
from bitgrain.formats.base import ModuleView, Scheme, TensorRule
from bitgrain.formats.compressed_tensors.arguments import QuantizationArgs
from bitgrain.formats.grouped import int_affine_spec
from bitgrain.formats.stored_scales import filled_activation, static_input_rules
from bitgrain.formats.value_checks import require_scale
from bitgrain.numerics.bitpack import unpack_dense, words_as_bytes
from bitgrain.numerics.interleave import EVEN_ODD
from bitgrain.weights import ActivationSpec, IntAffineWeight, Weight, WeightSpec

_ROW_TILE, _COLUMN_TILE = 32, 64
# Scale p of a run of 64 is that of row _SCALE_ORDER[p].
_SCALE_ORDER = [8 * run + i for run in range(8) for i in (0, 4, 1, 5, 2, 6, 3, 7)]


@dataclass(frozen=True, slots=True)
class Tiled24Scheme(Scheme):
    """W[n, k] = (code - 2^(bits-1)) * scale[n, k // group_size] for the two kept columns of each four, else 0.

    Args:
        bits:        4 or 8.
        group_size:  1 to K, which divides K.
        grouped:     scales belong to groups, even where one group covers a row.
        scale_dtype: element type of the scales, as safetensors spells it.
    """

    shape: tuple[int, int]
    activation: ActivationSpec
    bits: int
    group_size: int
    grouped: bool
    scale_dtype: str = "F16"

    @property
    def weight_spec(self) -> WeightSpec:
        return int_affine_spec(self.bits, self.shape[1], self.group_size, "constant", self.scale_dtype)

    @property
    def scales_in_order(self) -> bool:
        """The producer permutes the scales of groups smaller than the K / 2 columns that are kept, and no others."""
        return not (self.grouped and self.group_size < self.shape[1] // 2)

    def tensors(self) -> tuple[TensorRule, ...]:
        n, k = self.shape
        return (
            TensorRule("weight_packed", ("I32",), ((k // 32, n * self.bits // 2),)),
            TensorRule("scale_packed", FLOAT_CODES, ((k // self.group_size, n),)),
            TensorRule("meta", ("I16",), ((k // 32, 2 * n),)),
            *static_input_rules(self.activation),
        )

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        """IntAffineWeight with a code for every column; see Scheme.to_weight."""
        zero = 1 << (self.bits - 1)
        kept = _kept_codes(tensors["weight_packed"], self.bits)
        stored = require_scale("scale_packed", tensors["scale_packed"], codes_are_zero=not bool((kept != zero).any()))
        codes = torch.full(self.shape, zero, dtype=torch.uint8, device=kept.device)
        codes.scatter_(1, _kept_columns(tensors["meta"], self.shape), kept)
        scale = stored if self.scales_in_order else _in_natural_order(stored)
        return IntAffineWeight.from_codes(codes, self.bits, scale.t().contiguous(), zero, self.group_size)

    def to_activation(self, tensors: Mapping[str, Tensor]) -> ActivationSpec:
        return filled_activation(self.activation, dict(tensors))


def tiled24_scheme(module: ModuleView, args: QuantizationArgs, activation: ActivationSpec) -> Tiled24Scheme:
    """The scheme of a module in this layout.

    Raises:
        ShapeMismatchError: the layout cannot hold the module's sizes.
    """
    packed, scale = module.tensors.get("weight_packed"), module.tensors.get("scale_packed")
    header, per_row = (packed, args.num_bits // 2) if packed is not None else (module.tensors.get("meta"), 2)
    rows, columns = header.shape if header is not None and len(header.shape) == 2 else (0, 0)
    n, k = module.shape or (columns // per_row, 32 * rows)
    size = args.group_size or k
    if n % _COLUMN_TILE or k % _ROW_TILE or not size or k % size:
        raise ShapeMismatchError(
            module.full_name("weight_packed"),
            f"N = {n}, K = {k}, group_size = {size}",
            f"N % {_COLUMN_TILE} == 0, K % {_ROW_TILE} == 0 and K % group_size == 0, because the format is marlin-24",
            "correct the configuration",
        )
    dtype = scale.dtype if scale is not None and scale.dtype in FLOAT_CODES else "F16"
    return Tiled24Scheme((n, k), activation, args.num_bits, size, args.strategy == "group", dtype)


@cache
def _fragment_order(bits: int) -> Tensor:
    """int64 [1024]: position p of four 16 x 16 tiles holds element order[p] of the row-major tiles; do not write to it.

    Lane i of a warp holds, in the four rows 2 (i % 4) + {0, 1, 8, 9}, the columns c and c + 4 of tile i // 8, c = 8 ((i // 4) % 2) + j
    for j = 0 to 3; the values of a word (two words for eight-bit codes) are stored even before odd.
    """
    order = []
    for lane in range(32):
        column, pair = lane // 4, 2 * (lane % 4)
        corner = 256 * (column // 2) + 8 * (column % 2)
        for j in range(4):
            order += [corner + 16 * row + 4 * half + j for half in (0, 1) for row in (pair, pair + 1, pair + 8, pair + 9)]
    inside = torch.tensor(EVEN_ODD if bits == 4 else (0, 2, 1, 3))
    return torch.tensor(order).view(-1, len(inside))[:, inside].flatten()


def _kept_codes(words: Tensor, bits: int) -> Tensor:
    """uint8 [N, K / 2]: codes of the kept columns."""
    count = words.shape[1] * (32 // bits)
    stored = unpack_dense(words_as_bytes(words), bits, count).view(-1, 1024)
    tiles = torch.empty_like(stored)
    tiles[:, _fragment_order(bits).to(words.device)] = stored
    # [rows of tiles, columns of tiles, 16, 16] with rows along K
    rows = tiles.view(words.shape[0], count // 256, 16, 16).permute(0, 2, 1, 3).reshape(16 * words.shape[0], count // 16)
    return rows.t().contiguous()


def _kept_columns(meta: Tensor, shape: tuple[int, int]) -> Tensor:
    """int64 [N, K / 2]: the column of each kept code, ascending in a row.

    Raises:
        BadValueError: two places of a run of four that are equal or descending.
    """
    n, k = shape
    words = meta.flatten()[_meta_places(n, k // 16).to(meta.device)].to(torch.int64) & 0xFFFF
    # four bits for each run of four columns: the place of the first kept, then that of the second
    places = torch.stack([words >> shift & 3 for shift in range(0, 16, 2)], dim=-1).view(n, k // 4, 2)
    if bool((places[..., 0] >= places[..., 1]).any()):
        bad = int((places[..., 0] >= places[..., 1]).sum())
        needed = "two different columns of each four, in ascending order"
        raise BadValueError("meta", f"{bad} runs of four whose kept columns are not in rising order", needed, "the file is damaged; fetch or write it again")
    first = 4 * torch.arange(k // 4, device=meta.device).view(1, -1, 1)
    return (places + first).view(n, k // 2)


def _meta_places(rows: int, columns: int) -> Tensor:
    """int64 [rows, columns]: where the stored order keeps element (r, c) of the metadata."""
    row, column = torch.arange(rows).view(-1, 1), torch.arange(columns).view(1, -1)
    row = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row % 64 // 8 * 4
    # the off-diagonal elements of each 2 x 2 block change places
    step = (row % 2 == 0).long() * (column % 2 == 1) - (row % 2 == 1).long() * (column % 2 == 0)
    row, column = row + step, column - step
    return column // 2 * rows * 2 + row * 2 + column % 2


def _in_natural_order(stored: Tensor) -> Tensor:
    """Scales [G, N] in the order of rows."""
    runs = stored.reshape(-1, len(_SCALE_ORDER))
    natural = torch.empty_like(runs)
    natural[:, torch.tensor(_SCALE_ORDER, device=stored.device)] = runs
    return natural.view(stored.shape)
