"""What an architecture needs of a checkpoint: its modules, before any file is looked at."""

from __future__ import annotations

from dataclasses import dataclass

from bitgrain.formats.base import ModuleKind
from bitgrain.formats.expert_stacks import ExpertStack


@dataclass(frozen=True, slots=True)
class ModuleSlot:
    """One module that the checkpoint must have.

    Args:
        shape:   (N, K) of a matrix, (size,) of a vector.
        bias:    "required": the module computes with a bias and the checkpoint must store it; "optional": a stored one is applied.
        tied_to: module whose weight stands in when this one stores none.
        bare:    a vector whose name is the tensor's own, with no ".weight" behind it.
    """

    name: str
    kind: ModuleKind
    shape: tuple[int, ...]
    bias: str = "optional"
    tied_to: str | None = None
    bare: bool = False


@dataclass(frozen=True, slots=True)
class ModelSlots:
    """Every module of an architecture under one configuration.

    Args:
        modules:           in the order in which the model is built.
        fusion_groups:     names of modules that share an input and may become one matrix.
        attention_modules: modules under whose names the scales of the KV cache are stored.
        experts:           how experts lie where they are stored together; None if there are none.
    """

    modules: tuple[ModuleSlot, ...]
    fusion_groups: tuple[tuple[str, ...], ...] = ()
    attention_modules: tuple[str, ...] = ()
    experts: ExpertStack | None = None

    @property
    def tied(self) -> dict[str, str]:
        """Module to the module whose weight it shares."""
        return {slot.name: slot.tied_to for slot in self.modules if slot.tied_to is not None}
