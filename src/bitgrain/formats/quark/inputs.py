"""Static values of a module's input: which tensors hold them, and what they make of the activation specification."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from bitgrain.formats.base import TensorRule, scalar_shapes
from bitgrain.formats.stored_scales import filled_activation, static_input_rules
from bitgrain.weights import ActivationSpec

SECOND_SCALE = "input_scale_2"
_ZERO = "input_zero_point"


def input_rules(activation: ActivationSpec, unsigned: bool = False) -> tuple[TensorRule, ...]:
    """`input_scale` and `input_zero_point` of a static input; nothing for a dynamic one.

    Args:
        unsigned: the zero point belongs to unsigned codes.
    """
    rules = static_input_rules(activation)
    if not unsigned:
        return rules
    return tuple(TensorRule(_ZERO, ("U8", "I32"), scalar_shapes()) if rule.name == _ZERO else rule for rule in rules)


def filled_input(activation: ActivationSpec, tensors: Mapping[str, Tensor], unsigned: bool = False) -> ActivationSpec:
    """The activation specification with its stored values; see stored_scales.filled_activation.

    Args:
        unsigned: the stored zero point belongs to unsigned codes; ActivationSpec's is 2^(bits-1) below it.
    """
    held = dict(tensors)
    if unsigned and _ZERO in held:
        held[_ZERO] = held[_ZERO].int() - (1 << (activation.bits - 1))
    return filled_activation(activation, held)
