"""When and where a kernel last ran a scheme and agreed with the definition: records that tools/support_matrix.py writes."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from bitgrain.bundled import run_records_file
from bitgrain.kernels.base import Problem


def record_key(problem: Problem, platform: str, kernel: str) -> str:
    """What a record is about; sizes do not count."""
    return f"{platform} {kernel}: {problem.operation} {problem.weight.describe()}, activation {problem.activation.describe()}"


@lru_cache(maxsize=1)
def run_records() -> dict[str, dict[str, Any]]:
    """Key to {"date", "hardware", "torch"}; empty where the package came without records."""
    try:
        records = json.loads(run_records_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return records if isinstance(records, dict) else {}


def last_run(problem: Problem, platform: str, kernel: str) -> str:
    """Such as "2026-11-21 on Intel Xeon (amx)", or "not run on hardware"."""
    record = run_records().get(record_key(problem, platform, kernel))
    return f"{record['date']} on {record['hardware']}" if record else "not run on hardware"
