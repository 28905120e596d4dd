"""The tensors of a VPTQ module.

    centroids.weight          [G, n v]: G codebooks of n vectors; a vector is v consecutive rows of one column
    res_centroids.weight      [G, n_r v], added to them
    indices, packed           int32 [G, ceil(N / v), ceil(S (b + b_r) / 32)], S columns per group: a bit stream per row, low bits
                              first; an item is b = log2 n bits of the main index and above them b_r = log2 n_r of the residual's
    indices, res_indices      not packed: [G, ceil(N / v), S], 16 bits that are unsigned whatever type they are stored as
    outlier_centroids.weight  [1, n_o u]: the codebook of the first stored columns, the outliers
    outlier_indices           [1, ceil(N / u), T], as res_indices
    perm                      [K]: stored column i is column perm[i] of the module; int64, or 16 bits that are unsigned
    weight_scale, weight_bias [K]: multiplied and added last, in the module's order of columns
    bias                      [N]
Stored columns are the T outliers and then the groups, S columns each.
Source: formats specification, section 4.4; vptq 0.0.5 layers/vqlinear.py, ops/quant_gemm.py and utils/pack.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import BadValueError
from bitgrain.formats.base import Scheme, TensorRule
from bitgrain.formats.value_checks import require_finite, require_scale
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, VectorCodebookWeight, Weight, WeightSpec
from bitgrain.weights.vector_codebook import VectorSizes, pack_codes, vector_spec

# 16 bits stand for an unsigned number, whatever they are called.
HALF_WORDS = ("I16", "U16", "F16", "BF16")
INDEX_CODES = (*HALF_WORDS, "I64")
MAIN, RESIDUAL, OUTLIER = "centroids.weight", "res_centroids.weight", "outlier_centroids.weight"
DAMAGED = "the file is damaged; fetch or write it again"


def index_bits(entries: int) -> int:
    """Bits of an index of a power of two of entries; 0 for none."""
    return max(entries, 1).bit_length() - 1


@dataclass(frozen=True, slots=True)
class Stored:
    """What is stored beside the codebooks' sizes.

    Args:
        outliers: T, the number of outlier columns.
        packed:   the indices are a bit stream.
        permuted, normed, biased: perm, weight_scale and weight_bias, bias are there.
        scale_dtype: of weight_scale, as torch calls it.
    """

    outliers: int
    packed: bool
    permuted: bool
    normed: bool
    biased: bool
    scale_dtype: str = "float16"


@dataclass(frozen=True, slots=True)
class VptqScheme(Scheme):
    """A matrix of vectors of rows.

    Args:
        shape: (N, K), K = T + G S.
    """

    shape: tuple[int, int]
    sizes: VectorSizes
    stored: Stored
    activation: ActivationSpec = NO_ACTIVATION

    @property
    def weight_spec(self) -> WeightSpec:
        return vector_spec(self.sizes, self.stored.scale_dtype if self.stored.normed else "", self.stored.normed)

    @property
    def has_own_codebooks(self) -> bool:
        return True

    @property
    def group_size(self) -> int:
        """S, columns per group."""
        return (self.shape[1] - self.stored.outliers) // self.sizes.groups

    def _vectors(self, length: int) -> int:
        return -(-self.shape[0] // length)

    def tensors(self) -> tuple[TensorRule, ...]:
        (n, k), sizes, stored = self.shape, self.sizes, self.stored
        width = index_bits(sizes.entries) + index_bits(sizes.residual)
        rows = (sizes.groups, self._vectors(sizes.length))
        rules = [TensorRule(MAIN, FLOAT_CODES, ((sizes.groups, sizes.entries * sizes.length),))]
        if stored.packed:
            rules.append(TensorRule("indices", ("I32",), ((*rows, -(-self.group_size * width // 32)),)))
        else:
            rules.append(TensorRule("indices", INDEX_CODES, ((*rows, self.group_size),)))
        if sizes.residual:
            rules.append(TensorRule(RESIDUAL, FLOAT_CODES, ((sizes.groups, sizes.residual * sizes.length),)))
            if not stored.packed:
                rules.append(TensorRule("res_indices", INDEX_CODES, ((*rows, self.group_size),)))
        if sizes.outlier_length:
            rules.append(TensorRule(OUTLIER, FLOAT_CODES, ((1, sizes.outlier_entries * sizes.outlier_length),)))
            rules.append(TensorRule("outlier_indices", INDEX_CODES, ((1, self._vectors(sizes.outlier_length), stored.outliers),)))
        if stored.permuted:
            rules.append(TensorRule("perm", ("I16", "I64", "U16", "F16", "I32"), ((k,),)))
        if stored.normed:
            rules += [TensorRule(name, FLOAT_CODES, ((k,),)) for name in ("weight_scale", "weight_bias")]
        if stored.biased:
            rules.append(TensorRule("bias", FLOAT_CODES, ((n,),)))
        return tuple(rules)

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        sizes, stored = self.sizes, self.stored
        order = self._order(tensors)
        main, residual = self._indices(tensors)
        is_main = order >= stored.outliers
        # the codes in the module's own order of columns: no input need be permuted when the module runs
        column, outlier = order[is_main] - stored.outliers, order[~is_main]
        residual_codes = pack_codes(residual[:, column], sizes.residual) if residual is not None else None
        found = self._outliers(tensors) if sizes.outlier_length else None
        return VectorCodebookWeight(
            self.shape[0],
            pack_codes(main[:, column], sizes.entries),
            self._codebooks(MAIN, tensors, sizes.entries),
            torch.div(column, self.group_size, rounding_mode="floor").to(torch.int32) if sizes.groups > 1 else None,
            residual_codes,
            self._codebooks(RESIDUAL, tensors, sizes.residual) if sizes.residual else None,
            pack_codes(found[:, outlier], sizes.outlier_entries) if found is not None else None,
            require_finite(OUTLIER, tensors[OUTLIER]).view(sizes.outlier_entries, sizes.outlier_length) if found is not None else None,
            (~is_main).nonzero()[:, 0] if found is not None else None,
            require_scale("weight_scale", tensors["weight_scale"], signed=True) if stored.normed else None,
            require_finite("weight_bias", tensors["weight_bias"]) if stored.normed else None,
        )

    def _codebooks(self, name: str, tensors: Mapping[str, Tensor], entries: int) -> Tensor:
        """[G, entries, v], finite; the main ones not entirely zero."""
        values = require_finite(name, tensors[name])
        if name == MAIN and not bool(values.any()):
            raise BadValueError(name, "every entry is zero", "entries that are not zero", DAMAGED)
        return values.view(self.sizes.groups, entries, self.sizes.length)

    def _order(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """int64 [K]: the stored column that each column of the module is, the inverse of perm."""
        k = self.shape[1]
        if not self.stored.permuted:
            return torch.arange(k)
        perm = unsigned(tensors["perm"])
        if not torch.equal(perm.sort().values, torch.arange(k)):
            raise BadValueError("perm", "some columns twice, others never", f"each of 0 to {k - 1} once", DAMAGED)
        return perm.argsort()

    def _indices(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """int64 [ceil(N / v), G S] in stored order: main indices, and residual ones or None."""
        sizes = self.sizes
        if not self.stored.packed:
            main = _in_range("indices", unsigned(tensors["indices"]), sizes.entries)
            residual = _in_range("res_indices", unsigned(tensors["res_indices"]), sizes.residual) if sizes.residual else None
        else:
            bits, more = index_bits(sizes.entries), index_bits(sizes.residual)
            items = unpack_items(tensors["indices"], bits + more, self.group_size)
            main = items & ((1 << bits) - 1)
            residual = items >> bits if sizes.residual else None
        return _side_by_side(main), None if residual is None else _side_by_side(residual)

    def _outliers(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """int64 [ceil(N / u), T]."""
        return _in_range("outlier_indices", unsigned(tensors["outlier_indices"]), self.sizes.outlier_entries)[0]


def unsigned(values: Tensor) -> Tensor:
    """int64 of the same shape: 16-bit types by their bits, wider integers as they are."""
    if values.dtype.itemsize == 2:
        return values.contiguous().view(torch.int16).long() & 0xFFFF
    return values.long()


def unpack_items(words: Tensor, width: int, count: int) -> Tensor:
    """int64 [..., count]: items of `width` <= 32 bits of int32 words [..., W], low bits first, crossing words.

    Raises:
        BadValueError: bits behind the last item are set.
    """
    stream = words.long() & 0xFFFFFFFF
    first = torch.arange(count) * width
    word, shift = torch.div(first, 32, rounding_mode="floor"), first % 32
    padded = torch.nn.functional.pad(stream, (0, 1))
    # an item spans at most two words; 31 + 32 bits fit a signed 64-bit number
    items = (padded[..., word] >> shift) | ((padded[..., word + 1] << (32 - shift)) & ((1 << width) - 1))
    used = count * width - 32 * (stream.shape[-1] - 1)
    if stream.numel() and bool((stream[..., -1] >> used).any()):
        raise BadValueError(
            "indices",
            "bits are set behind the last index of a row",
            "zeros",
            "the configuration (group_size, num_centroids) is another module's, or the file is damaged",
        )
    return items & ((1 << width) - 1)


def _in_range(name: str, values: Tensor, entries: int) -> Tensor:
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < entries:
        found = f"indices from {int(values.min())} to {int(values.max())}"
        raise BadValueError(name, found, f"indices of {entries} centroids", "correct num_centroids, or fetch or write the file again")
    return values


def _side_by_side(groups: Tensor) -> Tensor:
    """[R, G S] of [G, R, S]."""
    return groups.transpose(0, 1).flatten(1)
