"""Random weights and stored activation values of a given spec, for self-tests, conformance tests and benchmarks."""

from __future__ import annotations

from dataclasses import replace

import torch

from bitgrain.errors import LayoutError
from bitgrain.numerics.block_scales import encode_block_scale
from bitgrain.numerics.small_floats import SMALL_FLOATS
from bitgrain.weights.activation import ActivationSpec
from bitgrain.weights.base import Weight, WeightSpec
from bitgrain.weights.block_float import BlockFloatWeight
from bitgrain.weights.codebook import CodebookWeight
from bitgrain.weights.dense import DenseWeight
from bitgrain.weights.float8 import FLOAT8_NAMES, FloatWeight
from bitgrain.weights.int_affine import IntAffineWeight


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
    raise LayoutError("sample_weight", spec.kind, "dense, int_affine, float, block_float or codebook", "add the class here")


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
