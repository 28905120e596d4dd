"""Integer codes with float scales and zero points in groups along either dimension; scales may be quantized themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES, TORCH_DTYPES
from bitgrain.formats.base import Scheme, TensorRule, scalar_shapes
from bitgrain.formats.grouped import int_affine_spec
from bitgrain.formats.hqq.descriptors import ALWAYS, NESTED, descriptor_rules
from bitgrain.formats.hqq.layout import Layout
from bitgrain.formats.value_checks import require_finite, require_scale
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, IntAffineWeight, Weight, WeightSpec


@dataclass(frozen=True, slots=True)
class Part:
    """How scales or zero points are stored.

    Args:
        dtype:  of the plain float tensor, as safetensors spells it; "" where it is quantized.
        layout: of the quantized tensor; None where it is plain.
        codes:  element type of the quantized tensor.
    """

    dtype: str = "F32"
    layout: Layout | None = None


@dataclass(frozen=True, slots=True)
class HqqScheme(Scheme):
    """W = (code - zero) * scale, in the grid of the layout; see formats.hqq.layout.

    W_q          packed words, perhaps viewed as a float type
    scale, zero  float, one per group; or both in zero_scale [2, ...], zero first
    scale_q      packed words of a quantized scale, described by meta_scale.*; zero_q and meta_zero.* alike

    Args:
        layout:   of the codes.
        words:    element type of W_q: that of the layout's words, or a float type whose bytes they are.
        scale, zero: how they are stored.
        stacked:  scale and zero are in one tensor, zero_scale.
        required: descriptors that must be there.
    """

    layout: Layout
    words: str
    scale: Part = Part()
    zero: Part = Part()
    stacked: bool = False
    required: frozenset[str] = ALWAYS
    activation: ActivationSpec = NO_ACTIVATION

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.layout.shape

    @property
    def weight_spec(self) -> WeightSpec:
        layout, (n, k) = self.layout, self.shape
        spec = int_affine_spec(layout.bits, k, layout.columns_per_group, "float", self.scale.dtype or "F32")
        if layout.groups == 1:
            return replace(spec, granularity="tensor" if n > 1 else "channel")
        return replace(spec, row_index=self._indexed)

    @property
    def _indexed(self) -> bool:
        """Rows repeat the scales of others."""
        return self.layout.groups > 1 and self.layout.axis == 0 and self.layout.period < self.shape[0]

    def tensors(self) -> tuple[TensorRule, ...]:
        rules = [_words_rule("W_q", self.layout, self.words), *descriptor_rules(self.required)]
        if self.stacked:
            kinds = FLOAT_CODES if self.scale.layout is None else ("U8",)
            inner = self.layout.scale_shape if self.scale.layout is None else self.scale.layout.packed_shape
            rules.append(TensorRule("zero_scale", kinds, ((2, *inner),)))
        for name, part in (("scale", self.scale), ("zero", self.zero)):
            if part.layout is not None:
                rules += _nested_rules(name, part.layout, self.stacked)
            elif not self.stacked:
                rules.append(TensorRule(name, FLOAT_CODES, _value_shapes(self.layout)))
        return tuple(rules)

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        """IntAffineWeight with a float32 zero point per scale; see Scheme.to_weight."""
        layout = self.layout
        zero, scale = self._values("zero", tensors), self._values("scale", tensors)
        # a search over scales in the writer may end below zero
        require_scale(self._name("scale"), scale, signed=True)
        require_finite(self._name("zero"), zero)
        codes = layout.codes("W_q", tensors["W_q"]).reshape(self.shape)
        index = (torch.arange(self.shape[0]) % layout.period).to(torch.int32) if self._indexed else None
        return IntAffineWeight.from_codes(codes, layout.bits, layout.spread(scale), layout.spread(zero.float()), layout.columns_per_group, row_index=index)

    def _name(self, value: str) -> str:
        """The tensor that holds `scale` or `zero`."""
        part = self.scale if value == "scale" else self.zero
        return "zero_scale" if self.stacked else value if part.layout is None else f"{value}_q"

    def _values(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """`scale` or `zero`, one per group, as stored or decoded to float32."""
        part, place = (self.scale if name == "scale" else self.zero), self._name(name)
        stored = tensors[place][int(name == "scale")] if self.stacked else tensors[place]
        if part.layout is None:
            return stored
        inner = f"meta_{name}."
        codes = part.layout.codes(place, stored).float()
        step = require_scale(f"{inner}scale", tensors[f"{inner}scale"], signed=True).float()
        return (codes - require_finite(f"{inner}zero", tensors[f"{inner}zero"]).float()) * step


def _value_shapes(layout: Layout) -> tuple[tuple[int, ...], ...]:
    return scalar_shapes() if not layout.group_size else (layout.scale_shape,)


def _words_rule(name: str, layout: Layout, words: str) -> TensorRule:
    rows, columns = layout.packed_shape
    width, item = TORCH_DTYPES[layout.word_code].itemsize, TORCH_DTYPES[words].itemsize
    return TensorRule(name, (words,), ((rows, columns * width // item),))


def _nested_rules(name: str, layout: Layout, stacked: bool) -> list[TensorRule]:
    """The tensors of a quantized scale or zero point."""
    inner = f"meta_{name}."
    rules = [] if stacked else [_words_rule(f"{name}_q", layout, layout.word_code)]
    rules += [TensorRule(f"{inner}{value}", FLOAT_CODES, _value_shapes(layout)) for value in ("scale", "zero")]
    return rules + descriptor_rules(ALWAYS, inner, NESTED)
