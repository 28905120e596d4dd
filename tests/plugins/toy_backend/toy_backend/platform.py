"""The toychip: how it is found, and what its generations can do."""

from bitgrain.platforms.base import Platform, PlatformProbe, ProbeReport

GENERATIONS = {
    "t2": frozenset({"bf16", "fp16", "int8_dot", "t2"}),
    "t1": frozenset({"bf16", "fp16", "t1"}),
}


def probe() -> ProbeReport:
    """Looks, without raising."""
    try:
        from toy_backend import chip
    except ImportError as error:
        return ProbeReport("toychip", f"broken: the driver does not load: {error}")
    if not chip.CHIPS:
        return ProbeReport("toychip", "absent: the driver lists no chip")
    return ProbeReport("toychip", "present", Platform("toychip", "cpu", GENERATIONS["t2"], 1, 1 << 30, generation="t2", devices=chip.CHIPS))


# a rank below the host's own: the toy is used only when it is asked for
PLATFORM = PlatformProbe("toychip", "cpu", -1, probe, GENERATIONS)
