"""Every name of a quantization means the same on every platform, or is refused there: over the whole registry.

Resolving never asks for a platform (tests/null/test_architecture.py: formats and plans import none).  What is left to show is that
choosing kernels changes no scheme, rounds nothing that the scheme does not, and takes no kernel of another device.
"""

import pytest

from bitgrain.api import open_checkpoint
from bitgrain.formats.registry import canonical_name, formats
from bitgrain.inspect.choices import choose_for_plan
from bitgrain.inspect.matrix import choices, schemes
from bitgrain.kernels.base import EmbeddingProblem, ExpertsProblem, Fidelity
from bitgrain.kernels.registry import ANY_PLATFORM, kernel_entries
from bitgrain.kernels.selection import Policy
from bitgrain.platforms import probe
from bitgrain.platforms.probe import counting_on, known_platforms
from bitgrain.quantize import TARGETS
from tests.checkpoints import small_llama

SCHEMES = list(schemes())
# every generation of every platform; the host as it is
DEVICES = [f"{key}:{name}" if name else key for key in known_platforms() for name in (probe._probes()[key].profiles or [""])]


def places() -> dict[tuple[str, str], set[str]]:
    """(operation, kernel) to the platforms that it is of."""
    found: dict[tuple[str, str], set[str]] = {}
    for operation, platform, kernel in kernel_entries():
        found.setdefault((operation, kernel.name), set()).add(platform)
    return found


def expected(problem) -> set[Fidelity]:
    """What a kernel may do to the numbers without being asked to: never less than the scheme says, and never another rounding."""
    activations = [problem.gate_up_activation, problem.down_activation] if isinstance(problem, ExpertsProblem) else [problem.activation]
    return {Fidelity.EXACT, Fidelity.EMULATED} if all(a.is_none for a in activations) else {Fidelity.NATIVE, Fidelity.EMULATED}


@pytest.mark.parametrize("device", DEVICES)
def test_every_scheme_keeps_its_meaning_or_is_refused(device):
    of = places()
    with counting_on(device) as key:
        for name, _, embeddings, label, weight, activation in SCHEMES:
            for kind, (problem, chosen) in choices(weight, activation, "bfloat16", embeddings, key).items():
                where = f"{name} {label}, {kind} on {device}"
                parts = [problem.down, problem.gate_up] if isinstance(problem, ExpertsProblem) else [problem.weight]
                assert weight in parts, where
                assert isinstance(problem, EmbeddingProblem) or problem.activation == activation.without_values(), where
                if chosen is None:
                    continue
                assert chosen.problem == problem, where
                assert chosen.fidelity in expected(problem), f"{where}: {chosen.kernel.name} is {chosen.fidelity.value}"
                assert of[problem.operation, chosen.kernel.name] & {key, ANY_PLATFORM}, where


ALIASES = [(name, alias) for name, config in formats().items() for alias in (name, *config.aliases)]


@pytest.mark.parametrize("platform", ["", "cuda@host", "hip@host", "xpu@host", "npu@host"])
def test_aliases_and_online_names_resolve_alike_under_every_platform(platform, tmp_path, monkeypatch):
    path = small_llama(tmp_path / "small")
    plans = {name: open_checkpoint(path, quantization=name).plan for name in TARGETS}
    monkeypatch.setenv("BITGRAIN_PLATFORM", platform)
    assert all(canonical_name(alias) == name for name, alias in ALIASES)
    for name, plan in plans.items():
        assert open_checkpoint(path, quantization=name).plan.hash == plan.hash


@pytest.mark.parametrize("name", TARGETS)
def test_kernels_of_every_platform_are_asked_the_same(name, tmp_path):
    plan = open_checkpoint(small_llama(tmp_path / "small"), quantization=name).plan
    asked = {}
    for key in known_platforms():
        found = choose_for_plan(plan, key, Policy(self_test=False), "bfloat16")
        asked[key] = {label: (c.problem.weight, c.problem.activation, c.problem.n, c.problem.k) for label, c in found.items()}
    assert all(problems == asked["cpu"] for problems in asked.values())
