"""From a row of the plan to canonical weights: reads one module's tensors, decodes them, keeps the ledger."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitgrain.checkpoint.files import CheckpointFiles
from bitgrain.checkpoint.ledger import Ledger
from bitgrain.errors import BadValueError, BitgrainError, ManyProblemsError, RequestError
from bitgrain.formats.base import ModuleKind
from bitgrain.formats.matching import nearest_names
from bitgrain.formats.value_checks import require_finite
from bitgrain.plan import ModulePlan, Plan
from bitgrain.weights import ActivationSpec, Transform, Weight


class ModuleReader:
    """Reads modules of a planned checkpoint one at a time; peak memory is one module's tensors and its decoding."""

    def __init__(self, files: CheckpointFiles, plan: Plan) -> None:
        self.files, self.plan = files, plan
        self.ledger = Ledger(files.tensors, plan.ignored, _parts_of(plan))

    def row(self, module: str) -> ModulePlan:
        """The plan's row of a module.

        Raises:
            RequestError: no such module; names the nearest ones.
        """
        row = self.plan.modules.get(module)
        if row is None:
            near = nearest_names(module, list(self.plan.modules))
            raise RequestError(module, "no such module in the plan", f"one of the {len(self.plan.modules)} modules (nearest: {', '.join(near) or 'none'})", "correct the name")
        return row

    def tensors(self, row: ModulePlan, only: str | None = None) -> dict[str, Tensor]:
        """The module's stored tensors by local name, or the one called `only`; entered in the ledger."""
        sources, steps = row.sources or row.tensors, row.steps or ((),) * len(row.tensors)
        stored = {}
        for local, full, source, taken in zip(row.locals, row.tensors, sources, steps, strict=True):
            if only is not None and local != only:
                continue
            self.ledger.consume(source, row.name, full)
            tensor = self.files.read(source)
            for step in taken:
                tensor = step(tensor)
            stored[local] = tensor.contiguous() if taken else tensor
        return stored

    def weight(self, row: ModulePlan) -> tuple[Weight, ActivationSpec, Tensor | None]:
        """(weight, activation specification with stored values, bias as stored) of a matrix module."""
        if row.scheme is None:
            raise RequestError(row.name, f"a {row.kind.value}, which has no matrix", "a matrix module", "read it as a vector")
        stored = self.tensors(row)
        try:
            weight = row.scheme.to_weight(stored)
            activation = row.scheme.to_activation(stored)
            bias = row.scheme.to_bias(stored)
        except BitgrainError as problem:
            raise _located(problem, row, self.files) from None
        # views of the file become copies: the file may change or vanish later, and the pages are freed with the map.  In small pages:
        # a start with copies in large ones took 1.7 s longer for 525 MB (benchmarks/results/cpu-limits.md)
        mapped = {tensor.untyped_storage().data_ptr() for tensor in stored.values()}
        owned = weight.map_tensors(lambda t: t.clone() if t.untyped_storage().data_ptr() in mapped else t)
        return owned, activation, bias

    def skip(self, row: ModulePlan) -> None:
        """Enter the module's tensors in the ledger without reading them: their values are known from an earlier reading."""
        for full, source in zip(row.tensors, row.sources or row.tensors, strict=True):
            self.ledger.consume(source, row.name, full)

    def has_tensor(self, name: str) -> bool:
        """Whether the plan gives some module the tensor of this full name."""
        row = self.plan.modules.get(name) or self.plan.modules.get(name.rpartition(".")[0])
        return row is not None and name in row.tensors

    def vector(self, name: str) -> Tensor:
        """A one-dimensional parameter as stored, by its full tensor name."""
        module = name if name in self.plan.modules else name.rpartition(".")[0]
        row = self.row(module)
        local = name[len(module) + 1 :] if module else name  # nothing for a bare vector
        stored = self.tensors(row, local)
        if local not in stored:
            raise RequestError(name, f"the module has {', '.join(row.locals)}", "one of these", "correct the name")
        try:
            return require_finite(local, stored[local])
        except BitgrainError as problem:
            raise _located(problem, row, self.files) from None

    def head_transforms(self, row: ModulePlan, head_dim: int) -> tuple[tuple[Transform, ...], tuple[Transform, ...]]:
        """(maps of queries, maps of keys) of an attention module; none where its scheme has none."""
        if row.kv_cache is None or row.kv_cache.heads is None:
            return (), ()
        stored = {full.removeprefix(f"{row.name}."): tensor.clone() for full, tensor in self.tensors(row).items()}
        try:
            return row.kv_cache.heads.to_transforms(stored, head_dim)
        except BitgrainError as problem:
            raise _located(problem, row, self.files) from None

    def cache_scales(self, row: ModulePlan) -> dict[str, tuple[float, ...]]:
        """KV-cache scales of an attention module: which ("k", "v", ...) to its values.

        Raises:
            BadValueError: NaN or infinite.
        """
        found: dict[str, tuple[float, ...]] = {}
        stored = self.tensors(row)
        for full, which in row.kv_cache.scales if row.kv_cache else ():
            values = stored[full].float().reshape(-1)
            if not bool(torch.isfinite(values).all()):
                raise BadValueError(f"{self.files.tensors[full].file}: {full}", "NaN or infinite", "a finite scale", "the file is damaged; fetch or write it again")
            found[which] = tuple(float(v) for v in values)
        return found

    def close(self) -> None:
        """Raise unless every stored tensor was consumed or is ignored under a rule."""
        self.ledger.close(self.files.label)


def _parts_of(plan: Plan) -> dict[str, list[str]]:
    """Stored tensors that several modules share: name to the names under which they use it, or parts of it."""
    parts: dict[str, list[str]] = {}
    for row in plan.modules.values():
        for full, source, steps in zip(row.tensors, row.sources, row.steps, strict=False):
            if steps or source != full:
                parts.setdefault(source, []).append(full)
    for row in plan.modules.values():
        for full, source in zip(row.tensors, row.sources or row.tensors, strict=True):
            if full == source in parts and full not in parts[source]:
                parts[source].append(full)  # the module that stores it uses it too
    return parts


def _located(problem: BitgrainError, row: ModulePlan, files: CheckpointFiles) -> BitgrainError:
    """The same problem, with the file and the module put before a tensor's local name."""
    if isinstance(problem, ManyProblemsError):
        return ManyProblemsError(row.name, [_located(p, row, files) for p in problem.problems])
    full: Mapping[str, str] = dict(zip(row.locals, row.tensors, strict=True))
    stored: Mapping[str, str] = dict(zip(row.locals, row.sources or row.tensors, strict=True))
    name, source = full.get(problem.where, f"{row.name}: {problem.where}"), stored.get(problem.where, "")
    file = files.tensors[source].file if source in files.tensors else ", ".join(row.files)
    return problem.moved_to(f"{file}: {name}" + (f", part of {source}" if source not in ("", name) else ""))


def matrix_of(reader: ModuleReader, name: str, effective: bool = False) -> Tensor:
    """float32 of the parameter `name` ("....weight"): [N, K] dequantized, or a vector as it is.

    Args:
        effective: W in y = x W^T, with the module's transforms; else the stored value, in the basis in which it is stored.
    """
    module, _, local = name.rpartition(".")
    row = reader.row(name if name in reader.plan.modules else module)
    if local != "weight" and row.name != name and row.kind is not ModuleKind.VECTOR:
        raise RequestError(name, f"{row.name} is a {row.kind.value}; only its weight is a matrix", f"{row.name}.weight", "correct the name")
    if row.tied_to is not None and not row.tensors:
        return matrix_of(reader, f"{row.tied_to}.weight", effective)
    if row.kind is ModuleKind.VECTOR:
        return reader.vector(name).float()
    weight = reader.weight(row)[0]
    return weight.effective() if effective else weight.dequantize()
