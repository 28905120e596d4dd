"""Codebook weights: values that are looked up or computed from codes while they are multiplied.

Prepared tensors are those of the weight, codes as they are stored (three, five, six and seven bits as planes of the same size), and tables of
a few kilobytes beside them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from bitgrain.kernels.triton.decoded import BLOCK_K, DecodedLinear, Layout
from bitgrain.numerics.bitpack import PLANES, pack_dense, unpack_dense
from bitgrain.numerics.e8_lattice import e8_ball, e8p_codebook
from bitgrain.weights import Weight
from bitgrain.weights.additive import AdditiveCodebookWeight
from bitgrain.weights.codebook import CodebookWeight
from bitgrain.weights.lattice import LatticeWeight
from bitgrain.weights.trellis import TrellisWeight
from bitgrain.weights.vector_codebook import VectorCodebookWeight

# as in code_decoders, which cannot be imported before triton is
DECODERS = {"lut": 0, "quantlut": 1, "quantlut_sym": 2, "1mad": 3, "2mad": 4, "3inst": 5}


class LookupLinear(DecodedLinear):
    """Codes of 1 to 8 bits in tables of values, one table for all rows or one for each, with a scale per group."""

    name = "triton.lookup"
    kind = "codebook"

    def layout(self, weight: Weight) -> Layout:
        assert isinstance(weight, CodebookWeight)  # refusal() asked for the kind
        planes = code_planes(weight.packed, weight.bits, weight.in_features)
        groups = weight.scale.shape[1]
        size = weight.group_size if groups > 1 else weight.in_features
        settings = (weight.bits, int(weight.table.shape[0] > 1), int(groups == 1 or size % BLOCK_K == 0))
        return Layout("code_decoders.decode_lookup", [*planes, weight.table, weight.scale], (*strides(planes), groups, size), settings)


class AdditiveLinear(DecodedLinear):
    """Sums of entries of any number of codebooks of up to 16 bits; blocks of any height and width."""

    name = "triton.additive"
    kind = "additive"

    def layout(self, weight: Weight) -> Layout:
        assert isinstance(weight, AdditiveCodebookWeight)  # refusal() asked for the kind
        settings = (weight.codes.shape[2], weight.code_bits, *weight.block)
        return Layout("code_decoders.decode_additive", [weight.codes, weight.codebooks, weight.scale], (0,), settings)


class VectorLinear(DecodedLinear):
    """Vectors of rows out of codebooks, with residuals, columns of their own codebook, scales and offsets of columns."""

    name = "triton.vector"
    kind = "vector_codebook"

    def layout(self, weight: Weight) -> Layout:
        assert isinstance(weight, VectorCodebookWeight)  # refusal() asked for the kind
        sizes, k = weight.sizes, weight.shape[1]
        outliers = k - weight.codes.shape[1]
        parts = [
            _places(k, weight.outlier_columns, weight.codes.device), weight.group_index, weight.codes, weight.residual_codes, weight.outlier_codes,
            weight.centroids, weight.residual_centroids, weight.outlier_centroids, weight.column_scale, weight.column_offset,
        ]  # fmt: skip
        flags = [int(part is not None) for part in (weight.group_index, weight.residual_codes, weight.column_scale, weight.column_offset)]
        counts = (k - outliers, outliers, sizes.entries, sizes.residual)
        return Layout("code_decoders.decode_vector", parts, counts, (sizes.length, sizes.outlier_length, *flags))


class LatticeLinear(DecodedLinear):
    """Points of the E8 lattice: magnitudes from one small table, signs and shifts computed, and residuals of both kinds."""

    name = "triton.lattice"
    kind = "lattice"

    def layout(self, weight: Weight) -> Layout:
        assert isinstance(weight, LatticeWeight)  # refusal() asked for the kind
        device, second = weight.codes.device, weight.residual
        bits = 0 if second is None else 8 * second.element_size()
        ball = e8_ball().to(device) / weight.residual_divisor if bits == 8 else None
        settings = (bits, weight.residual_divisor)
        # without a residual a point is a multiple of a quarter, below 4
        return Layout("code_decoders.decode_lattice", [weight.codes, second, _magnitudes().to(device), ball], (0,), settings, exact=bits == 0)


class TrellisLinear(DecodedLinear):
    """Bit streams whose windows become values in registers, or rows of a table; both orders of values."""

    name = "triton.trellis"
    kind = "trellis"

    def layout(self, weight: Weight) -> Layout:
        assert isinstance(weight, TrellisWeight)  # refusal() asked for the kind
        table_bits = 0 if weight.table is None else weight.table.shape[0].bit_length() - 1
        settings = (weight.bits, weight.window, weight.step, DECODERS[weight.decoder], table_bits, int(weight.order == "fragments"))
        return Layout("code_decoders.decode_trellis", [weight.packed, weight.table], (0,), settings)


def code_planes(packed: Tensor, bits: int, k: int) -> list[Tensor | None]:
    """Three planes of codes, the lowest first, each a dense stream uint8 [N, bytes]; None where there are fewer.

    Args:
        packed: uint8 [N, ceil(k * bits / 8)], a dense stream of codes.
    """
    if len(PLANES[bits]) == 1:
        return [packed, None, None]
    codes = unpack_dense(packed, bits, k)
    return split_planes(codes, bits)


def split_planes(codes: Tensor, bits: int) -> list[Tensor | None]:
    """The same of codes uint8 [N, K]."""
    planes: list[Tensor | None] = []
    lowest = 0
    for width in PLANES[bits]:
        planes.append(pack_dense((codes >> lowest) & ((1 << width) - 1), width))
        lowest += width
    return [*planes, None, None][:3]


def strides(planes: list[Tensor | None]) -> tuple[int, ...]:
    """Bytes of a row of each plane."""
    return tuple(0 if plane is None else plane.shape[1] for plane in planes)


def _places(k: int, outliers: Tensor | None, device: torch.device) -> Tensor:
    """int32 [K]: the number of a column among those that are no outliers; of an outlier, minus one less its number among them."""
    if outliers is None:
        return torch.arange(k, dtype=torch.int32, device=device)
    main = torch.ones(k, dtype=torch.bool, device=device)
    main[outliers] = False
    place = torch.empty(k, dtype=torch.int32, device=device)
    place[main] = torch.arange(k - len(outliers), dtype=torch.int32, device=device)
    place[outliers] = -1 - torch.arange(len(outliers), dtype=torch.int32, device=device)
    return place


@lru_cache(maxsize=1)
def _magnitudes() -> Tensor:
    """float16 [256, 8]: the points of a low byte of 0, their shift taken off, for each high byte."""
    return (e8p_codebook().view(256, 256, 8)[:, 0] - 0.25).half()


CODEBOOK_KERNELS = (LookupLinear, AdditiveLinear, VectorLinear, LatticeLinear, TrellisLinear)
