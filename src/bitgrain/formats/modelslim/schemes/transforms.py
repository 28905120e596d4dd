"""Modules whose input is scaled or rotated first, or whose product gets a low-rank correction, around any other scheme.

    x' = x * div.mul_scale                                   the weight then stands under `linear.`
    x viewed [a, b]: x' = left_trans^T x right_trans          a * b = K; a missing factor is the identity
    x viewed [heads, K / heads]: x' = heads_rotation^T x
    x viewed [m, n]: x' = kronecker_rotation_m^T x kronecker_rotation_n
    y = x' W^T + svd_lowrank_l2 (svd_lowrank_l1 x')
`clip_ratio` [1] multiplies the range of x' before it is quantized.  It is stored ready to use: what training passed through a
sigmoid has passed through it.
Source: formats specification, part 2, section 2.4; msmodelslim 26.1.0 ir/quarot, flatquant, svd_residual (formulas).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import BadValueError, BitgrainError, ManyProblemsError
from bitgrain.formats.base import Scheme, TensorRule, scalar_shapes
from bitgrain.formats.value_checks import require_finite, require_scale, static_value
from bitgrain.weights import ActivationSpec, ChannelScale, Kronecker, LowRank, Transform, Transformed, Weight, WeightSpec

MUL_SCALE, CLIP, DOWN, UP = "div.mul_scale", "clip_ratio", "svd_lowrank_l1", "svd_lowrank_l2"
# (left factor, right factor) of each kind of rotation, in the order of application.
ROTATIONS = (("left_trans", "right_trans"), ("heads_rotation", ""), ("kronecker_rotation_m", "kronecker_rotation_n"))
LINEAR = "linear."

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Rotation:
    """Two factors of a rotation; an empty name stands for the identity.

    Args:
        sizes: (a, b), a * b = K.
    """

    left: str
    right: str
    sizes: tuple[int, int]

    def rules(self) -> list[TensorRule]:
        named = ((self.left, self.sizes[0]), (self.right, self.sizes[1]))
        return [TensorRule(name, FLOAT_CODES, ((size, size),)) for name, size in named if name]

    def build(self, tensors: Mapping[str, Tensor]) -> Kronecker:
        factors = [_factor(name, tensors[name]) if name else None for name in (self.left, self.right)]
        return Kronecker(factors[0], factors[1], self.sizes)


@dataclass(frozen=True, slots=True)
class TransformedScheme(Scheme):
    """`inner` with what stands before or beside it.

    Args:
        inner:     the scheme of the weight; its activation is that of the transformed input.
        prefix:    what stands before the inner scheme's local names: "" or LINEAR.
        smoothed:  div.mul_scale is there.
        rotations: in order.
        rank:      of the low-rank correction; 0 if there is none.
    """

    inner: Scheme
    prefix: str = ""
    smoothed: bool = False
    rotations: tuple[Rotation, ...] = ()
    rank: int = 0

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.inner.shape

    @property
    def activation(self) -> ActivationSpec:  # type: ignore[override]
        return self.inner.activation

    @property
    def weight_spec(self) -> WeightSpec:
        return self.inner.weight_spec

    @property
    def transforms_input(self) -> bool:
        return self.smoothed or bool(self.rotations) or self.rank > 0

    @property
    def holds_bias(self) -> bool:
        return self.inner.holds_bias

    def bias_rule(self) -> TensorRule:
        rule = self.inner.bias_rule()
        return replace(rule, name=self.prefix + rule.name)

    def tensors(self) -> tuple[TensorRule, ...]:
        n, k = self.shape
        rules = [replace(rule, name=self.prefix + rule.name) for rule in self.inner.tensors()]
        if self.smoothed:
            rules.append(TensorRule(MUL_SCALE, FLOAT_CODES, ((k,),)))
        rules += [rule for rotation in self.rotations for rule in rotation.rules()]
        if self.rank:
            rules += [TensorRule(self.prefix + DOWN, FLOAT_CODES, ((self.rank, k),)), TensorRule(self.prefix + UP, FLOAT_CODES, ((n, self.rank),))]
        if self.activation.clipped:
            rules.append(TensorRule(CLIP, FLOAT_CODES, scalar_shapes()))
        return tuple(rules)

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        inner = self._ask(self.inner.to_weight, tensors)
        inputs: list[Transform] = []
        if self.smoothed:
            scale = require_scale(MUL_SCALE, tensors[MUL_SCALE])
            if bool((scale == 0).any()):
                raise BadValueError(MUL_SCALE, f"{int((scale == 0).sum())} zeros", "factors above zero", "the file is damaged; fetch or write it again")
            inputs.append(ChannelScale(scale.float().contiguous()))
        inputs += [rotation.build(tensors) for rotation in self.rotations]
        low_rank = None
        if self.rank:
            down, up = (require_finite(self.prefix + name, tensors[self.prefix + name]) for name in (DOWN, UP))
            low_rank = LowRank(down.contiguous(), up.contiguous())
        return Transformed(inner, tuple(inputs), low_rank) if self.transforms_input else inner

    def to_bias(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        return self._ask(self.inner.to_bias, tensors)

    def to_activation(self, tensors: Mapping[str, Tensor]) -> ActivationSpec:
        activation = self._ask(self.inner.to_activation, tensors)
        if not activation.clipped:
            return activation
        clip = static_value(CLIP, tensors[CLIP])
        if not 0 < clip <= 1:
            raise BadValueError(CLIP, f"the value {clip!r}", "a ratio above 0 and up to 1", "the file is damaged; fetch or write it again")
        return replace(activation, clip=clip)

    def _ask(self, question: Callable[[Mapping[str, Tensor]], Answer], tensors: Mapping[str, Tensor]) -> Answer:
        """What the inner scheme answers to its own tensors; a problem names them as they are stored."""
        own = {name.removeprefix(self.prefix): tensor for name, tensor in tensors.items() if name.startswith(self.prefix)}
        try:
            return question(own)
        except ManyProblemsError:
            raise
        except BitgrainError as problem:
            raise problem.moved_to(self.prefix + problem.where) from None


def _factor(name: str, stored: Tensor) -> Tensor:
    """float32 of a rotation's factor; BadValueError if it maps something to nothing at a glance."""
    values = require_finite(name, stored).float().contiguous()
    if not bool(values.any(0).all()) or not bool(values.any(1).all()):
        raise BadValueError(name, "a row or column of zeros", "a matrix that can be inverted", "the file is damaged; fetch or write it again")
    return values
