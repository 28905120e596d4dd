"""Random weights of a given spec, for self-tests, conformance tests and benchmarks."""

from __future__ import annotations

import torch

from bitgrain.errors import LayoutError
from bitgrain.weights.base import Weight, WeightSpec
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
    raise LayoutError("sample_weight", spec.kind, "dense, int_affine or float", "add the class here")


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
    index = None
    if spec.group_index:
        index = (torch.randperm(k, generator=generator) // size).to(torch.int32)
    return IntAffineWeight.from_codes(codes, spec.bits, scale.to(getattr(torch, spec.scale_dtype)), zero, size, index)
