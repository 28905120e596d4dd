"""What the tensors of one module mean, in each of the layouts.

Source: AutoAWQ 0.2.9, its packers (formats specification, section 1); for 5 to 7 bits AutoRound 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import BadValueError, LabelMismatchError
from bitgrain.formats.base import TensorRule
from bitgrain.formats.grouped import GroupedScheme, centred_codes_are_zero
from bitgrain.formats.value_checks import require_finite, require_scale
from bitgrain.numerics.bitpack import dense_words, unpack_dense, words_as_bytes
from bitgrain.numerics.interleave import deinterleave_even_odd
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, IntAffineWeight, Weight

BITS, PER_WORD = 4, 8
_REWRITE = "the file is damaged or mislabelled; fetch or write it again"


@dataclass(frozen=True, slots=True)
class GemmScheme(GroupedScheme):
    """W[n, k] = (code - zero) * scale, group g = k // group_size.

    Tensors:
        qweight: int32 [K, N * bits / 32], a dense stream along each row; in every run of 8 columns place i holds column
                 (0, 2, 4, 6, 1, 3, 5, 7)[i].
        qzeros:  int32 [G, N * bits / 32], packed alike; the zero point as it is.
        scales:  float [G, N].

    Args:
        symmetric:  the configuration promises that every zero point is 2**(bits-1); checked.
        width:      bits of a code, 4 to 7.
    """

    symmetric: bool = False
    activation: ActivationSpec = NO_ACTIVATION
    width: int = BITS

    @property
    def bits(self) -> int:
        return self.width

    @property
    def zero(self) -> str:
        return "constant" if self.symmetric else "integer"

    def tensors(self) -> tuple[TensorRule, ...]:
        n, k = self.shape
        words = dense_words(n, self.bits)
        return (
            TensorRule("qweight", ("I32",), ((k, words),)),
            TensorRule("qzeros", ("I32",), ((self.groups, words),)),
            TensorRule("scales", FLOAT_CODES, ((self.groups, n),)),
        )

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        n = self.shape[0]
        codes = unpack_interleaved(tensors["qweight"], n, self.bits)
        zeros = unpack_interleaved(tensors["qzeros"], n, self.bits).to(torch.int16)
        scale = tensors["scales"].t().contiguous()
        return affine_weight(codes, scale, zeros, self.group_size, self.symmetric, self.bits)


def unpack_interleaved(words: Tensor, columns: int, bits: int) -> Tensor:
    """uint8 [columns, rows] of int32 words [rows, columns * bits / 32] in even-odd order; columns % 8 == 0."""
    return deinterleave_even_odd(unpack_dense(words_as_bytes(words), bits, columns)).t().contiguous()


def affine_weight(
    codes: Tensor, scale: Tensor, zeros: Tensor, group_size: int, symmetric: bool, bits: int = BITS
) -> IntAffineWeight:
    """The weight of natural codes uint8 [N, K], scale [N, G] and zero points int16 [N, G].

    Raises:
        LabelMismatchError: zero points other than 2**(bits-1) in a checkpoint that is called symmetric.
        BadValueError: scales that no producer writes.
    """
    middle = 1 << (bits - 1)
    if symmetric and bool((zeros != middle).any()):
        raise LabelMismatchError(
            "qzeros",
            f"{int((zeros != middle).sum())} of {zeros.numel()} zero points are not {middle}, though the configuration says symmetric",
            f"every zero point {middle}, or zero_point: true (sym: false)",
            "correct zero_point or sym in the configuration, or write the checkpoint again",
        )
    all_zero = not bool((scale != 0).any()) and centred_codes_are_zero(codes, zeros, group_size)
    require_scale("scales", scale, signed=True, codes_are_zero=all_zero)
    return IntAffineWeight.from_codes(codes, bits, scale, middle if symmetric else zeros, group_size)


def padded_groups(groups: int, group_size: int) -> int:
    """Groups that the two GEMV layouts store: their zero points fill words, and the words fill a vector load.

    For group sizes of 64 and 32 the number of words is a multiple of 2 and 4.
    """
    multiple = {64: 2, 32: 4}.get(group_size, 1)
    words = -(-groups // PER_WORD)
    return PER_WORD * multiple * -(-words // multiple)


def without_padding(name: str, values: Tensor, groups: int, group_size: int) -> Tensor:
    """Columns [0, groups) of values [N, padded groups]; the padding is zero.

    Raises:
        BadValueError: padding that is not zero, or a last group without a single scale: the group size is wrong.
    """
    spare = values[:, groups:]
    if bool((spare != 0).any()):
        found = f"{int((spare != 0).sum())} values beyond the {groups} groups that group_size = {group_size} gives"
        raise BadValueError(name, found, "zeros there", "correct group_size in the configuration, or write the file again")
    if name == "scales" and groups > 1 and not bool((values[:, groups - 1] != 0).any()):
        found = f"no scale in the last of the {groups} groups that group_size = {group_size} gives"
        raise BadValueError(name, found, "scales in every group", "correct group_size in the configuration, or write the file again")
    return values[:, :groups].contiguous()


@dataclass(frozen=True, slots=True)
class GemvScheme(GroupedScheme):
    """W[n, k] = (code - zero) * scale, group g = k // group_size.

    Tensors:
        qweight: int32 [N, K / 8], low nibble first along K.
        qzeros:  int32 [N, P / 8], low nibble first along groups; P = padded_groups.
        scales:  float [N, P]; columns beyond G are zero.
    """

    symmetric: bool = False
    activation: ActivationSpec = NO_ACTIVATION

    @property
    def zero(self) -> str:
        return "constant" if self.symmetric else "integer"

    def tensors(self) -> tuple[TensorRule, ...]:
        n, k = self.shape
        padded = padded_groups(self.groups, self.group_size)
        return (
            TensorRule("qweight", ("I32",), ((n, -(-k // PER_WORD)),)),
            TensorRule("qzeros", ("I32",), ((n, padded // PER_WORD),)),
            TensorRule("scales", FLOAT_CODES, ((n, padded),)),
        )

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        codes = unpack_dense(words_as_bytes(tensors["qweight"]), BITS, self.shape[1])
        stored_zeros = unpack_dense(words_as_bytes(tensors["qzeros"]), BITS, PER_WORD * tensors["qzeros"].shape[1])
        require_finite("scales", tensors["scales"])
        zeros = without_padding("qzeros", stored_zeros, self.groups, self.group_size).to(torch.int16)
        if bool((tensors["scales"] != 0).any()):  # otherwise affine_weight says so
            scale = without_padding("scales", tensors["scales"], self.groups, self.group_size)
        else:
            scale = tensors["scales"][:, : self.groups].contiguous()
        return affine_weight(codes, scale, zeros, self.group_size, self.symmetric)


@dataclass(frozen=True, slots=True)
class GemvFastScheme(GroupedScheme):
    """W[n, k] = code * scale + qzero, group g = k // group_size; the stored qzero is -(zero * scale), rounded.

    The canonical zero point is the float32 -qzero / scale, so that (code - zero) * scale is the same to float32 rounding.

    Tensors:
        qweight: int16 [N / 4, K]; see unpack_fast_codes.
        qzeros:  float [P, N]; P = padded_groups.
        scales:  float [P, N]; rows beyond G are zero in both.
    """

    activation: ActivationSpec = NO_ACTIVATION

    @property
    def zero(self) -> str:
        return "float"

    def tensors(self) -> tuple[TensorRule, ...]:
        n, k = self.shape
        padded = padded_groups(self.groups, self.group_size)
        return (
            TensorRule("qweight", ("I16",), ((n // 4, k),)),
            TensorRule("qzeros", FLOAT_CODES, ((padded, n),)),
            TensorRule("scales", FLOAT_CODES, ((padded, n),)),
        )

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        codes = unpack_fast_codes(tensors["qweight"])
        stored = tensors["scales"]
        require_scale("scales", stored, signed=True)
        require_finite("qzeros", tensors["qzeros"])
        scale = without_padding("scales", stored.t(), self.groups, self.group_size)
        offset = without_padding("qzeros", tensors["qzeros"].t(), self.groups, self.group_size)
        lost = (scale == 0) & (offset != 0)
        if bool(lost.any()):
            raise BadValueError("qzeros", f"{int(lost.sum())} offsets in groups whose scale is zero", "no offset without a scale", _REWRITE)
        ratio = -offset.double() / torch.where(scale == 0, torch.ones_like(scale), scale).double()
        return IntAffineWeight.from_codes(codes, BITS, scale, ratio.float(), self.group_size)


def unpack_fast_codes(packed: Tensor) -> Tensor:
    """Codes uint8 [N, K] of int16 [N / 4, K].

    Four rows by 64 columns, listed row by row, fill 64 int16 (low nibble first).  Inside a row each run of 8 columns is
    in even-odd order, after each run of 32 was written as the transpose of its 4 x 4 column pairs.
    """
    rows, columns = packed.shape
    nibbles = unpack_dense(packed.contiguous().view(torch.uint8), BITS, 4 * columns)
    listed = nibbles.view(rows, columns // 64, 4, 64).permute(0, 2, 1, 3).reshape(4 * rows, columns)
    runs = deinterleave_even_odd(listed).view(4 * rows, columns // 32, 4, 4, 2)
    return runs.transpose(2, 3).reshape(4 * rows, columns)
