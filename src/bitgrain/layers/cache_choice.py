"""Which KV cache an attention module gets: the checkpoint's word against the run's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bitgrain.errors import MissingTensorError, RequestError
from bitgrain.formats.attention_schemes import KVCacheScheme
from bitgrain.kvcache.spec import ELEMENT_SOURCES, KVCacheSpec

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
    "int8_per_token_head": "int8",
    "int4": "int4",
    "int4_per_token_head": "int4",
    "nvfp4": "nvfp4",
}


def choose_cache(attention: str, scheme: KVCacheScheme | None, scales: Mapping[str, tuple[float, ...]], asked: str) -> KVCacheSpec:
    """The cache specification of one attention module.

    "auto" follows the checkpoint: its element type with its stored scales, and 16-bit where it says nothing.

    Args:
        scales: which ("k", "v", "kv", "k_zero", "v_zero", "k_bias", "v_bias", "q") to stored values.
        asked:  "auto" or a key of CACHE_TYPES.
    Raises:
        RequestError: the name is unknown, or the type needs scales that the checkpoint does not store.
        MissingTensorError: the checkpoint announces static scales and does not store them.
    """
    if asked != "auto" and asked not in CACHE_TYPES:
        raise RequestError(f"kv_cache = {asked!r}", "no such cache type", f"auto or one of {', '.join(CACHE_TYPES)}", "choose one of them")
    announced = scheme.element if scheme else "none"
    element = announced if asked == "auto" else CACHE_TYPES[asked]
    if element == "none":
        return KVCacheSpec()
    # scales without an announced type are those of fp8_e4m3fn: no producer writes others that way
    meant_for = announced if announced != "none" else "fp8_e4m3fn"
    stored = _stored_spec(element, scheme, scales) if element == meant_for else None
    if stored is not None:
        return stored
    if asked == "auto":
        _refuse_without_scales(attention, element, scheme)
    # integers and nvfp4 compute their scales when they are written; fp8 asked for by name stores numbers as they are, and the
    # specification says so
    computed = "computed" in ELEMENT_SOURCES[element]
    return KVCacheSpec(element, source="computed" if computed else "unscaled by choice")


def of_latents(attention: str, spec: KVCacheSpec) -> KVCacheSpec:
    """The same cache for latent attention: latents are stored so, and the rotated keys beside them stay as they are.

    Raises:
        RequestError: scales are those of keys and values, of which such a cache has none.
    """
    if spec.source == "checkpoint" or spec.k_bias or spec.v_bias:
        raise RequestError(
            attention, f"a cache {spec.describe()}, of keys and values", "16-bit, or a type whose scales are not stored: latent attention caches neither keys nor values",
            "ask for another cache, such as kv_cache='16bit' (--kv-cache-dtype 16bit)",
        )  # fmt: skip
    return replace(spec, latent=True)


def _stored_spec(element: str, scheme: KVCacheScheme | None, scales: Mapping[str, tuple[float, ...]]) -> KVCacheSpec | None:
    """The specification with the checkpoint's scales; None if it stores none for both keys and values, or unset ones."""
    fixed = (scheme.fixed_scale,) if scheme is not None and scheme.fixed_scale is not None else None
    k = _positive(scales.get("k") or scales.get("kv") or fixed)
    v = _positive(scales.get("v") or scales.get("kv") or fixed)
    if k is None or v is None or element not in ELEMENT_SOURCES:
        return None
    return KVCacheSpec(
        element, k, v, "checkpoint", scales.get("k_zero", ()), scales.get("v_zero", ()),
        channel=scheme is not None and scheme.granularity == "channel", k_bias=scales.get("k_bias", ()), v_bias=scales.get("v_bias", ()),
    )  # fmt: skip


def _refuse_without_scales(attention: str, element: str, scheme: KVCacheScheme | None) -> None:
    """Raise unless the announced cache computes its scales when it is written."""
    dynamic = scheme is not None and scheme.dynamic
    if element not in ELEMENT_SOURCES or (dynamic and "computed" not in ELEMENT_SOURCES[element]):
        raise RequestError(
            attention, f"the checkpoint announces a KV cache of {scheme.describe() if scheme else element}",
            "16-bit, fp8 with stored scales, int8, int4 or nvfp4", "ask for another cache, such as kv_cache='16bit' (--kv-cache-dtype 16bit)",
        )  # fmt: skip
    if not dynamic:
        raise MissingTensorError(
            f"{attention}.k_scale, v_scale", f"absent or not above zero, though the checkpoint announces a {element} cache", "both scales",
            "fetch the checkpoint again, or ask for a 16-bit cache (kv_cache='16bit')",
        )  # fmt: skip


def _positive(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """The values, or None when they are absent or marked as unset (not above zero)."""
    return values if values and all(v > 0 for v in values) else None
