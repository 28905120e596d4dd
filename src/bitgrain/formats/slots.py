"""What an architecture needs of a checkpoint: its modules, before any file is looked at."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from bitgrain.formats.base import ModuleKind
from bitgrain.formats.expert_stacks import ExpertStack

# The rule under which the plan leaves out what a multimodal checkpoint holds beside its text model.
TEXT_ONLY = "not a part of the text model, which alone is run"
# The rule under which it leaves out layers behind the last one that is run.
FURTHER = "predicts tokens after the next one, which is not run"


@dataclass(frozen=True, slots=True)
class ModuleSlot:
    """One module that the checkpoint must have.

    Args:
        shape:   (N, K) of a matrix, (size,) of a vector.
        bias:    "required": the module computes with a bias and the checkpoint must store it; "optional": a stored one is applied.
        tied_to: module whose weight stands in when this one stores none.
        heights: N of each module that a joint one stands for, in stored order.
        bare:    a parameter that is no matrix, of any shape, whose name is the tensor's own, with no ".weight" behind it.
        transposed: where its weight is not quantized, it is stored [K, N].
        use:     "": a linear module in the dtype of activations; "float32": one whose input and output are float32; "dense copy": its
                 dequantized weight is kept, and no kernel runs it.
    """

    name: str
    kind: ModuleKind
    shape: tuple[int, ...]
    bias: str = "optional"
    tied_to: str | None = None
    heights: tuple[int, ...] = ()
    bare: bool = False
    transposed: bool = False
    use: str = ""


@dataclass(frozen=True, slots=True)
class ModelSlots:
    """Every module of an architecture under one configuration.

    Args:
        modules:           in the order in which the model is built.
        fusion_groups:     names of modules that share an input and may become one matrix.
        attention_modules: modules under whose names the scales of the KV cache are stored.
        experts:           how experts lie where they are stored together; None if there are none.
        aside:             modules of other parts of a multimodal checkpoint, which the architecture does not run.
        join:              how experts join gate and up, as kernels.base.Join describes it.
        further:           layers that the checkpoint may hold to predict tokens after the next one; the architecture does not run them.
        unread:            tensors that the architecture stores and does not use: full name to the rule.
        notes:             what a reader of the plan should know of how the architecture runs its modules.
    """

    modules: tuple[ModuleSlot, ...]
    fusion_groups: tuple[tuple[str, ...], ...] = ()
    attention_modules: tuple[str, ...] = ()
    experts: ExpertStack | None = None
    aside: tuple[str, ...] = ()
    join: str = ""
    further: tuple[str, ...] = ()
    unread: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def left_out(self, tensors: Collection[str]) -> dict[str, str]:
        """Stored tensors of modules that are set aside, further layers, and those that are not used: full name to the rule."""
        aside, further = (tuple(f"{module}." for module in modules) for modules in (self.aside, self.further))
        found = {name: TEXT_ONLY for name in tensors if name.startswith(aside) or name in self.aside}
        found |= {name: FURTHER for name in tensors if name.startswith(further)}
        return found | {name: rule for name, rule in self.unread.items() if name in tensors}

    @property
    def tied(self) -> dict[str, str]:
        """Module to the module whose weight it shares."""
        return {slot.name: slot.tied_to for slot in self.modules if slot.tied_to is not None}
