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
from bitgrain.weights import ActivationSpec, Weight


class ModuleReader:
    """Reads modules of a planned checkpoint one at a time; peak memory is one module's tensors and its decoding."""

    def __init__(self, files: CheckpointFiles, plan: Plan) -> None:
        self.files, self.plan = files, plan
        self.ledger = Ledger(files.tensors, plan.ignored)

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

    def tensors(self, row: ModulePlan) -> dict[str, Tensor]:
        """The module's stored tensors by local name, entered in the ledger."""
        for full in row.tensors:
            self.ledger.consume(full, row.name)
        return {local: self.files.read(full) for local, full in zip(row.locals, row.tensors, strict=True)}

    def weight(self, row: ModulePlan) -> tuple[Weight, ActivationSpec, Tensor | None]:
        """(weight, activation specification with stored values, bias as stored) of a matrix module."""
        if row.scheme is None:
            raise RequestError(row.name, f"a {row.kind.value}, which has no matrix", "a matrix module", "read it as a vector")
        stored = self.tensors(row)
        bias = stored.pop("bias", None)
        try:
            weight = row.scheme.to_weight(stored)
            activation = row.scheme.to_activation(stored)
            if bias is not None:
                require_finite("bias", bias)
        except BitgrainError as problem:
            raise _located(problem, row, self.files) from None
        # views of the file become copies: the file may change or vanish later, and the pages are freed with the map
        mapped = {tensor.untyped_storage().data_ptr() for tensor in stored.values()}
        owned = weight.map_tensors(lambda t: t.clone() if t.untyped_storage().data_ptr() in mapped else t)
        return owned, activation, bias

    def vector(self, name: str, size: int | None = None) -> Tensor:
        """A one-dimensional parameter as stored, by its full tensor name."""
        module = name.rpartition(".")[0]
        row = self.row(module)
        stored = self.tensors(row)
        local = name[len(module) + 1 :] if module else name
        if local not in stored:
            raise RequestError(name, f"the module has {', '.join(stored)}", "one of these", "correct the name")
        try:
            return require_finite(local, stored[local])
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


def _located(problem: BitgrainError, row: ModulePlan, files: CheckpointFiles) -> BitgrainError:
    """The same problem, with the file and the module put before a tensor's local name."""
    if isinstance(problem, ManyProblemsError):
        return ManyProblemsError(row.name, [_located(p, row, files) for p in problem.problems])
    full: Mapping[str, str] = dict(zip(row.locals, row.tensors, strict=True))
    name = full.get(problem.where, f"{row.name}: {problem.where}")
    file = files.tensors[name].file if name in files.tensors else ", ".join(row.files)
    return problem.moved_to(f"{file}: {name}")


def matrix_of(reader: ModuleReader, name: str) -> Tensor:
    """float32 of the parameter `name` ("....weight"): [N, K] dequantized, or a vector as it is."""
    module, _, local = name.rpartition(".")
    row = reader.row(name if name in reader.plan.modules else module)
    if local != "weight" and row.name != name and row.kind is not ModuleKind.VECTOR:
        raise RequestError(name, f"{row.name} is a {row.kind.value}; only its weight is a matrix", f"{row.name}.weight", "correct the name")
    if row.tied_to is not None and not row.tensors:
        return matrix_of(reader, f"{row.tied_to}.weight")
    if row.kind is ModuleKind.VECTOR:
        return reader.vector(name).float()
    return reader.weight(row)[0].dequantize()
