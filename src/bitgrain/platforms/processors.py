"""How many processors this process may use: its affinity, cut by the quotas of its control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from bitgrain.settings import variable


def allowed_processors(root: Path = Path("/")) -> int:
    """Processors of the affinity mask, or fewer where a control group allows less time than theirs; at least one.

    Args:
        root: of the file system, for tests.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(-(-quota // period) for quota, period in _quotas(root))]))


def limit_threads(root: Path = Path("/")) -> int:
    """Keep the pool of threads that torch and the native kernels share to allowed_processors(); returns its size.

    torch counts the affinity and knows no quota: more threads than a quota pays for are all stopped for the rest of each period as soon as
    they have used it up.  A number that OMP_NUM_THREADS sets is the user's and stays, and so does a smaller one.
    """
    import torch  # not above: allowed_processors() is asked before torch is loaded

    allowed = allowed_processors(root)
    if variable("OMP_NUM_THREADS") is None and torch.get_num_threads() > allowed:
        torch.set_num_threads(allowed)
    return torch.get_num_threads()


def _quotas(root: Path) -> Iterator[tuple[int, int]]:
    """(quota, period), both in microseconds, of every group that this process is in, from its own to the outermost that is visible."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts, files = ["sys/fs/cgroup", "sys/fs/cgroup/unified"], ["cpu.max"]
        elif "cpu" in controllers.split(","):
            mounts, files = [f"sys/fs/cgroup/{controllers}", "sys/fs/cgroup/cpu"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for mount in mounts:
            for folder in (group, *group.parents):
                # inside of a container the path may be the host's: then only the mount's root is there, which is the container's own group
                try:
                    quota, period = " ".join((root / mount / folder / name).read_text() for name in files).split()
                    if int(quota) > 0:
                        yield int(quota), int(period)
                except (OSError, ValueError):  # absent, or "max"
                    continue
