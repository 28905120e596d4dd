"""Random weights and stored activation values of a given spec, for self-tests, conformance tests and benchmarks."""

from __future__ import annotations

from dataclasses import replace

import torch

from bitgrain.errors import LayoutError
from bitgrain.numerics.block_scales import encode_block_scale
from bitgrain.numerics.block_types import BLOCK_TYPES
from bitgrain.numerics.small_floats import SMALL_FLOATS
from bitgrain.numerics.super_blocks import decode_blocks, write_block_scales
from bitgrain.weights.activation import ActivationSpec
from bitgrain.weights.additive import AdditiveCodebookWeight, parse_additive
from bitgrain.weights.additive import code_dtype as additive_code_dtype
from bitgrain.weights.base import Weight, WeightSpec
from bitgrain.weights.block_float import BlockFloatWeight
from bitgrain.weights.codebook import CodebookWeight
from bitgrain.weights.dense import DenseWeight
from bitgrain.weights.float8 import FLOAT8_NAMES, FloatWeight
from bitgrain.weights.int_affine import IntAffineWeight
from bitgrain.weights.lattice import LatticeWeight
from bitgrain.weights.super_block import SuperBlockWeight
from bitgrain.weights.trellis import TILE, TILE_BYTES_PER_BIT, TrellisWeight, parse_element
from bitgrain.weights.vector_codebook import VectorCodebookWeight, pack_codes, parse_vector


def block_of(spec: WeightSpec) -> tuple[int, int]:
    """(rows, columns) of which N and K of weights of a spec are multiples."""
    if spec.kind == "super_block":
        return (1, spec.group_size)
    if spec.kind == "additive":
        return parse_additive(spec.element)[2]
    return {"lattice": (1, 8), "trellis": (TILE, TILE)}.get(spec.kind, (1, 1))


def sample_weight(spec: WeightSpec, n: int, k: int, seed: int = 0) -> Weight:
    """A random weight [n, k] whose spec is `spec`; values of order 1 / sqrt(k).

    Raises:
        LayoutError: no class holds such a spec.
    """
    generator = torch.Generator().manual_seed(seed)
    if spec.kind == "dense":
        data = torch.randn(n, k, generator=generator) / k**0.5
        return DenseWeight(data.to(getattr(torch, spec.element)))
    if spec.kind == "int_affine":
        return _sample_int_affine(spec, n, k, generator)
    if spec.kind == "float":
        dtype = next(d for d, name in FLOAT8_NAMES.items() if name == spec.element)
        codes = (torch.randn(n, k, generator=generator) * 60).clamp(-240, 240).to(dtype)
        block = {"tensor": (n, k), "channel": (1, k)}.get(spec.granularity, spec.block)
        shape = (-(-n // block[0]), -(-k // block[1]))
        return FloatWeight(codes, torch.rand(shape, generator=generator) * 0.02 / k**0.5 + 1e-4, block)
    if spec.kind == "block_float":
        return _sample_block_float(spec, n, k, generator)
    if spec.kind == "codebook":
        size = spec.group_size or k
        codes = torch.randint(0, 1 << spec.bits, (n, k), generator=generator, dtype=torch.uint8)
        table = torch.linspace(-1, 1, 1 << spec.bits)[None]
        scale = (torch.rand(n, -(-k // size), generator=generator) + 0.1) / k**0.5
        return CodebookWeight.from_codes(codes, spec.bits, table, scale.to(getattr(torch, spec.scale_dtype)), size)
    if spec.kind == "super_block":
        return _sample_super_block(spec, n, k, generator)
    if spec.kind == "lattice":
        return _sample_lattice(spec, n, k, generator)
    if spec.kind == "trellis":
        return _sample_trellis(spec, n, k, generator)
    if spec.kind == "additive":
        return _sample_additive(spec, n, k, generator)
    if spec.kind == "vector_codebook":
        return _sample_vector(spec, n, k, generator)
    raise LayoutError("sample_weight", spec.kind, "a kind that WeightSpec documents", "add the class here")


def sample_activation(spec: ActivationSpec) -> ActivationSpec:
    """`spec` with plausible values in the places that a checkpoint fills, for inputs of order 1."""
    if not spec.has_stored_values:
        return spec
    small = 0.02 if spec.is_integer else 0.01
    return replace(spec, scale=None if spec.dynamic else small, second=0.002 if spec.second_scale == "static" else None, clip=0.9 if spec.clipped else None)


def _sample_block_float(spec: WeightSpec, n: int, k: int, generator: torch.Generator) -> BlockFloatWeight:
    top = 1 << spec.bits
    codes = torch.randint(0, top, (n, k), generator=generator).to(torch.uint8)
    kind = SMALL_FLOATS.get(spec.element)
    if kind is not None and kind.has_nan:
        codes &= 0xBF  # clears one exponent bit: no NaN, no infinity
    largest = kind.max if kind is not None and not kind.has_nan else 2.0
    blocks = -(-k // spec.group_size)
    wanted = (torch.rand(n, blocks, generator=generator) + 0.5) / (largest * k**0.5)
    columns, second = 0, None
    if spec.second_scale != "none":
        columns = -(-k // 2) if spec.second_scale == "group" else k
        rows = 1 if spec.second_scale == "tensor" else n
        second = (torch.rand(rows, -(-k // columns), generator=generator) + 0.5) * 2.0**-6
        wanted = wanted * 2.0**6
    return BlockFloatWeight.from_codes(codes, spec.element, encode_block_scale(wanted, spec.scale_dtype), spec.scale_dtype, spec.group_size, second, columns)


def _sample_super_block(spec: WeightSpec, n: int, k: int, generator: torch.Generator) -> SuperBlockWeight:
    kind = spec.element.upper()
    layout = BLOCK_TYPES[kind]
    if k % layout.elements:
        raise LayoutError("sample_weight", f"K = {k}", f"a multiple of {layout.elements}, the block of {kind}", "choose another K")
    packed = torch.randint(0, 256, (n, layout.row_bytes(k)), generator=generator, dtype=torch.uint8)
    blocks = packed.view(-1, layout.nbytes)
    write_block_scales(blocks, kind, torch.ones(len(blocks)))
    size = float(decode_blocks(packed, kind).square().mean().sqrt())
    write_block_scales(blocks, kind, (torch.rand(len(blocks), generator=generator) + 0.5) / (size * k**0.5))
    return SuperBlockWeight(packed, kind)


def _sample_lattice(spec: WeightSpec, n: int, k: int, generator: torch.Generator) -> LatticeWeight:
    columns = k // 8

    def codes(dtype: torch.dtype) -> torch.Tensor:
        ends = torch.iinfo(dtype)
        return torch.randint(ends.min, ends.max + 1, (n, columns), generator=generator).to(dtype)

    second = {2: None, 3: torch.uint8, 4: torch.int16}[spec.bits]
    return LatticeWeight(codes(torch.int16), None if second is None else codes(second), 3.0)


def _sample_trellis(spec: WeightSpec, n: int, k: int, generator: torch.Generator) -> TrellisWeight:
    decoder, window, step, table_bits, order = parse_element(spec.element)
    packed = torch.randint(0, 256, (n // TILE, k // TILE, TILE_BYTES_PER_BIT * spec.bits), generator=generator).to(torch.uint8)
    table = torch.randn(1 << table_bits, step, generator=generator).half() if table_bits else None
    return TrellisWeight(packed, spec.bits, window, step, decoder, table, order)


def _sample_additive(spec: WeightSpec, n: int, k: int, generator: torch.Generator) -> AdditiveCodebookWeight:
    books, bits, (h, g) = parse_additive(spec.element)
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (n // h, k // g, books), generator=generator).to(additive_code_dtype(bits))
    dtype = getattr(torch, spec.scale_dtype)
    scale = (torch.rand(n // h, generator=generator) + 0.5) / (books * k) ** 0.5
    return AdditiveCodebookWeight(codes, torch.randn(books, 1 << bits, h, g, generator=generator).to(dtype), scale.to(dtype))


def _sample_vector(spec: WeightSpec, n: int, k: int, generator: torch.Generator) -> VectorCodebookWeight:
    sizes = parse_vector(spec.element)
    outliers = k // 8 if sizes.outlier_length else 0
    main = k - outliers

    def codes(entries: int, length: int, columns: int) -> torch.Tensor:
        return pack_codes(torch.randint(0, entries, (-(-n // length), columns), generator=generator), entries)

    def centroids(*shape: int) -> torch.Tensor:
        values: torch.Tensor = torch.randn(*shape, generator=generator) / k**0.5
        return values.half()

    return VectorCodebookWeight(
        n, codes(sizes.entries, sizes.length, main), centroids(sizes.groups, sizes.entries, sizes.length),
        (torch.arange(main) % sizes.groups).to(torch.int32) if sizes.groups > 1 else None,
        codes(sizes.residual, sizes.length, main) if sizes.residual else None,
        centroids(sizes.groups, sizes.residual, sizes.length) / 8 if sizes.residual else None,
        codes(sizes.outlier_entries, sizes.outlier_length, outliers) if outliers else None,
        centroids(sizes.outlier_entries, sizes.outlier_length) if outliers else None,
        torch.randperm(k, generator=torch.Generator().manual_seed(0))[:outliers].sort().values if outliers else None,
        (torch.rand(k, generator=generator) + 0.5).to(getattr(torch, spec.scale_dtype)) if spec.scale_dtype else None,
        centroids(k) if spec.zero == "float" else None,
    )  # fmt: skip


def _sample_int_affine(spec: WeightSpec, n: int, k: int, generator: torch.Generator) -> IntAffineWeight:
    top = (1 << spec.bits) - 1
    codes = torch.randint(0, top + 1, (n, k), generator=generator, dtype=torch.uint8)
    size = spec.group_size if spec.granularity == "group" else k
    groups = -(-k // size)
    rows = 1 if spec.granularity == "tensor" else n
    scale = (torch.rand(rows, groups, generator=generator) + 0.1) / ((top + 1) * k**0.5)
    zero: int | torch.Tensor = 1 << (spec.bits - 1)
    if spec.zero == "integer":
        zero = torch.randint(0, top + 2, (rows, groups), generator=generator, dtype=torch.int16)
    elif spec.zero == "float":
        zero = torch.rand(rows, groups, generator=generator) * top
    index = row_index = None
    if spec.group_index:
        index = (torch.randperm(k, generator=generator) // size).to(torch.int32)
    if spec.row_index:
        row_index = (torch.arange(n) % n).to(torch.int32)
    return IntAffineWeight.from_codes(codes, spec.bits, scale.to(getattr(torch, spec.scale_dtype)), zero, size, index, row_index)
