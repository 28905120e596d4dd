"""The support matrix: format x scheme x module kind x platform x kernel x last run, from the registries and the records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bitgrain.errors import NoKernelError
from bitgrain.formats.base import MATRIX_KINDS, ModuleKind
from bitgrain.formats.examples import SHAPE
from bitgrain.formats.registry import formats
from bitgrain.inspect.run_records import last_run
from bitgrain.kernels.base import EmbeddingProblem, ExpertsProblem, LinearProblem, Problem
from bitgrain.kernels.registry import kernel_entries
from bitgrain.kernels.selection import Policy, Selection, select, select_experts
from bitgrain.platforms.probe import probe_all
from bitgrain.quantize import TARGETS
from bitgrain.weights import ActivationSpec, WeightSpec

POLICY = Policy(self_test=False)
# Experts of an example.
EXPERTS = 4


def support_matrix(dtype: str = "bfloat16") -> list[dict[str, Any]]:
    """One row per format, scheme and present platform: per module kind the kernel, its fidelity and when it last ran.

    A kernel is chosen with the default policy for an example of the scheme; experts run as linear modules where no kernel
    takes them together.
    """
    present = [report.platform.key for report in probe_all() if report.platform is not None]
    rows = []
    for name, aliases, embeddings, scheme, weight, activation in schemes():
        for platform in present:
            kernels, runs = {}, {}
            for kind, (problem, chosen) in choices(weight, activation, dtype, embeddings, platform).items():
                together = kind != ModuleKind.EXPERT.value or isinstance(problem, ExpertsProblem)
                kernels[kind] = "none" if chosen is None else f"{chosen.kernel.name} ({chosen.fidelity.value})" + ("" if together else ", as linear modules")
                runs[kind] = last_run(problem, platform, chosen.kernel.name if chosen else "")
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


def unproven() -> list[str]:
    """A sentence for each kernel that says of itself how it was tested."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for operation, platform, kernel in kernel_entries():
        if hasattr(kernel, "proof"):
            found.setdefault((operation, kernel.name, kernel.proof), []).append(platform)
    return [f"{name} runs {operation} on {', '.join(platforms)}: {proof}." for (operation, name, proof), platforms in found.items()]


def matrix_page(rows: list[dict[str, Any]]) -> str:
    """The matrix as a Markdown page."""
    lines = [
        "# Support matrix",
        "",
        "Generated by `python tools/support_matrix.py` from the registries of formats and kernels and from the records of what ran; do not edit.",
        "`bitgrain formats` prints it for the machine at hand. Kernel and fidelity are what the default policy chooses with bfloat16 activations; *last run* is the",
        "last time when that kernel ran an example of the scheme on real hardware and agreed with the definition in float64.",
        *([" ".join(unproven())] if unproven() else []),
        "`online` is what `--quantization NAME` makes of a 16-bit checkpoint while it loads.",
        "",
        "| format | scheme | module | platform | kernel | last run |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for kernel, run, kinds in _merged(row):
            lines.append(f"| {row['format']} | {row['scheme']} | {', '.join(kinds)} | {row['platform']} | {kernel} | {run} |")
    return "\n".join(lines) + "\n"


def _merged(row: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """(kernel, last run, module kinds) with the kinds that agree together."""
    merged: dict[tuple[str, str], list[str]] = {}
    for kind, kernel in row["kernels"].items():
        merged.setdefault((kernel, row["last_run"][kind]), []).append(kind.replace("_", " "))
    return [(kernel, run, kinds) for (kernel, run), kinds in merged.items()]
