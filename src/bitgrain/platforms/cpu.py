"""The host processor."""

from __future__ import annotations

import os
import platform as host
from pathlib import Path

from bitgrain.platforms.base import Platform, PlatformProbe, ProbeReport
from bitgrain.platforms.processors import allowed_processors

# flag as the kernel names it, to the feature name that kernels ask for
_X86_FLAGS = {
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512vl": "avx512vl",
    "avx512dq": "avx512dq",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_tile": "amx_tile",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
}
_ARM_FLAGS = {"asimd": "neon", "asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve"}


def _flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    for line in lines:
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def _name() -> str:
    """The processor's own name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), host.processor() or host.machine())


def _memory() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return total if limit == "max" else min(total, int(limit))


def _probe() -> ProbeReport:
    flags = _flags()
    features = {name for flag, name in {**_X86_FLAGS, **_ARM_FLAGS}.items() if flag in flags}
    return ProbeReport("cpu", "present", Platform("cpu", "cpu", frozenset({host.machine(), *features}), allowed_processors(), _memory(), devices=(_name(),)))


PLATFORM = PlatformProbe("cpu", "cpu", 0, _probe)
