"""Checkpoints written in the layout that Marlin kernels read: symmetric 4-bit codes in 16 x 64 tiles, no zero points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES, TORCH_DTYPES
from bitgrain.errors import ShapeMismatchError
from bitgrain.formats.base import ModuleView, Scheme, TensorRule, require_scale
from bitgrain.formats.word_packed import matrix_sizes, scale_dtype_of
from bitgrain.numerics.interleave import restore_marlin_scales, unpack_marlin_tiles
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, IntAffineWeight, Weight, WeightSpec

BITS, ZERO = 4, 8


@dataclass(frozen=True, slots=True)
class MarlinScheme(Scheme):
    """W[n, k] = (code - 8) * scale[n, k // group_size].

    Tensors:
        codes:  int32 [K / 16, 2 * N], 16 x 64 tiles in fragment order, even-odd nibbles.
        scales: float [G, N], in runs of 64 (32 when G = 1) in the kernel's order.

    Args:
        group_size:  1 to K.
        scale_dtype: as safetensors spells it.
        codes_name, scales_name: local names, "qweight" and "scales" or "B" and "s".
    """

    shape: tuple[int, int]
    group_size: int
    scale_dtype: str
    codes_name: str = "qweight"
    scales_name: str = "scales"
    activation: ActivationSpec = NO_ACTIVATION

    @property
    def groups(self) -> int:
        return -(-self.shape[1] // self.group_size)

    @property
    def weight_spec(self) -> WeightSpec:
        return int_affine_spec(BITS, self.shape[1], self.group_size, "constant", self.scale_dtype)

    def tensors(self) -> tuple[TensorRule, ...]:
        n, k = self.shape
        return (
            TensorRule(self.codes_name, ("I32",), ((k // 16, 2 * n),)),
            TensorRule(self.scales_name, FLOAT_CODES, ((self.groups, n),)),
        )

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        stored = tensors[self.scales_name]
        codes = unpack_marlin_tiles(tensors[self.codes_name]).t().contiguous()
        require_scale(self.scales_name, stored, signed=True, codes_are_zero=not bool((codes != ZERO).any()))
        scale = restore_marlin_scales(stored, self.groups > 1).t().contiguous()
        return IntAffineWeight.from_codes(codes, BITS, scale, ZERO, self.group_size)


def marlin_scheme(module: ModuleView, group_size: int, where: str) -> MarlinScheme:
    """The scheme of a module whose tensors are in Marlin tiles.

    Args:
        group_size: as configured; -1 for one group per row.
        where:      the configuration key that names the layout, for messages.
    Raises:
        ShapeMismatchError: the layout cannot hold the module's sizes.
    """
    codes, scales = ("B", "s") if "B" in module.tensors else ("qweight", "scales")
    packed, scale = matrix_sizes(module, codes), matrix_sizes(module, scales)
    derived_n = scale[1] if scale else packed[1] // 2 if packed else 0
    n, k = module.shape or (derived_n, 16 * packed[0] if packed else 0)
    size = k if group_size == -1 else min(group_size, k)
    if n % 64 or k % 16 or (size and k % size):
        raise ShapeMismatchError(
            module.full_name(codes),
            f"N = {n}, K = {k}, group_size = {group_size}",
            f"N % 64 == 0, K % 16 == 0 and K % group_size == 0, because {where} says Marlin tiles",
            "correct the configuration",
        )
    return MarlinScheme((n, k), max(1, size), scale_dtype_of(module, scales), codes, scales)


def int_affine_spec(bits: int, columns: int, group_size: int, zero: str, scale_dtype: str, group_index: bool = False) -> WeightSpec:
    """The spec of an IntAffineWeight with scales per group of K, or per channel when one group covers the row."""
    grouped = group_index or group_size < columns
    return WeightSpec(
        "int_affine",
        f"uint{bits}",
        bits,
        "group" if grouped else "channel",
        group_size if grouped else 0,
        zero=zero,
        group_index=group_index,
        scale_dtype=str(TORCH_DTYPES[scale_dtype]).removeprefix("torch."),
    )


def centred_codes_are_zero(codes: Tensor, zero: Tensor, group_size: int) -> bool:
    """Whether code - zero is 0 everywhere, so that the scales do not matter.

    Args:
        codes: uint8 [N, K]; zero: int16 [N, G].
    """
    full = torch.repeat_interleave(zero, group_size, dim=1)[:, : codes.shape[1]]
    return not bool((codes != full).any())
