"""Which kernel each module would get, and why not the others: from the plan alone, for any platform."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from bitgrain.formats.base import ModuleKind
from bitgrain.kernels.base import EmbeddingProblem, ExpertsProblem, LinearProblem, Problem
from bitgrain.kernels.registry import ANY_PLATFORM, kernel_entries
from bitgrain.kernels.selection import Policy, Selection, refuse_linears, select, select_experts
from bitgrain.layers.builder import joint_label
from bitgrain.layers.experts import label_of
from bitgrain.plan import ExpertGroup, ModulePlan, Plan
from bitgrain.platforms.probe import counting_on, known_platforms
from bitgrain.weights import NO_ACTIVATION


@contextmanager
def choosing_for(text: str) -> Iterator[str]:
    """A context in which choices are made for KEY[:GENERATION][@host]; the key.

    Raises:
        RequestError: no platform and no kernel has that key, or no generation is called so.
    """
    of_kernels = {platform for _, platform, _ in kernel_entries() if platform != ANY_PLATFORM}
    if text in of_kernels and text not in known_platforms():
        yield text
        return
    with counting_on(text) as key:
        yield key


def choose_for_plan(plan: Plan, platform: str, policy: Policy, dtype: str) -> dict[str, Selection]:
    """Selection per module, per fused group, or per group of experts, in checkpoint order.

    Raises:
        NoKernelError: for the first module that no kernel can run under the policy.
        RequestError:  the policy names what is not there, or a kernel of another platform.
    """
    policy.check(platform)
    fused = {name: fusion for fusion in plan.fusions if fusion.fused for name in fusion.modules}
    experts = _Experts(plan, platform, policy, dtype)
    chosen: dict[str, Selection] = {}
    memo: dict[Problem, Selection] = {}
    for module in plan.modules.values():
        if module.name in fused and module.name != fused[module.name].modules[0]:
            continue
        selection, note = experts.choice(module.name, chosen)
        if selection is not None:
            continue
        group = [plan.modules[n] for n in fused[module.name].modules] if module.name in fused else [module]
        problem = problem_of(group, plan.modules, dtype)
        if problem is None:
            continue
        if isinstance(problem, EmbeddingProblem) and any(m.tied_to == module.name and not m.tensors for m in plan.modules.values()):
            head = LinearProblem(problem.weight, NO_ACTIVATION, problem.n, problem.k, dtype)
            problem = replace(problem, head=select(head, platform, policy).kernel.name)
        if problem not in memo:
            memo[problem] = select(problem, platform, policy)
        chosen[joint_label([m.name for m in group])] = memo[problem].noted(note) if note else memo[problem]
    return chosen


class _Experts:
    """What runs each module of an expert: a kernel of experts, or a linear one and why."""

    def __init__(self, plan: Plan, platform: str, policy: Policy, dtype: str) -> None:
        self.plan, self.platform, self.policy, self.dtype = plan, platform, policy, dtype
        self.groups = {group.module(e, part): group for groups in plan.expert_groups.values() for group in groups for e in group.members for part in (*group.parts, group.joint) if part}
        self.memo: dict[Problem, tuple[Selection | None, str]] = {}
        self.made: dict[int, tuple[Selection | None, str]] = {}

    def choice(self, module: str, chosen: dict[str, Selection]) -> tuple[Selection | None, str]:
        """(selection of the experts that the module belongs to, note of a linear selection); enters the former in `chosen`."""
        group = self.groups.get(module)
        if group is None:
            return None, ""
        if id(group) not in self.made:
            self.made[id(group)] = found = self._select(group)
            if found[0] is not None:
                chosen[label_of(group, len(self.plan.expert_groups[group.layer]))] = found[0]
            else:
                refuse_linears(module.rpartition(".")[0], found[1], self.policy)
        return self.made[id(group)]

    def _select(self, group: ExpertGroup) -> tuple[Selection | None, str]:
        problem = experts_problem(group, self.plan, self.dtype) if group.together else None
        if problem is None:
            return None, group.why
        if problem not in self.memo:
            self.memo[problem] = select_experts(problem, self.platform, self.policy)
        return self.memo[problem]


def experts_problem(group: ExpertGroup, plan: Plan, dtype: str) -> ExpertsProblem | None:
    """The problem that experts which may run together pose."""
    gate_up = [plan.modules[group.module(group.members[0], part)] for part in group.gate_up]
    down = plan.modules[group.module(group.members[0], group.parts[2])]
    first, second = problem_of(gate_up, plan.modules, dtype), problem_of([down], plan.modules, dtype)
    if not isinstance(first, LinearProblem) or not isinstance(second, LinearProblem):
        return None
    return ExpertsProblem(
        first.weight, second.weight, first.activation, second.activation, len(group.members), first.k, second.k, plan.join, gate_up[0].has_bias or down.has_bias, dtype,
    )  # fmt: skip


def problem_of(group: list[ModulePlan], modules: Mapping[str, ModulePlan], dtype: str) -> Problem | None:
    """The problem that a module, or a fused group of modules, poses; None for modules without a matrix, and for those that no kernel runs."""
    first = group[0]
    scheme = first.scheme or (modules[first.tied_to].scheme if first.tied_to else None)
    if scheme is None or first.use == "dense copy":
        return None
    dtype = first.use or dtype
    heights = tuple(m.shape[0] for m in group)
    spec = scheme.weight_spec.stacked(heights)
    if first.kind is ModuleKind.EMBEDDING:
        return EmbeddingProblem(spec, heights[0], scheme.shape[1], dtype)
    return LinearProblem(spec, scheme.activation.without_values(), sum(heights), scheme.shape[1], dtype)
