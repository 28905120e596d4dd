"""Integer codes with a scale per group of K: what the schemes of several layouts share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import TORCH_DTYPES
from bitgrain.formats.base import Scheme
from bitgrain.weights import WeightSpec


@dataclass(frozen=True, slots=True)
class GroupedScheme(Scheme):
    """Codes of one width in groups of K without activation order.

    Args:
        group_size:  1 to K.
        scale_dtype: element type of the stored scales, as safetensors spells it.
    """

    shape: tuple[int, int]
    group_size: int
    scale_dtype: str

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4

    @property
    @abstractmethod
    def zero(self) -> str:
        """See WeightSpec.zero."""

    @property
    def groups(self) -> int:
        return -(-self.shape[1] // self.group_size)

    @property
    def weight_spec(self) -> WeightSpec:
        return int_affine_spec(self.bits, self.shape[1], self.group_size, self.zero, self.scale_dtype)


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
