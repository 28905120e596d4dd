"""How one attention module's cache is stored; data only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite

from bitgrain.errors import RequestError

# Element type to where its scales may come from.
ELEMENT_SOURCES = {
    "none": ("none",),
    "fp8_e4m3fn": ("checkpoint", "unscaled by choice"),
    "fp8_e5m2": ("checkpoint", "unscaled by choice"),
    "int8": ("computed", "checkpoint"),
    "int4": ("computed", "checkpoint"),
    "nvfp4": ("computed", "checkpoint"),
}
ELEMENTS = tuple(ELEMENT_SOURCES)
SOURCES = ("none", "checkpoint", "computed", "unscaled by choice")
INTEGER_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """The element type of a cache and where its scales come from; value = (code - zero) * scale + bias.

    Args:
        element: "none" (the dtype of activations), "fp8_e4m3fn", "fp8_e5m2", "int8", "int4" or "nvfp4" (E2M1 in blocks of 16).
        k_scale: multipliers of keys: one for the module, one per key/value head, or one per channel; empty unless `source` is
                 "checkpoint".  For "nvfp4" the second scale, above those of the blocks.
        v_scale: multipliers of values, likewise.
        source:  "none" (nothing is scaled), "checkpoint" (stored), "computed" (per token and head, when written) or
                 "unscaled by choice" (fp8 of the numbers as they are, because the user asked for it by name).
        k_zero:  zero points of keys in the signed domain, as many as scales; empty: none.  For integers with stored scales only.
        v_zero:  of values, likewise.
        channel: scales and zero points are one per head and column, heads * head_dim of them, head after head.
        k_bias:  subtracted from keys before they are rounded and added when they are read: one number, one per head, per column
                 of a head, or per head and column; empty: none.
        v_bias:  of values, likewise.
        latent:  of latent attention: `element` is that of the latents, which take the place of values; the rotated keys beside
                 them are stored in the dtype of activations.
    Raises:
        RequestError: an unknown name, or numbers that are absent, superfluous, not finite or not possible.
    """

    element: str = "none"
    k_scale: tuple[float, ...] = ()
    v_scale: tuple[float, ...] = ()
    source: str = "none"
    k_zero: tuple[float, ...] = ()
    v_zero: tuple[float, ...] = ()
    channel: bool = False
    k_bias: tuple[float, ...] = ()
    v_bias: tuple[float, ...] = ()
    latent: bool = False

    def __post_init__(self) -> None:
        if self.element not in ELEMENT_SOURCES or self.source not in SOURCES:
            raise RequestError(
                "KV cache", f"element {self.element!r}, scales {self.source!r}",
                f"one of {', '.join(ELEMENTS)} and one of {', '.join(SOURCES)}", "correct the specification",
            )  # fmt: skip
        allowed = ELEMENT_SOURCES[self.element]
        if self.source not in allowed:
            raise RequestError(
                "KV cache", f"{self.element} with scales {self.source!r}", f"scales: {' or '.join(allowed)}", "correct the specification"
            )
        for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if bool(scale) != (self.source == "checkpoint") or not all(isfinite(s) and s > 0 for s in scale):
                needed = "finite values above zero" if self.source == "checkpoint" else "none"
                raise _refused(name, scale, needed)
        self._check_zeros()
        for name, bias in (("k_bias", self.k_bias), ("v_bias", self.v_bias)):
            if bias and (self.element == "none" or not all(isfinite(b) for b in bias)):
                raise _refused(name, bias, "finite values, for a quantized cache")

    def _check_zeros(self) -> None:
        half = 1 << (INTEGER_BITS.get(self.element, 1) - 1)
        for name, zero, scale in (("k_zero", self.k_zero, self.k_scale), ("v_zero", self.v_zero, self.v_scale)):
            possible = all(isfinite(z) and -half <= z < half and (self.channel or z == int(z)) for z in zero)
            if zero and (self.element not in INTEGER_BITS or len(zero) != len(scale) or not possible):
                kind = "number" if self.channel else "whole number"
                raise _refused(name, zero, f"one {kind} from {-half} to {half - 1} per integer scale")

    @property
    def granularity(self) -> str:
        """What shares a scale: "none", "tensor", "head", "channel" or "token_head"."""
        if self.source == "computed":
            return "token_head"
        if self.source != "checkpoint":
            return "none"
        if self.channel:
            return "channel"
        return "head" if max(len(self.k_scale), len(self.v_scale)) > 1 else "tensor"

    def describe(self) -> str:
        """Short text such as "fp8_e4m3fn tensor, scales from the checkpoint"."""
        if self.latent:
            return f"{replace(self, latent=False).describe()}, of latents" + ("" if self.element == "none" else "; rotated keys 16-bit")
        if self.element == "none":
            return "16-bit"
        biased = ", with biases" if self.k_bias or self.v_bias else ""
        if self.source == "unscaled by choice":
            return f"{self.element}, unscaled by choice{biased}"
        origin = "from the checkpoint" if self.source == "checkpoint" else "computed at write"
        return f"{self.element} {self.granularity}, scales {origin}{biased}"


def _refused(name: str, values: tuple[float, ...], needed: str) -> RequestError:
    shown = list(values) if len(values) <= 8 else f"{len(values)} values, from {min(values):g} to {max(values):g}"
    return RequestError(f"KV cache: {name}", str(shown), needed, "correct the checkpoint, or choose another cache type")
