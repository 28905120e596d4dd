"""KEY[:GENERATION][@host]: what is asked for is honoured, or refused with every platform and why."""

import pytest

from bitgrain.errors import RequestError, RunError
from bitgrain.platforms import probe
from bitgrain.platforms.base import Platform, PlatformProbe, ProbeReport
from bitgrain.platforms.probe import (
    PlatformRequest,
    counting_on,
    default_device,
    default_platform,
    parse_request,
    platform_of,
    present,
    target,
)

FEATURES = {"old": frozenset({"old"}), "new": frozenset({"new", "fp16"})}
FOUND = Platform("toy", "toytype", frozenset({"fp16"}), 2, 1 << 30, generation="new", devices=("unusable", "Toy 1"))


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """A platform of two devices, the first of which cannot be used; `toy(report)` changes what its probe says."""
    monkeypatch.delenv("BITGRAIN_PLATFORM", raising=False)
    table = probe._probes()._values

    def install(report, rank=99):
        monkeypatch.setitem(table, "toy", PlatformProbe("toy", "toytype", rank, lambda: report() if callable(report) else report, FEATURES))
        probe.probe.cache_clear()

    install(ProbeReport("toy", "present", FOUND, {0: "Toy 0 is too old"}))
    yield install
    probe.probe.cache_clear()


@pytest.mark.parametrize("text", ["toy", "toy:old", "toy@host", "toy:new@host", "cpu"])
def test_request_is_read_and_written_alike(text):
    assert str(parse_request(text)) == text


@pytest.mark.parametrize(
    "text, found",
    [
        ("toi", "did you mean 'toy'"), ("CUDA", "did you mean 'cuda'"), ("", "not KEY"), (":new", "not KEY"), ("@host", "not KEY"), ("toy@hots", "not KEY"), ("toy@host@host", "not KEY"),
        ("toy:", "has no generation ''"), ("toy:nwe", "did you mean 'new'"), ("toy:0", "has no generation '0'"), ("cpu:avx2", "one of none"), ("cpu@host", "live on the host already"),
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused_with_the_nearest(text, found):
    with pytest.raises(RequestError) as error:
        parse_request(text)
    assert found in str(error.value) and repr(text) in error.value.where


def test_target_is_what_was_asked_for_else_found_else_described(toy):
    assert target("toy") == FOUND
    with counting_on("toy:old") as key:
        assert key == "toy" and (target("toy").state, target("toy").features, target("toy").generation) == ("planned", {"old"}, "old")
        with counting_on("toy:new@host"):
            assert (target("toy").state, target("toy").device_type) == ("simulated", "cpu")
        assert target("toy").generation == "old"
        with counting_on("toy"):
            assert target("toy") == FOUND
    assert target("toy") == FOUND
    toy(ProbeReport("toy", "absent: no device is visible"))
    assert (target("toy").state, target("toy").generation) == ("planned", "old")
    assert target("nobody") == Platform("nobody", "nobody", frozenset(), probe.PLANNED_CORES, probe.PLANNED_MEMORY, "planned")
    assert probe.described(PlatformRequest("toy", "new")).describe() == "planned for toy:new (fp16, new)"


def test_what_is_present_does_not_change_what_kernels_count_on():
    with counting_on("toy:old"):
        assert present("toy") == FOUND and target("toy").generation == "old"
    assert present("toy@host").state == "simulated" and target("toy") == FOUND
    with pytest.raises(RunError, match="a generation to plan for; the devices here are new"):
        present("toy:old")


def test_environment_is_kept_to_and_forgotten_with_it(monkeypatch):
    monkeypatch.setenv("BITGRAIN_PLATFORM", "toy:new@host")
    assert default_platform().state == "simulated" and default_device() == "cpu" and platform_of("cpu").key == "toy"
    with pytest.raises(RunError, match="BITGRAIN_PLATFORM=toy:new@host"):
        platform_of("toytype:1")
    monkeypatch.delenv("BITGRAIN_PLATFORM")
    assert target("toy") == FOUND
    monkeypatch.setenv("BITGRAIN_PLATFORM", "toy:nwe")
    for ask in (default_platform, default_device, lambda: platform_of("cpu"), lambda: target("toy")):
        with pytest.raises(RequestError, match="BITGRAIN_PLATFORM=toy:nwe"):
            ask()


def test_default_device_is_the_first_that_can_be_used(toy):
    assert default_platform() == FOUND and default_device() == "toytype:1" and platform_of("toytype:1") == FOUND
    toy(ProbeReport("toy", "present", FOUND))
    assert default_device() == "toytype"
    toy(ProbeReport("toy", "absent: no device is visible"))
    assert default_platform().key != "toy"


@pytest.mark.parametrize("device, why", [("toytype:0", "Toy 0 is too old"), ("toytype", "Toy 0 is too old"), ("toytype:2", "2 visible"), ("toytype:-1", "2 visible"), ("toytype:x", "2 visible")])
def test_device_that_cannot_be_used_is_refused(device, why):
    with pytest.raises(RunError, match=why):
        platform_of(device)


@pytest.mark.parametrize("ask", [lambda: platform_of("toytype"), lambda: present("toy"), lambda: platform_of("toytipe")], ids=["device", "platform", "misspelt"])
def test_impossible_request_is_refused_with_every_platform_and_why(ask, toy):
    toy(ProbeReport("toy", "broken: no driver"))
    with pytest.raises(RunError) as error:
        ask()
    assert all(f"    {key}: " in str(error.value) for key in probe.known_platforms())
    assert "toy: broken: no driver" in str(error.value) and "cpu: present" in str(error.value)


def test_probe_that_raises_is_an_answer(toy):
    def raising():
        raise OSError("wrong library")

    toy(raising)
    assert probe.probe("toy") == ProbeReport("toy", "broken: its probe raised OSError: wrong library")
