"""What the tensors of one module mean.  Source: AutoGPTQ 0.7.1 and GPTQModel 7.7.0, their packers (formats specification, section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import BadValueError, LabelMismatchError
from bitgrain.formats.base import ModuleView, Scheme, TensorRule
from bitgrain.formats.gptq.zero_points import check_symmetric, read_zero_points
from bitgrain.formats.grouped import int_affine_spec
from bitgrain.formats.value_checks import require_scale
from bitgrain.formats.word_packed import matrix_sizes, scale_dtype_of
from bitgrain.numerics.bitpack import dense_bytes, pack_dense, unpack_planar, words_as_bytes
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, IntAffineWeight, Weight, WeightSpec

# Element types of the words that hold codes and zero points, with their bits.
WORD_BITS = {"I8": 8, "I16": 16, "I32": 32, "I64": 64}


@dataclass(frozen=True, slots=True)
class GptqSettings:
    """What a configuration says of one module.

    Args:
        bits:       2 to 8.
        group_size: -1 for one group per row.
        symmetric:  the configuration promises zero points of 2**(bits-1); checked.
        reordered:  activation order: g_idx is needed and may be anything in range; else it may be absent, and is k // group_size.
        planar:     the codes' streams are planar; else dense.
        minus_one:  the zero point is stored minus one.
        word:       element type of the words.
        label:      the checkpoint_format, for messages.
    """

    bits: int
    group_size: int
    symmetric: bool
    reordered: bool
    planar: bool = False
    minus_one: bool = True
    word: str = "I32"
    label: str = "gptq"


@dataclass(frozen=True, slots=True)
class GptqScheme(Scheme):
    """W[n, k] = (code[k, n] - zero[g(k), n]) * scale[g(k), n], g(k) = g_idx[k] or k // group_size.

    Tensors (32-bit words; other words hold the same little-endian bytes):
        qweight: int32 [ceil(K * bits / 32), N], a stream of codes down each column.
        qzeros:  int32 [G, ceil(N * bits / 32)], a stream of zero points along each row.
        scales:  float [G, N], G = ceil(K / group_size).
        g_idx:   int32 [K], the group of each column; in any order.  Optional unless columns were reordered.

    Args:
        settings: group_size already resolved to 1 to K.
    """

    shape: tuple[int, int]
    settings: GptqSettings
    scale_dtype: str
    activation: ActivationSpec = NO_ACTIVATION

    @property
    def groups(self) -> int:
        return -(-self.shape[1] // self.settings.group_size)

    @property
    def reordered(self) -> bool:
        """Activation order that can matter: one group needs no index."""
        return self.settings.reordered and self.groups > 1

    @property
    def weight_spec(self) -> WeightSpec:
        """As the headers promise it.  A module whose stored order turns out to be plain becomes a plain, simpler weight."""
        s = self.settings
        zero = "constant" if s.symmetric else "integer"
        return int_affine_spec(s.bits, self.shape[1], s.group_size, zero, self.scale_dtype, self.reordered)

    def tensors(self) -> tuple[TensorRule, ...]:
        n, k = self.shape
        s = self.settings
        return (
            TensorRule("qweight", (s.word,), ((self._words(k), n),)),
            TensorRule("qzeros", (s.word,), ((self.groups, self._words(n)),)),
            TensorRule("scales", FLOAT_CODES, ((self.groups, n),)),
            TensorRule("g_idx", ("I32", "I64"), ((k,),), required=self.reordered),
        )

    def _words(self, count: int) -> int:
        return packed_words(count, self.settings)

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        s = self.settings
        n = self.shape[0]
        zeros = read_zero_points(tensors["qzeros"], s.bits, n, minus_one=s.minus_one, planar=s.planar)
        if s.symmetric:
            check_symmetric(zeros, s.bits, s.label)
        index = self._group_index(tensors.get("g_idx"))
        packed = self._packed_rows(tensors["qweight"])
        scale = tensors["scales"].t().contiguous()
        zero: int | Tensor = 1 << (s.bits - 1) if s.symmetric else zeros
        weight = IntAffineWeight(packed, s.bits, self.shape[1], scale, zero, s.group_size, index)
        require_scale("scales", tensors["scales"], signed=True, codes_are_zero=_needs_no_scale(weight))
        return weight

    def _packed_rows(self, words: Tensor) -> Tensor:
        """uint8 [N, ceil(K * bits / 8)], a dense stream per row, of words [W, N]."""
        s = self.settings
        k = self.shape[1]
        rows = words.t().contiguous()
        if s.planar:
            return pack_dense(unpack_planar(rows, s.bits, k), s.bits)
        return words_as_bytes(rows)[:, : dense_bytes(k, s.bits)].contiguous()

    def _group_index(self, stored: Tensor | None) -> Tensor | None:
        """int32 [K], or None where g(k) = k // group_size.

        Raises:
            BadValueError: groups out of range, or all 0 although there are several (what a broken conversion leaves).
            LabelMismatchError: reordered columns in a checkpoint that is called plain.
        """
        if stored is None:
            return None
        groups, k = self.groups, self.shape[1]
        low, high = int(stored.min()), int(stored.max())
        if low < 0 or high >= groups:
            raise BadValueError("g_idx", f"groups {low} to {high}", f"0 to {groups - 1}", "the file is damaged; fetch or write it again")
        plain = torch.div(torch.arange(k, device=stored.device), self.settings.group_size, rounding_mode="floor")
        if torch.equal(stored.to(torch.int64), plain):
            return None
        if high == 0:
            raise BadValueError(
                "g_idx",
                f"all 0, though there are {groups} groups",
                "the group of each column",
                "a broken conversion wrote it; if columns were not reordered, remove the g_idx tensors, which then may be absent",
            )
        if not self.reordered:
            raise LabelMismatchError(
                "g_idx",
                f"columns in an order other than k // {self.settings.group_size}, though desc_act is false or static_groups is true",
                "desc_act and static_groups that agree with g_idx",
                "set desc_act to true and static_groups to false, so that the stored order is used",
            )
        return stored.to(torch.int32).contiguous()


def packed_words(count: int, settings: GptqSettings) -> int:
    """Words that hold `count` codes."""
    if settings.planar:
        return -(-count // 32) * settings.bits
    return -(-count * settings.bits // WORD_BITS[settings.word])


def _needs_no_scale(weight: IntAffineWeight) -> bool:
    """Whether every scale is zero and every code equals its zero point: a matrix of zeros."""
    if bool((weight.scale != 0).any()):
        return False
    ones = IntAffineWeight(
        weight.packed, weight.bits, weight.in_features, torch.ones_like(weight.scale), weight.zero, weight.group_size, weight.group_index
    )
    return not bool(ones.dequantize().any())


def gptq_scheme(module: ModuleView, settings: GptqSettings) -> GptqScheme:
    """The scheme of a module, sized by the architecture or else by its tensors.

    Args:
        settings: group_size may be -1.
    """
    shape = module.shape or _derived_shape(module, settings)
    size = shape[1] if settings.group_size == -1 else min(settings.group_size, shape[1])
    return GptqScheme(shape, replace(settings, group_size=max(1, size)), scale_dtype_of(module, "scales"))


def _derived_shape(module: ModuleView, settings: GptqSettings) -> tuple[int, int]:
    """(N, K): N from the scales, K from the rows of qweight; where those leave K open, from g_idx."""
    weight, scales = matrix_sizes(module, "qweight"), matrix_sizes(module, "scales")
    n = scales[1] if scales else weight[1] if weight else 0
    index = module.tensors.get("g_idx")
    indexed = index.shape[0] if index is not None and len(index.shape) == 1 else 0
    if weight is None:
        return (n, indexed)
    bits_held = weight[0] * WORD_BITS[settings.word]
    exact = bits_held % settings.bits == 0
    if not exact and indexed and packed_words(indexed, settings) == weight[0]:
        return (n, indexed)
    return (n, bits_held // settings.bits)
