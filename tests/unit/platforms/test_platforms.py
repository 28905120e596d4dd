"""Platforms: probed features, answers for what is absent, and memory that is given back."""

import sys
from pathlib import Path

import pytest
import torch

from bitgrain.errors import BitgrainError, RunError
from bitgrain.platforms import host_memory
from bitgrain.platforms.base import PlatformProbe, ProbeReport
from bitgrain.platforms.probe import default_platform, known_platforms, platform_of, probe_all


def test_host_is_present_with_cores_and_memory():
    platform = platform_of("cpu")
    assert platform.key == "cpu" and platform.cores >= 1 and platform.memory > 1 << 28
    assert default_platform() == platform


def test_every_known_platform_gives_one_of_four_answers():
    reports = probe_all()
    assert [r.key for r in reports] == known_platforms()
    assert all(r.state == "present" or r.state.startswith(("absent: ", "broken: ", "incompatible: ")) for r in reports)


def test_device_that_no_platform_serves_is_refused():
    with pytest.raises(RunError, match="abacus"):
        platform_of("abacus:0")


def test_forced_platform_is_honoured_or_refused(monkeypatch):
    monkeypatch.setenv("BITGRAIN_PLATFORM", "cpu")
    assert platform_of("cpu").key == "cpu"
    with pytest.raises(RunError, match="BITGRAIN_PLATFORM=cpu"):
        platform_of("anything")
    monkeypatch.setenv("BITGRAIN_PLATFORM", "abacus")
    with pytest.raises(BitgrainError, match="abacus"):
        default_platform()


def test_absent_platform_says_so():
    report = PlatformProbe("toy", "toy", 1, lambda: ProbeReport("toy", "absent")).probe()
    assert report.platform is None and report.as_dict()["features"] == []


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux") or host_memory._trim() is None, reason="needs Linux and a C library that can trim")
def test_gaps_between_living_tensors_are_given_back():
    kept, freed = [], []
    for _ in range(1500):  # below the size that the allocator maps by itself
        kept.append(torch.ones(2_000))
        freed.append(torch.ones(25_000))
    freed.clear()
    before = resident_bytes()
    host_memory.return_free_memory()
    assert resident_bytes() < before - 50_000_000
    assert len(kept) == 1500


def large_page_bytes() -> int:
    """Of this process, in private memory."""
    found = [line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("AnonHugePages:")]
    return int(found[0].split()[1]) * 1024


def large_pages_are_off() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return not setting.exists() or "[never]" in setting.read_text()


@pytest.mark.skipif(large_pages_are_off(), reason="needs a system with transparent large pages")
def test_memory_in_large_pages_is_in_them_and_goes_with_its_tensors():
    size, before, resident = 33 * host_memory.LARGE_PAGE + 5, large_page_bytes(), resident_bytes()
    data = host_memory.large_pages(size)
    assert data.numel() == size and data.data_ptr() % host_memory.LARGE_PAGE == 0 and not bool(data.any())
    view = data.fill_(1)[7:]
    del data
    assert large_page_bytes() - before >= 32 * host_memory.LARGE_PAGE
    assert resident_bytes() - resident < size + 2 * host_memory.LARGE_PAGE
    del view
    assert large_page_bytes() == before


def test_large_weights_alone_get_pages_of_their_own(monkeypatch):
    small, large = host_memory.empty_weight(3, 5, dtype=torch.float16), host_memory.empty_weight(3, host_memory.WORTH_MAPPING)
    assert small.shape == (3, 5) and small.dtype == torch.float16
    assert large.shape == (3, host_memory.WORTH_MAPPING) and large.is_contiguous() and large.data_ptr() % host_memory.LARGE_PAGE == 0

    def full(nbytes):
        raise OSError("no more mappings")

    monkeypatch.setattr(host_memory, "large_pages", full)
    source = torch.arange(host_memory.WORTH_MAPPING).view(2, -1).t()
    copy = host_memory.copied_weight(source)
    assert torch.equal(copy, source) and copy.is_contiguous() and copy.data_ptr() != source.data_ptr()


@pytest.mark.skipif(large_pages_are_off(), reason="needs a system with transparent large pages")
def test_small_prepared_weights_share_large_pages_that_go_with_the_last_of_them(monkeypatch):
    monkeypatch.setattr(host_memory, "_arena", host_memory._Arena())
    before, size = large_page_bytes(), host_memory.LARGE_PAGE // 2 + 3
    kept = [host_memory.kept_weight(1, size).fill_(turn) for turn in range(40)]  # more than one piece of memory
    assert len({tensor.untyped_storage().data_ptr() for tensor in kept}) == 2
    assert all(tensor.data_ptr() % host_memory.LINE == 0 and bool((tensor == turn).all()) for turn, tensor in enumerate(kept))
    assert large_page_bytes() - before >= 18 * host_memory.LARGE_PAGE
    last = kept.pop()
    kept.clear()
    assert bool((last == 39).all())
    del last
    assert large_page_bytes() == before


def test_small_prepared_weights_take_ordinary_memory_where_the_system_maps_no_more(monkeypatch):
    def full(nbytes):
        raise OSError("no more mappings")

    monkeypatch.setattr(host_memory, "_arena", host_memory._Arena())
    monkeypatch.setattr(host_memory, "_mapped", full)
    for rows in (1, host_memory.WORTH_SHARING, host_memory.WORTH_MAPPING):
        assert host_memory.kept_weight(rows, 1).shape == (rows, 1)
