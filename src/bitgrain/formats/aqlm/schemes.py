"""The tensors of an AQLM module.

    codes      int8 (b <= 8) or int16 [N / h, K / g, C], two's complement of the unsigned b-bit code
    codebooks  [C, 2^b, h, g]
    scales     [N / h, 1, 1, 1]
    bias       [N], optional
The writer's layer for 8-bit codes exchanges the first two dimensions of `codes` in place the first time that it runs without
an accelerator, so models saved after that have [K / g, N / h, C]; where the two sizes are equal nothing tells them apart, and the
documented order counts.
Source: formats specification, section 4.1; aqlm 1.1.7 inference.py and utils.py.
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
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, AdditiveCodebookWeight, Weight, WeightSpec
from bitgrain.weights.additive import additive_spec


@dataclass(frozen=True, slots=True)
class Books:
    """Sizes of the codebooks.

    Args:
        count:     C, the number of codebooks.
        code_bits: b, 1 to 16.
        block:     (h, g), rows and columns of an entry.
    """

    count: int
    code_bits: int
    block: tuple[int, int]


@dataclass(frozen=True, slots=True)
class AqlmScheme(Scheme):
    """A matrix of sums of codebook entries.

    Args:
        shape:       (N, K), multiples of the block.
        scale_dtype: of the scales, as torch calls it.
    """

    shape: tuple[int, int]
    books: Books
    scale_dtype: str = "float16"
    activation: ActivationSpec = NO_ACTIVATION

    @property
    def weight_spec(self) -> WeightSpec:
        return additive_spec(self.books.count, self.books.code_bits, self.books.block, self.scale_dtype)

    @property
    def has_own_codebooks(self) -> bool:
        return True

    def tensors(self) -> tuple[TensorRule, ...]:
        h, g = self.books.block
        rows, columns, count = self.shape[0] // h, self.shape[1] // g, self.books.count
        usual, exchanged = (rows, columns, count), (columns, rows, count)
        return (
            TensorRule(
                "codes", ("I8" if self.books.code_bits <= 8 else "I16",), (usual, exchanged) if self.books.code_bits == 8 else (usual,)
            ),
            TensorRule("codebooks", FLOAT_CODES, ((count, 1 << self.books.code_bits, h, g),)),
            TensorRule("scales", FLOAT_CODES, ((rows, 1, 1, 1),)),
        )

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        codes, codebooks = tensors["codes"], require_finite("codebooks", tensors["codebooks"])
        if codes.shape[0] != self.shape[0] // self.books.block[0]:
            codes = codes.transpose(0, 1).contiguous()
        if not bool(codebooks.any()):
            raise BadValueError(
                "codebooks", "every entry is zero", "entries that are not zero", "the file is damaged; fetch or write it again"
            )
        _require_codes(codes, self.books.code_bits)
        scale = require_scale("scales", tensors["scales"], signed=True)
        return AdditiveCodebookWeight(codes, codebooks, scale.reshape(-1))


def _require_codes(codes: Tensor, bits: int) -> None:
    """Raise BadValueError if a code is neither an unsigned nor a signed number of so many bits."""
    least, most = (int(end) for end in torch.aminmax(codes))
    if least < -(1 << (bits - 1)) or most >= 1 << bits:
        raise BadValueError(
            "codes",
            f"values from {least} to {most}",
            f"codes of {bits} bits in two's complement",
            "correct nbits_per_codebook, or fetch or write the file again",
        )
