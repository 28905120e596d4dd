"""Examples of what a format can hold, taken from the schemes themselves, for the support matrix."""

from __future__ import annotations

from bitgrain.formats.base import Scheme
from bitgrain.weights import ActivationSpec, WeightSpec

# A multiple of every usual group, block and tile.
SHAPE = (512, 512)


def examples_of(*schemes: Scheme) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
    """(label, weight, activation) of each scheme; see QuantConfig.examples.  Schemes that mean the same are one example."""
    return tuple({scheme.label: (scheme.label, scheme.weight_spec, scheme.activation) for scheme in schemes}.values())
