"""Processors that a process may use, and threads, under affinity and quotas of control groups."""

import os

import pytest
import torch

from bitgrain.platforms import processors
from bitgrain.platforms.processors import allowed_processors, limit_threads


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes files of a made-up system on which the process may run on 16 processors; its root."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)

    def write(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def test_affinity_counts_where_there_are_no_groups(system):
    assert allowed_processors(system()) == 16


@pytest.mark.parametrize("quota, processors", [("max 100000", 16), ("400000 100000", 4), ("250000 100000", 3), ("5000 100000", 1), ("9900000 100000", 16)])
def test_quota_of_a_unified_group_cuts_the_affinity(system, quota, processors):
    root = system(proc__self__cgroup="0::/\n", sys__fs__cgroup__cpu_dot_max=quota + "\n")
    assert allowed_processors(root) == processors


def test_smallest_of_all_groups_around_the_process_counts(system):
    root = system(
        proc__self__cgroup="0::/outer/inner\n", sys__fs__cgroup__outer__inner__cpu_dot_max="max 100000\n", sys__fs__cgroup__outer__cpu_dot_max="200000 100000\n",
        sys__fs__cgroup__cpu_dot_max="800000 100000\n",
    )  # fmt: skip
    assert allowed_processors(root) == 2


def test_quota_of_an_older_hierarchy_cuts_the_affinity(system):
    lines = "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n0::/\n"
    root = system(proc__self__cgroup=lines, sys__fs__cgroup__cpu__cpu_dot_cfs_quota_us="300000\n", sys__fs__cgroup__cpu__cpu_dot_cfs_period_us="100000\n")
    assert allowed_processors(root) == 3
    assert allowed_processors(system(sys__fs__cgroup__cpu__cpu_dot_cfs_quota_us="-1\n")) == 16


def test_threads_are_cut_to_the_quota_unless_the_user_set_their_number(system, monkeypatch):
    root = system(proc__self__cgroup="0::/\n", sys__fs__cgroup__cpu_dot_max="200000 100000\n")
    have, asked = [8], []
    monkeypatch.setattr(torch, "get_num_threads", lambda: have[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: (asked.append(count), have.__setitem__(0, count)))
    monkeypatch.setattr(processors, "variable", lambda name: "8" if name == "OMP_NUM_THREADS" else None)
    assert limit_threads(root) == 8 and asked == []
    monkeypatch.setattr(processors, "variable", lambda name: None)
    assert limit_threads(root) == 2 and asked == [2]
    have[0] = 1
    assert limit_threads(root) == 1 and asked == [2]
