"""What a checkpoint calls the modules of an architecture, by the library's own table of renamed and merged weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from bitgrain.formats.expert_stacks import stacked_name
from bitgrain.hosts.transformers.library import library_module, refused

# Projection of stacked experts to the names of an expert's modules, in the order in which they are merged.
MERGED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(slots=True)
class ExpertNames:
    """Where the experts of one layer are in the checkpoint.

    Args:
        parent: what stands before an expert's index.
        leaves: projection ("gate_proj", "up_proj", "down_proj") to what follows the index.
    """

    parent: str
    leaves: dict[str, str] = field(default_factory=dict)

    def module(self, expert: int, projection: str) -> str:
        return f"{self.parent}.{expert}.{self.leaves[projection]}"


@dataclass(slots=True)
class StoredNames:
    """Names in the checkpoint.

    Args:
        modules: module of the architecture to its name in the checkpoint, where any of its tensors is there.
        tensors: parameter or buffer of the architecture to its name in the checkpoint, likewise.
        experts: module of stacked experts to where they are, for those stored one by one.
        stacked: modules of stacked experts that are stored so, under the same name.
        unread:  stored tensors that the library's class leaves unread, to the rule.
    """

    modules: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    experts: dict[str, ExpertNames] = field(default_factory=dict)
    stacked: set[str] = field(default_factory=set)
    unread: dict[str, str] = field(default_factory=dict)


def stored_names(model: Any, tensors: Iterable[str], expert_modules: Iterable[str], architecture: str) -> StoredNames:
    """Find each module of `model` (an empty one) among stored tensor names, quantized ones included.

    A module is looked for by the name that its plain weight would have, so that the table, which knows plain weights
    only, also holds for a packed one.

    Args:
        expert_modules: modules of the architecture that stack experts.
    Raises:
        UnsupportedArchitectureError: two places of the checkpoint are one module's, or the table computes a weight in a way that is
            not implemented.
    """
    return _Search(model, list(tensors), set(expert_modules), architecture).run()


class _Search:
    def __init__(self, model: Any, tensors: list[str], experts: set[str], architecture: str) -> None:
        loading = library_module("core_model_loading")
        table = library_module("conversion_mapping").get_model_conversion_mapping(model)
        self.rename = loading.rename_source_key
        self.converters = [entry for entry in table if isinstance(entry, loading.WeightConverter)]
        self.renamings = [entry for entry in table if not isinstance(entry, loading.WeightConverter)]
        self.targets = dict(model.state_dict())
        self.model, self.tensors, self.experts, self.architecture = model, sorted(tensors), experts, architecture
        self.found = StoredNames()
        self.memo: dict[str, tuple[str, str | None]] = {}

    def run(self) -> StoredNames:
        known: set[str] = set()
        for name in self.tensors:
            if self._place(name):
                known.add(name)
        self._note_unread(known)
        return self.found

    def _target(self, name: str) -> tuple[str, str | None]:
        """(name in the architecture, pattern of the conversion that makes it, or None for a plain renaming)."""
        if name not in self.memo:
            self.memo[name] = self.rename(name, self.renamings, self.converters, self.model.base_model_prefix, self.targets)
        return self.memo[name]

    def _place(self, name: str) -> bool:
        """Enter one stored tensor; False if the architecture has no place for it."""
        target, pattern = self._target(name)
        if stacked_name(name) is not None and self._place_stacked(target):
            return True
        if pattern is None and target in self.targets:
            self._enter(self.found.tensors, target, name)
            self._enter_module(target.rpartition(".")[0], target, name)
            return True
        module = name.rpartition(".")[0]
        # local names of packed weights may hold a dot, such as "weight.absmax"
        return any(self._place_packed(prefix) for prefix in (module, module.rpartition(".")[0]) if prefix)

    def _place_packed(self, prefix: str) -> bool:
        """Enter a module that the checkpoint calls `prefix`, by the name that its plain weight would have."""
        target, pattern = self._target(f"{prefix}.weight")
        if pattern is not None:
            return self._place_expert(prefix, target, pattern)
        if target not in self.targets:
            return False
        self._enter(self.found.modules, target.rpartition(".")[0], prefix)
        return True

    def _enter_module(self, module: str, target: str, name: str) -> None:
        if module and target.endswith(".weight") and name.endswith(".weight"):
            self._enter(self.found.modules, module, name.removesuffix(".weight"))

    def _enter(self, table: dict[str, str], key: str, value: str) -> None:
        if table.setdefault(key, value) != value:
            raise refused(self.architecture, f"{table[key]} and {value} are both what transformers calls {key}", "one place in the checkpoint for each module")

    def _place_expert(self, prefix: str, target: str, pattern: str) -> bool:
        """Enter one projection of one expert, which the library merges into a stack."""
        converter = next(c for c in self.converters if pattern in c.source_patterns)
        module, _, projection = target.rpartition(".")
        operations = [type(operation).__name__ for operation in converter.operations]
        split = re.fullmatch(r"(.+)\.(\d+)\.([^.]+)", prefix)
        merged = MERGED.get(projection, ())
        regular = operations == ["MergeModulelist", "Concatenate"][: len(merged)] and len(converter.source_patterns) == len(merged)
        if module not in self.experts or not split or not regular:
            if target not in self.targets:
                return False
            raise refused(self.architecture, f"{prefix}: transformers makes {target} of it by {', '.join(operations)}", "weights that are renamed, or experts that are merged into a stack")
        names = self.found.experts.setdefault(module, ExpertNames(split[1]))
        own = merged[converter.source_patterns.index(pattern)]
        if names.parent != split[1] or names.leaves.setdefault(own, split[3]) != split[3]:
            raise refused(self.architecture, f"{prefix} and {names.parent}.*.{names.leaves.get(own, '')} are both experts of {module}", "one place for each layer's experts")
        return True

    def _place_stacked(self, target: str) -> bool:
        """Note a tensor of experts that are stored as the library stacks them: "...experts.gate_up_proj", with any suffix."""
        for module in self.experts:
            rest = target.removeprefix(f"{module}.")
            if rest != target and rest.startswith(tuple(MERGED)):
                self.found.stacked.add(module)
                return True
        return False

    def _note_unread(self, known: set[str]) -> None:
        """Tensors that the class says it leaves unread, where they belong to no module of it."""
        patterns = list(self.model._keys_to_ignore_on_load_unexpected or ())
        if any(name.endswith("position_ids") for name, _ in self.model.named_buffers()):
            patterns.append(r"(^|\.)position_ids$")
        for name in self.tensors:
            rule = next((p for p in patterns if re.search(p, self._target(name)[0])), None)
            if name not in known and rule is not None:
                self.found.unread[name] = f"transformers' {self.architecture} does not read it ({rule})"
