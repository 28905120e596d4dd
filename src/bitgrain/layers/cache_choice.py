"""Which KV cache an attention module gets: the checkpoint's word against the run's."""

from __future__ import annotations

from collections.abc import Mapping

from bitgrain.errors import MissingTensorError, RequestError
from bitgrain.formats.base import KVCacheScheme
from bitgrain.kvcache.spec import KVCacheSpec

# What users type, in the spelling of either engine, to the element type of the cache; "none" is 16-bit.
CACHE_TYPES = {
    "16bit": "none",
    "bfloat16": "none",
    "bf16": "none",
    "float16": "none",
    "fp8": "fp8_e4m3fn",
    "fp8_e4m3": "fp8_e4m3fn",
    "fp8_e5m2": "fp8_e5m2",
    "int8": "int8",
}


def choose_cache(attention: str, scheme: KVCacheScheme | None, scales: Mapping[str, tuple[float, ...]], asked: str) -> KVCacheSpec:
    """The cache specification of one attention module.

    "auto" follows the checkpoint: its element type with its stored scales, and 16-bit where it says nothing.

    Args:
        scales: which ("k", "v", "kv", "k_zero", "v_zero", "q") to stored values.
        asked:  "auto" or a key of CACHE_TYPES.
    Raises:
        RequestError: the name is unknown, or the type needs scales that the checkpoint does not store.
        MissingTensorError: the checkpoint announces static scales and does not store them.
    """
    if asked != "auto" and asked not in CACHE_TYPES:
        raise RequestError(f"kv_cache = {asked!r}", "no such cache type", f"auto or one of {', '.join(CACHE_TYPES)}", "choose one of them")
    element = (scheme.element if scheme else "none") if asked == "auto" else CACHE_TYPES[asked]
    if element in ("none", "int8"):
        return KVCacheSpec(element=element, source="none" if element == "none" else "computed")
    k = _positive(scales.get("k") or scales.get("kv"))
    v = _positive(scales.get("v") or scales.get("kv"))
    if k is None or v is None:
        if asked == "auto":
            raise MissingTensorError(
                f"{attention}.k_scale, v_scale", f"absent or not above zero, though the checkpoint announces a {element} cache", "both scales",
                "fetch the checkpoint again, or ask for a 16-bit cache (kv_cache='16bit')",
            )  # fmt: skip
        # asked for by name on a checkpoint without scales: numbers are stored as they are, and the spec says so
        return KVCacheSpec(element=element, source="unscaled by choice")
    return KVCacheSpec(element=element, k_scale=k, v_scale=v, source="checkpoint")


def _positive(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """The values, or None when they are absent or marked as unset (not above zero)."""
    return values if values and all(v > 0 for v in values) else None
