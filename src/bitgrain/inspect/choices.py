"""Which kernel each module would get, and why not the others: from the plan alone, for any platform."""

from __future__ import annotations

from collections.abc import Mapping

from bitgrain.errors import RequestError
from bitgrain.formats.base import ModuleKind
from bitgrain.kernels.base import EmbeddingProblem, LinearProblem, Problem
from bitgrain.kernels.registry import kernel_entries
from bitgrain.kernels.selection import Policy, Selection, select
from bitgrain.plan import ModulePlan, Plan
from bitgrain.platforms.probe import known_platforms


def check_platform(key: str) -> str:
    """The key itself.

    Raises:
        RequestError: no platform and no kernel has that key.
    """
    known = {*known_platforms(), *(platform for _, platform, _ in kernel_entries() if platform != "any")}
    if key not in known:
        raise RequestError(f"platform = {key!r}", "no such platform", f"one of {', '.join(sorted(known))}", "choose one of them, or install the package that brings it")
    return key


def choose_for_plan(plan: Plan, platform: str, policy: Policy, dtype: str) -> dict[str, Selection]:
    """Selection per module, or per fused group, in checkpoint order.

    Raises:
        NoKernelError: for the first module that no kernel can run under the policy.
    """
    policy.check()
    fused = {name: fusion for fusion in plan.fusions if fusion.fused for name in fusion.modules}
    chosen: dict[str, Selection] = {}
    memo: dict[Problem, Selection] = {}
    for module in plan.modules.values():
        if module.name in fused and module.name != fused[module.name].modules[0]:
            continue
        group = [plan.modules[n] for n in fused[module.name].modules] if module.name in fused else [module]
        problem = problem_of(group, plan.modules, dtype)
        if problem is None:
            continue
        if problem not in memo:
            memo[problem] = select(problem, platform, policy)
        chosen[group_label([m.name for m in group])] = memo[problem]
    return chosen


def problem_of(group: list[ModulePlan], modules: Mapping[str, ModulePlan], dtype: str) -> Problem | None:
    """The problem that a module, or a fused group of modules, poses; None for modules without a matrix."""
    first = group[0]
    scheme = first.scheme or (modules[first.tied_to].scheme if first.tied_to else None)
    if scheme is None:
        return None
    heights = tuple(m.shape[0] for m in group)
    spec = scheme.weight_spec.stacked(heights)
    if first.kind is ModuleKind.EMBEDDING:
        return EmbeddingProblem(spec, heights[0], scheme.shape[1], dtype)
    return LinearProblem(spec, scheme.activation.without_values(), sum(heights), scheme.shape[1], dtype)


def group_label(names: list[str]) -> str:
    """The name of a module, or "prefix.{a,b}" of a fused group."""
    if len(names) == 1:
        return names[0]
    return f"{names[0].rpartition('.')[0]}.{{{','.join(n.rpartition('.')[2] for n in names)}}}"
