"""From a specification to the stores that keep to it."""

from __future__ import annotations

from bitgrain.kvcache.packed_stores import Int4Store, NVFP4Store, StaticInt4Store
from bitgrain.kvcache.spec import KVCacheSpec
from bitgrain.kvcache.stores import FP8, BiasedStore, Float8Store, Int8Store, PlainStore, StaticInt8Store, Store


def make_stores(spec: KVCacheSpec, most: int) -> tuple[Store, Store]:
    """(keys, values) stores of one attention module for sequences of up to `most` tokens; of latent attention (rotated keys, latents)."""
    if spec.latent:
        return PlainStore(most), _store(spec, most, (), ())
    keys = _store(spec, most, spec.k_scale, spec.k_zero)
    values = _store(spec, most, spec.v_scale, spec.v_zero)
    return (BiasedStore(keys, spec.k_bias) if spec.k_bias else keys), (BiasedStore(values, spec.v_bias) if spec.v_bias else values)


def _store(spec: KVCacheSpec, most: int, scale: tuple[float, ...], zero: tuple[float, ...]) -> Store:
    if spec.element in FP8:
        return Float8Store(most, spec.element, scale, spec.channel)
    if spec.element == "nvfp4":
        return NVFP4Store(most, scale)
    if spec.element in ("int8", "int4") and spec.source == "checkpoint":
        kind = StaticInt8Store if spec.element == "int8" else StaticInt4Store
        return kind(most, scale, zero, spec.channel)
    if spec.element == "int8":
        return Int8Store(most)
    return Int4Store(most) if spec.element == "int4" else PlainStore(most)
