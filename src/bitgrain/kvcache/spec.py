"""How one attention module's cache is stored; data only."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from bitgrain.errors import RequestError

ELEMENTS = ("none", "fp8_e4m3fn", "fp8_e5m2", "int8")
SOURCES = ("none", "checkpoint", "computed", "unscaled by choice")


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """The element type of a cache and where its scales come from; value = (code - zero) * scale.

    Args:
        element: "none" (the dtype of activations), "fp8_e4m3fn", "fp8_e5m2" or "int8".
        k_scale: multipliers of keys: one for the module, or one per key/value head; empty unless `source` is "checkpoint".
        v_scale: multipliers of values, likewise.
        source:  "none" (nothing is scaled), "checkpoint" (stored), "computed" (per token and head, when written) or
                 "unscaled by choice" (fp8 of the numbers as they are, because the user asked for it by name).
        k_zero:  zero points of keys in the signed domain, as many as scales; empty: none.  For "int8" with stored scales only.
        v_zero:  of values, likewise.
    Raises:
        RequestError: an unknown name, or scales that are absent, superfluous, not finite or not above zero.
    """

    element: str = "none"
    k_scale: tuple[float, ...] = ()
    v_scale: tuple[float, ...] = ()
    source: str = "none"
    k_zero: tuple[float, ...] = ()
    v_zero: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS or self.source not in SOURCES:
            raise RequestError(
                "KV cache", f"element {self.element!r}, scales {self.source!r}",
                f"one of {', '.join(ELEMENTS)} and one of {', '.join(SOURCES)}", "correct the specification",
            )  # fmt: skip
        allowed = {"none": ("none",), "int8": ("computed", "checkpoint")}.get(self.element, ("checkpoint", "unscaled by choice"))
        if self.source not in allowed:
            raise RequestError(
                "KV cache", f"{self.element} with scales {self.source!r}", f"scales: {' or '.join(allowed)}", "correct the specification"
            )
        for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if bool(scale) != (self.source == "checkpoint") or not all(isfinite(s) and s > 0 for s in scale):
                needed = "finite values above zero" if self.source == "checkpoint" else "none"
                raise RequestError(f"KV cache: {name}", str(list(scale)), needed, "correct the checkpoint, or choose another cache type")
        for name, zero, scale in (("k_zero", self.k_zero, self.k_scale), ("v_zero", self.v_zero, self.v_scale)):
            whole = all(z == int(z) and -128 <= z <= 127 for z in zero if isfinite(z)) and all(isfinite(z) for z in zero)
            if zero and (self.element != "int8" or len(zero) != len(scale) or not whole):
                raise RequestError(f"KV cache: {name}", str(list(zero)), "one whole number from -128 to 127 per int8 scale", "correct the checkpoint, or choose another cache type")

    @property
    def granularity(self) -> str:
        """What shares a scale: "none", "tensor", "head" or "token_head"."""
        if self.source == "computed":
            return "token_head"
        if self.source != "checkpoint":
            return "none"
        return "head" if max(len(self.k_scale), len(self.v_scale)) > 1 else "tensor"

    def describe(self) -> str:
        """Short text such as "fp8_e4m3fn tensor, scales from the checkpoint"."""
        if self.element == "none":
            return "16-bit"
        if self.source == "unscaled by choice":
            return f"{self.element}, unscaled by choice"
        return f"{self.element} {self.granularity}, scales " + (
            "from the checkpoint" if self.source == "checkpoint" else "computed at write"
        )
