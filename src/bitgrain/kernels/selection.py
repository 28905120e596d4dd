"""Choosing a kernel, and keeping every reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bitgrain.errors import NoKernelError, RequestError
from bitgrain.kernels.base import ExpertsProblem, Fidelity, Kernel, Problem
from bitgrain.kernels.registry import ANY_PLATFORM, broken_packages, candidates, kernel_entries, kernel_names, operations
from bitgrain.kernels.selftest import self_test
from bitgrain.platforms.probe import nearest, states

FIDELITIES = ("exact", "fast")
REQUIREMENTS = ("native",)


@dataclass(frozen=True, slots=True)
class Policy:
    """What the user asks of selection; every wish is honoured or refused, never replaced.

    Args:
        fidelity: "exact": no kernel may change the numerics that the checkpoint specifies; "fast" admits those that do.
        force:    operation to kernel name.
        forbid:   kernel names, or backend names (the part before the dot).
        require:  "native": no reference kernel and no emulated arithmetic.
        self_test: run one small tile of the chosen kernel against the reference before its first use.
    """

    fidelity: str = "exact"
    force: Mapping[str, str] = field(default_factory=dict)
    forbid: frozenset[str] = frozenset()
    require: str | None = None
    self_test: bool = True

    def check(self, platform: str) -> None:
        """Raise RequestError unless every name in the policy exists, and every kernel that is asked for is one of the platform."""
        if self.fidelity not in FIDELITIES:
            raise RequestError(f"fidelity = {self.fidelity!r}", "no such fidelity", f"one of {', '.join(FIDELITIES)}", "choose one of them")
        if self.require not in (None, *REQUIREMENTS):
            raise RequestError(f"require = {self.require!r}", "no such requirement", f"one of {', '.join(REQUIREMENTS)}", "choose one of them")
        every = {name for operation in operations() for name in kernel_names(operation)}
        backends = {name.partition(".")[0] for name in every}
        for name in sorted(self.forbid - every - backends):
            raise RequestError(f"forbid = {name!r}", f"no such kernel or backend{nearest(name, every | backends)}{_broken()}", f"one of {', '.join(sorted(every | backends))}", "correct the name")
        for operation, name in self.force.items():
            if operation not in operations():
                raise RequestError(f"kernel {operation}={name}", f"no such operation{nearest(operation, operations())}", f"one of {', '.join(operations())}", "correct the name")
            known = kernel_names(operation)
            if name not in known:
                raise RequestError(f"kernel {operation}={name}", f"no such kernel{nearest(name, known)}{_broken()}", f"one of {', '.join(known)}", "correct the name")
            places = [place for o, place, kernel in kernel_entries() if (o, kernel.name) == (operation, name)]
            if not {platform, ANY_PLATFORM} & set(places):
                found = f"a kernel of {', '.join(places)}, and this is {platform}; the platforms are\n{states()}"
                raise RequestError(f"kernel {operation}={name}", found, f"a kernel of {platform}", "choose one of them, or another platform")


def _broken() -> str:
    """What is to be said of kernels that may be missed: those of packages that do not load."""
    return "".join(f"; {name} is {why}" for name, why in broken_packages().items())


@dataclass(frozen=True, slots=True)
class Candidate:
    """One kernel that was considered; `reason` is why it was not chosen, empty for the chosen one."""

    name: str
    fidelity: str
    reason: str


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen kernel for one problem, and everything that was considered.

    Args:
        note: why the problem is this one: of a module of an expert, why no kernel of experts runs it; else "".
    """

    problem: Problem
    platform: str
    kernel: Kernel
    fidelity: Fidelity
    candidates: tuple[Candidate, ...]
    note: str = ""

    def noted(self, note: str) -> Selection:
        return replace(self, note=note)

    def as_dict(self) -> dict[str, Any]:
        return {
            "problem": self.problem.describe(),
            "platform": self.platform,
            "kernel": self.kernel.name,
            "fidelity": self.fidelity.value,
            "candidates": [{"kernel": c.name, "fidelity": c.fidelity, "reason": c.reason} for c in self.candidates],
            **({"note": self.note} if self.note else {}),
            **({"proof": self.kernel.proof} if hasattr(self.kernel, "proof") else {}),
        }


def select(problem: Problem, platform: str, policy: Policy) -> Selection:
    """The best kernel that the problem, the platform and the policy admit.

    Raises:
        NoKernelError: none; lists every candidate with its reason.
    """
    chosen: tuple[Kernel, Fidelity] | None = None
    rows: list[Candidate] = []
    for kernel in candidates(problem.operation, platform):
        reason, fidelity = _judge(kernel, problem, policy)
        if not reason and chosen is not None:
            reason = f"works, but {chosen[0].name} ranks higher"
        elif not reason and policy.self_test:
            failure = self_test(kernel, problem, platform)
            reason = failure.reason if failure else ""
        rows.append(Candidate(kernel.name, fidelity.value if fidelity else "", reason))
        if not reason and fidelity is not None:
            chosen = (kernel, fidelity)
    if chosen is None:
        shown = "\n".join(f"    {r.name}: {r.reason}" for r in rows) or "    none is registered for this platform"
        raise NoKernelError(
            f"{problem.describe()} on {platform}", f"no kernel can run it:\n{shown}", "one kernel without a refusal", "relax --kernel, --forbid or --require, or choose another platform"
        )
    return Selection(problem, platform, chosen[0], chosen[1], tuple(rows))


def select_experts(problem: ExpertsProblem, platform: str, policy: Policy) -> tuple[Selection | None, str]:
    """(kernel of experts, "") or (None, why each expert's matrices run as linear modules instead).

    They do where only the floor takes the experts, and kernels above it take their matrices.

    Raises:
        NoKernelError: none runs the experts, and none their matrices; or the one that was asked for does not.
    """
    try:
        found = select(problem, platform, policy)
    except NoKernelError:
        if problem.operation in policy.force:
            raise
        found = None
    if found is not None and (found.kernel.rank > 0 or problem.operation in policy.force):
        return found, ""
    try:
        linears = [select(one, platform, policy) for one in problem.linears]
    except NoKernelError:
        return (found or select(problem, platform, policy)), ""
    if found is not None and any(one.kernel.rank == 0 for one in linears):
        return found, ""
    rows = [f"{kernel.name}: {_judge(kernel, problem, policy)[0]}" for kernel in candidates(problem.operation, platform) if kernel.rank > 0]
    return None, "only the floor takes the experts together" + (f" ({'; '.join(rows)})" if rows else "")


def refuse_linears(name: str, why: str, policy: Policy) -> None:
    """Raise NoKernelError if a kernel of experts was asked for and the experts called `name` run as linear modules."""
    asked = policy.force.get("experts")
    if asked is not None:
        raise NoKernelError(name, f"run as linear modules: {why}", f"experts that {asked} can run, which was asked for", "leave out --kernel experts")


def _judge(kernel: Kernel, problem: Problem, policy: Policy) -> tuple[str, Fidelity | None]:
    """(why not, or empty; the fidelity, if the kernel could run the problem at all)."""
    try:
        refusal = kernel.refusal(problem)
        fidelity: Fidelity | None = None if refusal is not None else kernel.fidelity(problem)
    except Exception as error:  # a vendor's package may raise anything when it is first looked at; the others still run
        return f"asking it raised {type(error).__name__}: {error}", None
    if refusal is not None:
        return refusal.reason, None
    forced = policy.force.get(problem.operation)
    if forced is not None and forced != kernel.name:
        return f"--kernel {problem.operation}={forced} was asked for", fidelity
    if kernel.name in policy.forbid or kernel.name.partition(".")[0] in policy.forbid:
        return "forbidden by --forbid", fidelity
    if fidelity is Fidelity.APPROXIMATE and policy.fidelity != "fast":
        return "changes the checkpoint's numerics; admitted by --fidelity fast", fidelity
    if policy.require == "native" and (fidelity is Fidelity.EMULATED or kernel.rank == 0):
        return f"--require native was asked for, and this is {'emulated' if fidelity is Fidelity.EMULATED else 'the reference floor'}", fidelity
    return "", fidelity
