"""Checkpoints written in the layout that Marlin kernels read: symmetric 4-bit codes in 16 x 64 tiles, no zero points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import ShapeMismatchError
from bitgrain.formats.base import ModuleView, TensorRule
from bitgrain.formats.grouped import GroupedScheme
from bitgrain.formats.value_checks import require_scale
from bitgrain.formats.word_packed import matrix_sizes, scale_dtype_of
from bitgrain.numerics.interleave import restore_marlin_scales, unpack_marlin_tiles
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, IntAffineWeight, Weight

BITS, ZERO = 4, 8


@dataclass(frozen=True, slots=True)
class MarlinScheme(GroupedScheme):
    """W[n, k] = (code - 8) * scale[n, k // group_size].

    Tensors:
        codes:  int32 [K / 16, 2 * N], 16 x 64 tiles in fragment order, even-odd nibbles.
        scales: float [G, N], in runs of 64 (32 when G = 1) in the kernel's order.

    Args:
        codes_name, scales_name: local names, "qweight" and "scales" or "B" and "s".
    """

    codes_name: str = "qweight"
    scales_name: str = "scales"
    activation: ActivationSpec = NO_ACTIVATION

    @property
    def zero(self) -> str:
        return "constant"

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
