"""The plan as tables: grouped modules, totals, predicted memory, and whether it can be split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bitgrain.errors import RequestError
from bitgrain.formats.base import MATRIX_KINDS, ModuleKind
from bitgrain.grouping import merged_name, pattern_of, ranges
from bitgrain.plan import ModulePlan, Plan

# Modules whose input is split over ranks (along K); routers are kept whole; every other matrix is split along N.
REPLICATED = ("gate", "router")
ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "w2")


@dataclass(frozen=True, slots=True)
class GroupRow:
    """Modules that differ only in their indices.

    Units: `nbytes` in bytes, over all modules of the group.
    """

    name: str
    count: int
    kind: str
    scheme: str
    shape: tuple[int, ...]
    bits_per_weight: float
    nbytes: int
    why: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "count": self.count, "kind": self.kind, "scheme": self.scheme, "shape": list(self.shape),
            "bits_per_weight": round(self.bits_per_weight, 4), "bytes": self.nbytes, "why": self.why,
        }  # fmt: skip


def group_rows(plan: Plan) -> list[GroupRow]:
    """One row per set of modules with equal name pattern, scheme, shape and reason; in checkpoint order."""
    groups: dict[tuple[Any, ...], list[ModulePlan]] = {}
    for module in plan.modules.values():
        key = (pattern_of(module.name), module.kind, module.label, module.shape, pattern_of(module.why))
        groups.setdefault(key, []).append(module)
    return [_row(members) for members in groups.values()]


def _row(members: list[ModulePlan]) -> GroupRow:
    first = members[0]
    nbytes, elements = sum(m.nbytes for m in members), sum(m.elements for m in members)
    bits = 8.0 * nbytes / elements if elements else 0.0
    return GroupRow(merged_name([m.name for m in members]), len(members), first.kind.value, first.label, first.shape, bits, nbytes, first.why)


def reason_lines(plan: Plan) -> list[str]:
    """A line for the modules of one pattern that run side by side, and one for the experts that run as linear modules, with the reason."""
    apart: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for fusion in plan.fusions:
        if not fusion.fused:
            apart.setdefault((pattern_of(fusion.modules[0]), pattern_of(fusion.why)), []).append((*fusion.modules, fusion.why))
    lines = []
    for fusions in apart.values():
        names = [merged_name(list(column)) for column in zip(*(f[:-1] for f in fusions), strict=True)]
        lines.append(f"side by side: {', '.join(names)}: {fusions[0][-1]}")
    experts: dict[tuple[str, tuple[int, ...], str], list[str]] = {}
    for group in (group for groups in plan.expert_groups.values() for group in groups if not group.together):
        experts.setdefault((pattern_of(group.layer), group.members, group.why), []).append(group.layer)
    return lines + [f"experts as linear modules: {merged_name(layers)}.{ranges(members)}: {why}" for (_, members, why), layers in experts.items()]


def left_out_lines(plan: Plan) -> list[str]:
    """A line for each rule under which stored tensors are left out, with their number and the outermost modules that they belong to."""
    rules: dict[str, list[str]] = {}
    for name, rule in plan.ignored.items():
        rules.setdefault(rule, []).append(name)
    return [f"left out: {len(names)} tensor{'s' if len(names) > 1 else ''} ({', '.join(_outermost(names))}): {rule}" for rule, names in rules.items()]


def _outermost(names: list[str]) -> list[str]:
    """The first segments of names, "model" taken together with what follows it; a single name in full."""
    if len(names) == 1:
        return names
    return sorted({".".join(name.split(".")[: 2 if name.startswith("model.") else 1]) for name in names})


def shard_rows(plan: Plan, ranks: int) -> list[dict[str, Any]]:
    """For each matrix that cannot be split evenly over `ranks`, or only with a remark: module pattern, dimension, verdict.

    A weight is decoded before it is cut, so a cut inside a group or block is exact; it repeats scales, which the remark says.
    An expert of which a rank would hold less than one group is refused.
    """
    if ranks < 1:
        raise RequestError(f"tp = {ranks}", "not a number of ranks", "1 or more", "choose a positive number")
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for module in plan.modules.values():
        last = module.name.rpartition(".")[2]
        if module.kind not in MATRIX_KINDS or module.scheme is None or last in REPLICATED:
            continue
        dim = 1 if last in ROW_PARALLEL else 0
        verdict = _shard_verdict(module, dim, ranks)
        if verdict:
            key = (pattern_of(module.name), verdict)
            row = rows.setdefault(key, {"name": key[0], "count": 0, "dim": "NK"[dim], "size": module.shape[dim], "verdict": verdict})
            row["count"] += 1
    return list(rows.values())


def _shard_verdict(module: ModulePlan, dim: int, ranks: int) -> str:
    size = module.shape[dim]
    if size % ranks:
        return f"refused: {size} is not a multiple of {ranks}"
    assert module.scheme is not None  # filtered by the caller
    spec = module.scheme.weight_spec
    part = size // ranks
    if dim == 1 and spec.group_index:
        return "exact; act-order: every rank keeps all scales"
    unit = spec.block[dim] if spec.granularity == "block" else (spec.group_size if dim == 1 and spec.granularity == "group" else 1)
    if module.kind is ModuleKind.EXPERT and part < unit:
        # its kernels prepare whole groups; a rank of them would have scales of other columns than the next
        return f"refused: a rank gets {part} of {size}, less than the {unit} that share a scale; at most {max(1, size // unit)} ranks, or whole experts on each"
    return "" if unit < 2 or part % unit == 0 else f"exact; cuts inside scales of {unit}, which are repeated"


def memory(plan: Plan) -> dict[str, int]:
    """Predicted bytes: stored in the files, prepared (packed weights keep their size), and the largest module.

    Peak host memory while loading is at most prepared + 3 x largest module.
    """
    stored = sum(m.nbytes for m in plan.modules.values())
    largest = max((m.nbytes for m in plan.modules.values()), default=0)
    return {"stored_bytes": stored, "largest_module_bytes": largest, "peak_loading_bytes": stored + 3 * largest}
