"""Which tensors hold scales of the KV cache, and of which attention module, in every spelling that is known.

    <attention>.{k,v,q}_scale                     <attention>.{k,v}_zero_point, .{k,v}_bias
    <attention>.attn.{k,v,q}_scale                <attention>.kv_scale  (one for both)
    <attention>.{q,k,v,qkv}_proj.{k,v,q}_scale    <attention>.{q,k,v}_proj.output_scale
    <attention>.{k,v}_cache.scale                 <attention>.{q,k,v}.scale
    <attention>.{k,v}_proj.kv_cache_{scale,offset}  one per channel
    <attention>.fa_{q,k,v}.{scale,offset}           one per head

Source: formats specification, end of section 5; part 2, sections 2.4 and 6.1.
"""

from __future__ import annotations

from dataclasses import replace

from bitgrain.formats.attention_schemes import KVCacheScheme
from bitgrain.formats.base import ModuleView
from bitgrain.formats.config_reader import ConfigReader

# Local names that say by themselves which scale they are.
_BY_NAME = {
    "k_scale": "k", "v_scale": "v", "q_scale": "q", "kv_scale": "kv", "k_zero_point": "k_zero", "v_zero_point": "v_zero",
    "k_bias": "k_bias", "v_bias": "v_bias",
}  # fmt: skip
# Children of an attention module under which producers put its scales.
_INNER = frozenset({"attn", "k_proj", "v_proj", "q_proj", "qkv_proj"})
# Children whose own name says whose scale it is, with the local names of scales and of zero points.
_BY_CHILD = {
    **{f"{which}_proj": (which, ("output_scale", "kv_cache_scale"), ("kv_cache_offset",)) for which in "qkv"},
    **{f"{which}_cache": (which, ("scale",), ()) for which in "kv"},
    **{which: (which, ("scale",), ()) for which in "qkv"},
    **{f"fa_{which}": (which, ("scale",), ("offset",)) for which in "qkv"},
}


def kv_scale_of(full_name: str) -> tuple[str, str] | None:
    """(attention module, which) of a KV-cache scale; None for every other tensor.

    `which` is "k", "v", "q", "kv" (one scale for both), "k_zero", "v_zero", "q_zero", "k_bias" or "v_bias".
    """
    module, _, local = full_name.rpartition(".")
    parent, _, child = module.rpartition(".")
    if local in _BY_NAME and module:
        while child in _INNER and parent:
            module = parent
            parent, _, child = module.rpartition(".")
        return module, _BY_NAME[local]
    which, scales, zeros = _BY_CHILD.get(child, ("", (), ()))
    if (local in scales or local in zeros) and parent:
        outer, _, last = parent.rpartition(".")
        return (outer if last == "attn" and outer else parent), (which if local in scales else f"{which}_zero")
    return None


def kv_scales_in(module: ModuleView) -> tuple[tuple[str, str], ...]:
    """(full tensor name, which) of every KV-cache scale of an attention module, sorted.

    The view's keys may be local or full names, because some spellings lie below a child of the module.
    """
    prefix = f"{module.name}."
    names = sorted(key if key.startswith(prefix) else module.full_name(key) for key in module.tensors)
    return tuple((name, place[1]) for name in names if (place := kv_scale_of(name)) is not None)


# AutoRound's words for the type of a cache, in every format that it exports.
_STATIC_CACHES = {
    "fp8": "fp8_e4m3fn", "float8_e4m3fn": "fp8_e4m3fn", "torch.float8_e4m3fn": "fp8_e4m3fn", "": "none",
    **dict.fromkeys(("float", "float16", "bfloat16", "float32"), "none"),
}  # fmt: skip


def read_static_cache(reader: ConfigReader) -> KVCacheScheme:
    """What `static_kv_dtype` and `static_kv_granularity` say of every attention module; their scales are not in it yet."""
    element = reader.choice("static_kv_dtype", _STATIC_CACHES, "")
    return KVCacheScheme(element, reader.choice("static_kv_granularity", {"tensor": "tensor", "head": "head"}, "tensor"))


def static_cache_of(cache: KVCacheScheme, module: ModuleView) -> KVCacheScheme:
    """The scheme of one attention module; without a stated type stored scales stay unexplained."""
    return cache if cache.element == "none" else replace(cache, scales=kv_scales_in(module))
