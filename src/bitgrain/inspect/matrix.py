"""The support matrix: format x scheme x platform x kernel, from the registries."""

from __future__ import annotations

from typing import Any

from bitgrain.errors import NoKernelError
from bitgrain.formats.base import MATRIX_KINDS, ModuleKind
from bitgrain.formats.examples import SHAPE
from bitgrain.formats.registry import formats
from bitgrain.kernels.base import EmbeddingProblem, LinearProblem, Problem
from bitgrain.kernels.selection import Policy, select
from bitgrain.platforms.probe import probe_all


def support_matrix(dtype: str = "bfloat16") -> list[dict[str, Any]]:
    """One row per format, scheme and present platform: which kernel each module kind gets, and its fidelity.

    A kernel is chosen with the default policy for an example of the scheme; experts run as linear modules.
    """
    present = [report.platform.key for report in probe_all() if report.platform is not None]
    rows = []
    for name, config in formats().items():
        for scheme, weight, activation in config.examples():
            for platform in present:
                kernels = {}
                for kind in MATRIX_KINDS:
                    if kind is ModuleKind.EMBEDDING and not config.quantizes_embeddings:
                        continue
                    embedding = kind is ModuleKind.EMBEDDING
                    problem: Problem = EmbeddingProblem(weight, *SHAPE, dtype) if embedding else LinearProblem(weight, activation, *SHAPE, dtype)
                    kernels[kind.value] = _chosen(problem, platform)
                rows.append({"format": name, "aliases": list(config.aliases), "scheme": scheme, "platform": platform, "kernels": kernels})
    return rows


def _chosen(problem: Problem, platform: str) -> str:
    try:
        selection = select(problem, platform, Policy(self_test=False))
    except NoKernelError:
        return "none"
    return f"{selection.kernel.name} ({selection.fidelity.value})"
