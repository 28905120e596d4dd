"""The support matrix: format x scheme x module kind x platform x kernel x last run, from the registries and the records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bitgrain.errors import NoKernelError
from bitgrain.formats.base import MATRIX_KINDS, ModuleKind
from bitgrain.formats.examples import SHAPE
from bitgrain.formats.registry import formats
from bitgrain.inspect.run_records import Records, last_run
from bitgrain.kernels.base import EmbeddingProblem, ExpertsProblem, LinearProblem, Problem
from bitgrain.kernels.selection import Policy, Selection, select, select_experts
from bitgrain.platforms.probe import probe_all
from bitgrain.quantize import TARGETS
from bitgrain.weights import ActivationSpec, WeightSpec

POLICY = Policy(self_test=False)
# Experts of an example.
EXPERTS = 4


def support_matrix(dtype: str = "bfloat16", platforms: Sequence[str] | None = None, records: Records | None = None) -> list[dict[str, Any]]:
    """One row per format, scheme and platform: per module kind the kernel, its fidelity and when it last ran.

    A kernel is chosen with the default policy for an example of the scheme; experts run as linear modules where no kernel
    takes them together.

    Args:
        platforms: dispatch keys; None: those that are present.
        records:   instead of those that came with the package.
    """
    keys = [report.platform.key for report in probe_all() if report.platform is not None] if platforms is None else platforms
    rows = []
    for name, aliases, embeddings, scheme, weight, activation in schemes():
        for platform in keys:
            kernels, runs = {}, {}
            for kind, (problem, chosen) in choices(weight, activation, dtype, embeddings, platform).items():
                together = kind != ModuleKind.EXPERT.value or isinstance(problem, ExpertsProblem)
                kernels[kind] = "none" if chosen is None else f"{chosen.kernel.name} ({chosen.fidelity.value})" + ("" if together else ", as linear modules")
                runs[kind] = last_run(problem, platform, chosen.kernel.name if chosen else "", records)
            rows.append({"format": name, "aliases": list(aliases), "scheme": scheme, "platform": platform, "kernels": kernels, "last_run": runs})
    return rows


def schemes() -> Iterator[tuple[str, tuple[str, ...], bool, str, WeightSpec, ActivationSpec]]:
    """(format, other names, quantizes embeddings, label, weight, activation) of every scheme, those that a run asks for last."""
    for name, config in formats().items():
        for label, weight, activation in config.examples():
            yield name, config.aliases, config.quantizes_embeddings, label, weight, activation
    for target in TARGETS.values():
        yield "online", (), True, f"{target.name}: {target.meaning}", target.weight, target.activation


def choices(weight: WeightSpec, activation: ActivationSpec, dtype: str, embeddings: bool, platform: str) -> dict[str, tuple[Problem, Selection | None]]:
    """Module kind to an example of what its kernel is asked, and the choice of the default policy; None: no kernel runs it."""
    linear = LinearProblem(weight, activation.without_values(), *SHAPE, dtype)
    found: dict[str, tuple[Problem, Selection | None]] = {}
    for kind in MATRIX_KINDS:
        if kind is ModuleKind.EXPERT:
            experts = experts_example(weight, activation, dtype)
            together = select_experts(experts, platform, POLICY)[0] if experts is not None else None
            found[kind.value] = (experts, together) if experts is not None and together is not None else (linear, _chosen(linear, platform))
        elif kind is not ModuleKind.EMBEDDING:
            found[kind.value] = (linear, _chosen(linear, platform))
        elif embeddings:
            rows = EmbeddingProblem(weight, *SHAPE, dtype)
            found[kind.value] = (rows, _chosen(rows, platform))
    return found


def experts_example(weight: WeightSpec, activation: ActivationSpec, dtype: str) -> ExpertsProblem | None:
    """Experts of one scheme throughout; None where gate and up of it are never one matrix (see resolve)."""
    if weight.group_index or activation.has_stored_values:
        return None
    plain = activation.without_values()
    return ExpertsProblem(weight.stacked((SHAPE[0], SHAPE[0])), weight, plain, plain, EXPERTS, SHAPE[1], SHAPE[0], "silu", False, dtype)


def _chosen(problem: Problem, platform: str) -> Selection | None:
    try:
        return select(problem, platform, POLICY)
    except NoKernelError:
        return None
