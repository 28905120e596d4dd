"""The modules of an empty model of the library as the slots of a plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.checkpoint.files import CheckpointFiles
from bitgrain.errors import BitgrainError
from bitgrain.formats.base import ModuleKind
from bitgrain.formats.expert_stacks import ExpertStack
from bitgrain.formats.slots import ModelSlots, ModuleSlot
from bitgrain.hosts.transformers.experts import StackedExperts, gate_of, stacked_experts
from bitgrain.hosts.transformers.library import library_module, refused
from bitgrain.hosts.transformers.names import MERGED, ExpertNames, StoredNames, stored_names


@dataclass(slots=True)
class Layout:
    """Where each part of a model is in the checkpoint; keys are the model's own names, values those of the plan.

    Args:
        slots:      what the plan must have.
        linears:    linear layers, the output head included.
        embeddings: embeddings.
        matrices:   other modules with a `weight` [N, K] (and perhaps a `bias`), which they multiply with themselves.
        tensors:    every other parameter and stored buffer.
        experts:    modules of stacked experts that are run one by one.
        attention:  modules under which scales of a KV cache are stored.
        head:       (output head, the embedding whose weight it shares), where it does.
        problem:    what of it cannot be run.
    """

    slots: ModelSlots
    linears: dict[str, str] = field(default_factory=dict)
    embeddings: dict[str, str] = field(default_factory=dict)
    matrices: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    experts: dict[str, ExpertNames] = field(default_factory=dict)
    attention: tuple[str, ...] = ()
    head: tuple[str, str] | None = None
    problem: BitgrainError | None = None


def read_layout(model: Any, files: CheckpointFiles, architecture: str) -> Layout:
    """The layout of an empty model for a checkpoint, from its headers.

    Raises:
        UnsupportedArchitectureError: a part of the model cannot be filled from a checkpoint.
    """
    return _Reader(model, files, architecture).read()


class _Reader:
    def __init__(self, model: Any, files: CheckpointFiles, architecture: str) -> None:
        self.model, self.architecture = model, architecture
        self.modules = dict(model.named_modules())
        self.stacks = {name: stack for name, module in self.modules.items() if (stack := stacked_experts(module)) is not None and name.endswith("experts")}
        self.names: StoredNames = stored_names(model, files.tensors, self.stacks, architecture)
        self.head = self._name_of(model.get_output_embeddings())
        self.layout = Layout(ModelSlots(()))
        self.slots: list[ModuleSlot] = []
        self.groups: list[tuple[str, ...]] = []
        self.stack: ExpertStack | None = None
        self.join = ""

    def _name_of(self, wanted: Any) -> str:
        return next((name for name, module in self.modules.items() if module is wanted), "")

    def read(self) -> Layout:
        self._check_ties()
        conv = library_module("pytorch_utils").Conv1D
        for name, module in self.modules.items():
            if isinstance(module, nn.Embedding):
                self._embedding(name, module)
            elif isinstance(module, nn.Linear):
                self._linear(name, (module.out_features, module.in_features), module.bias is not None)
            elif type(module) is conv:
                self._linear(name, (module.nf, module.nx), True, transposed=True)
            elif name in self.stacks and (name in self.names.experts or name in self.names.stacked):
                self._experts(name, self.stacks[name])
            elif name:
                self._own(name, module)
        self._own("", self.model)
        attention = tuple(self._stored_module(name) for name in self._attention())
        self.layout.slots = ModelSlots(tuple(self.slots), tuple(self.groups), attention, self.stack, join=self.join, unread=self.names.unread)
        self.layout.attention = attention
        return self.layout

    def _stored_module(self, name: str) -> str:
        """What the checkpoint calls a module; its own name where nothing of it is stored."""
        if name in self.names.modules:
            return self.names.modules[name]
        inside = [child for child in self.modules if child.startswith(f"{name}.") and child in self.names.modules] if name else []
        for child in inside:
            rest = child[len(name) :]
            if self.names.modules[child].endswith(rest):
                return self.names.modules[child][: -len(rest)]
        return name

    def _check_ties(self) -> None:
        """Only an output head may share a weight, and only with an embedding."""
        for target, source in self.model.all_tied_weights_keys.items():
            ends = [name.rpartition(".") for name in (target, source)]
            modules = [self.modules.get(end[0]) for end in ends]
            if isinstance(modules[0], nn.Embedding):
                ends, modules = ends[::-1], modules[::-1]
            plain = isinstance(modules[0], nn.Linear) and isinstance(modules[1], nn.Embedding) and all(end[2] == "weight" for end in ends)
            if not plain or ends[0][0] != self.head or (isinstance(modules[0], nn.Linear) and modules[0].bias is not None):
                self.layout.problem = refused(self.architecture, f"{target} shares its memory with {source}", "a shared weight of the output head and an embedding only, without a bias")
                continue
            self.layout.head = (ends[0][0], ends[1][0])

    def _embedding(self, name: str, module: nn.Embedding) -> None:
        stored = self._stored_module(name)
        self.slots.append(ModuleSlot(stored, ModuleKind.EMBEDDING, (module.num_embeddings, module.embedding_dim)))
        self.layout.embeddings[name] = stored
        self._own(name, module, ("weight",))

    def _linear(self, name: str, shape: tuple[int, int], biased: bool, transposed: bool = False) -> None:
        stored = self._stored_module(name)
        kind = ModuleKind.LM_HEAD if name == self.head else ModuleKind.LINEAR
        tied_to = self._stored_module(self.layout.head[1]) if self.layout.head and self.layout.head[0] == name else None
        self.slots.append(ModuleSlot(stored, kind, shape, "required" if biased else "optional", tied_to, transposed=transposed))
        self.layout.linears[name] = stored
        self._own(name, self.modules[name], ("weight", "bias"))

    def _own(self, name: str, module: nn.Module, handled: tuple[str, ...] = ()) -> None:
        """Slots of a module's own parameters and stored buffers."""
        own: dict[str, Tensor] = {local: p for local, p in module._parameters.items() if p is not None and local not in handled}
        own |= {local: b for local, b in module._buffers.items() if b is not None and local not in module._non_persistent_buffers_set}
        weight, bias = own.get("weight"), own.get("bias")
        if weight is not None and weight.dim() == 2 and weight.is_floating_point() and name and (bias is None or tuple(bias.shape) == (weight.shape[0],)):
            stored = self._stored_module(name)
            self.slots.append(ModuleSlot(stored, ModuleKind.LINEAR, tuple(weight.shape), "optional" if bias is None else "required"))
            self.layout.matrices[name] = stored
            own = {local: p for local, p in own.items() if local not in ("weight", "bias")}
        for local, tensor in own.items():
            full = f"{name}.{local}" if name else local
            if not tensor.is_floating_point():
                raise refused(self.architecture, f"{full} holds {str(tensor.dtype).removeprefix('torch.')}", "parameters and stored buffers of floating-point numbers")
            stored = self.names.tensors.get(full) or self._stored_name(name, local)
            self.slots.append(ModuleSlot(stored, ModuleKind.VECTOR, tuple(tensor.shape), bare=True))
            self.layout.tensors[full] = stored

    def _stored_name(self, module: str, local: str) -> str:
        prefix = self._stored_module(module) if module else ""
        return f"{prefix}.{local}" if prefix else local

    def _experts(self, name: str, stack: StackedExperts) -> None:
        """Slots of each expert's projections, stored one by one or stacked."""
        found = self.names.experts.get(name)
        if found is None:
            found = ExpertNames(self._stored_module(name), {own: own for merged in MERGED.values() for own in merged})
        for merged in MERGED.values():
            for own in merged:
                found.leaves.setdefault(own, own)
        shared = ExpertStack(stack.count, stack.hidden, stack.size, stack.transposed, stack.interleaved, stack.biased)
        join = gate_of(self.modules[name]).describe()
        if self.stack not in (None, shared) or self.join not in ("", join):
            raise refused(self.architecture, f"{name} has {stack.count} experts of {stack.size}, {join}, and other layers have others", "experts of one kind in all layers")
        self.stack, self.join = shared, join
        bias = "required" if stack.biased else "optional"
        for expert in range(stack.count):
            gate, up, down = (found.module(expert, own) for own in ("gate_proj", "up_proj", "down_proj"))
            self.slots += [ModuleSlot(part, ModuleKind.EXPERT, (stack.size, stack.hidden), bias) for part in (gate, up)]
            self.slots.append(ModuleSlot(down, ModuleKind.EXPERT, (stack.hidden, stack.size), bias))
            self.groups.append((gate, up))
        self.layout.experts[name] = found

    def _attention(self) -> list[str]:
        """Modules that compute attention: by their class, and a linear layer of their own."""
        conv = library_module("pytorch_utils").Conv1D
        return [
            name for name, module in self.modules.items()
            if "Attention" in type(module).__name__ and any(isinstance(child, (nn.Linear, conv)) for child in module.children())
        ]  # fmt: skip


def parameter_dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Every parameter to the type in which the library holds it when activations are `dtype`."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return dict.fromkeys(model.state_dict(), dtype)
    wide, _, names = library_module("core_model_loading").build_glob_alternation(list(plan))
    kept = {}
    for name in model.state_dict():
        found = wide.search(name)
        kept[name] = plan[names[found.lastgroup]] if found else dtype
    return kept
