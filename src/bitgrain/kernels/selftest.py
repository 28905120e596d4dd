"""First use tests itself: one small tile of a kernel on its device against the reference on the host, remembered per machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform as host
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch

from bitgrain import __version__
from bitgrain.kernels.base import ExpertsProblem, Fidelity, Kernel, Problem, Refusal
from bitgrain.kernels.reference.step import ReferenceStep
from bitgrain.kernels.trials import tile_of, trial
from bitgrain.platforms.base import Platform
from bitgrain.platforms.probe import target
from bitgrain.settings import cache_folder, self_test_enabled

# Relative to the largest output of the tile: one rounding of y to its dtype, with room for another order of summation.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
# What kernels that round x to int8 may differ by: its rounding is 1/254 of the largest of 32 neighbours.
APPROXIMATE_TOLERANCE = 5e-2
HOST = "cpu"
RAISED = "its self-test raised"

_results: dict[str, str] = {}


def self_test(kernel: Kernel, problem: Problem, platform: str = HOST) -> Refusal | None:
    """None if one small tile on the platform's device agrees with the reference, else a refusal with the difference.

    Not run for the reference itself, for a platform that is only planned for, and with BITGRAIN_SELFTEST=0.  Comparisons are
    kept in the cache folder (BITGRAIN_CACHE, default ~/.cache/bitgrain), by kernel, version, device and problem; delete the file to
    test again.  What a kernel raises is a refusal too, and is not kept: memory that was short is not short for ever.
    """
    if kernel.rank == 0 or isinstance(kernel, ReferenceStep) or not self_test_enabled():
        return None
    here = target(platform)
    if here.state == "planned" or trial(problem) is None:
        return None
    key = _key(kernel, problem, here)
    if key not in _results:
        known = _stored().get(key)
        if known is None:
            known = _run(kernel, problem, here.device_type)
            if not known.startswith(RAISED):
                _store(key, known)
        _results[key] = known
    return Refusal(_results[key]) if _results[key] else None


def experts_factor(problem: ExpertsProblem) -> int:
    """How much more than one product experts may differ: two products and a join; where the values between them are quantized
    coarsely, one that is rounded the other way counts."""
    return 3 if problem.down_activation.is_none or problem.down_activation.bits >= 8 else 10


def _key(kernel: Kernel, problem: Problem, here: Platform) -> str:
    """What a result holds for: this code, this kernel's build, the devices that it ran on, really or simulated, and the tile."""
    build = getattr(kernel, "build", "")
    devices = f"{here.key} {here.state} {here.generation} {here.devices}"
    text = f"{__version__} {torch.__version__} {host.machine()} {devices} {kernel.name} {build} {tile_of(problem)}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _run(kernel: Kernel, problem: Problem, device: str = HOST) -> str:
    """Why the kernel fails its test on a device; empty where it passes."""
    run = trial(problem)
    assert run is not None  # self_test() asked
    try:
        pairs = run(kernel, device)
        found = [float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)) for got, wanted in pairs]
    except Exception as error:  # whatever a driver or a vendor's package raises
        return f"{RAISED} {type(error).__name__}: {error}"
    allowed = TOLERANCE[problem.dtype] * (experts_factor(problem) if isinstance(problem, ExpertsProblem) else 1)
    if kernel.fidelity(problem) is Fidelity.APPROXIMATE:
        allowed = max(allowed, APPROXIMATE_TOLERANCE)
    worst = next((one for one in found if not one <= allowed), 0.0)  # NaN is not
    return f"its self-test differs from the reference by {worst:.2g} of the largest output (allowed {allowed:g})" if worst else ""


def _file() -> Path:
    return cache_folder() / "selftest.json"


@lru_cache(maxsize=1)
def _stored() -> dict[str, str]:
    try:
        value = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _store(key: str, result: str) -> None:
    # a cache that cannot be written only costs the test again
    with suppress(OSError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        merged = {**_stored(), **{k: r for k, r in _results.items() if not r.startswith(RAISED)}, key: result}
        temporary = _file().with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(merged))
        temporary.replace(_file())
