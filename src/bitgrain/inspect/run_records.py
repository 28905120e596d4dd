"""When and where a kernel last agreed with the definition: records that `bitgrain conformance --record` writes.

A record's key names the platform, the kernel and what it ran; that of a run on the host's tensors has the platform as KEY@host,
and never says anything about hardware.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from bitgrain.bundled import run_records_file
from bitgrain.conformance.suite import Result, proof_of
from bitgrain.errors import RequestError
from bitgrain.kernels.base import Kernel, Problem
from bitgrain.platforms.base import Platform
from bitgrain.platforms.probe import HOST

NOT_RUN = "not run on hardware"
Records = Mapping[str, Mapping[str, Any]]


def place_of(platform: Platform) -> str:
    """The platform as keys of records name it."""
    return platform.key + (HOST if platform.state == "simulated" else "")


def record_key(problem: Problem, place: str, kernel: str) -> str:
    """What a record of a cell of the matrix is about; sizes do not count."""
    return f"{place} {kernel}: {problem.operation} {problem.weight.describe()}, activation {problem.activation.describe()}"


def grid_key(place: str, kernel: str, operation: str) -> str:
    """What a record of a kernel's whole grid is about."""
    return f"{place} {kernel}: {operation} over the grid"


def record_of(platform: Platform, kernel: Kernel) -> dict[str, Any]:
    """{"date", "hardware", "torch", "how"}; how: "" on the device itself, else the kernel's proof."""
    if platform.state == "simulated":
        hardware = "the host, as " + platform.key + (f":{platform.generation}" if platform.generation else "")
    else:
        state = kernel.state() if callable(getattr(kernel, "state", None)) else ""
        build = state.partition("(")[2].rstrip(")") if state.startswith("available (") else ""
        hardware = (", ".join(dict.fromkeys(platform.devices)) or platform.key) + (f" ({build})" if build else "")
    return {"date": datetime.date.today().isoformat(), "hardware": hardware, "torch": torch.__version__, "how": proof_of(kernel, platform)}


def grid_record(platform: Platform, kernel: Kernel, result: Result, depth: str) -> dict[str, Any]:
    """As record_of(), with what ran: cases, refused, the worst error over the allowed one, and how much of the grid."""
    return {**record_of(platform, kernel), "cases": result.cases, "refused": result.refused, "error": result.error, "depth": depth}


@lru_cache(maxsize=1)
def run_records() -> Records:
    """The records that came with the package; empty where it came without."""
    try:
        records = json.loads(run_records_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return records if isinstance(records, dict) else {}


def read_records(path: Path) -> Records:
    """Records of a file.

    Raises:
        RequestError: it cannot be read, or holds something else.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(str(path), f"{type(error).__name__}: {error}", "a file that `bitgrain conformance --record` wrote", "correct the path") from None
    if not isinstance(records, dict) or not all(isinstance(r, dict) and {"date", "hardware"} <= set(r) for r in records.values()):
        raise RequestError(str(path), "no records of runs", "a file that `bitgrain conformance --record` wrote", "correct the path")
    return records


def write_records(path: Path, records: Records, replaced: str = "") -> None:
    """Add records to a file, which may not exist yet.

    Args:
        replaced: all older records of this place are left out; "": only those of the same keys are replaced.

    Raises:
        RequestError: the file holds something else, or cannot be written.
    """
    kept = {key: record for key, record in (read_records(path) if path.exists() else {}).items() if not (replaced and key.startswith(f"{replaced} "))}
    text = json.dumps(dict(sorted({**kept, **records}.items())), indent=1)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RequestError(str(path), f"{type(error).__name__}: {error}", "a file that can be written", "choose another path") from None


def last_run(problem: Problem, platform: str, kernel: str, records: Records | None = None) -> str:
    """Such as "2026-11-21 on Intel Xeon (amx)", "interpreter only, not run on hardware (2026-11-21)", or "not run on hardware"."""
    found = run_records() if records is None else records
    for place in (platform, platform + HOST):
        record = found.get(record_key(problem, place, kernel))
        if record is not None:
            return told(record)
    return NOT_RUN


def told(record: Mapping[str, Any]) -> str:
    """When and where, or how, in one phrase."""
    how = record.get("how", "")
    return f"{how} ({record['date']})" if how else f"{record['date']} on {record['hardware']}"
