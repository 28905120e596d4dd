"""Quantized caches and attention operands: C8, int8 per channel, and FAQuant, per head.

    C8       code = round(k / kv_cache_scale + kv_cache_offset), one pair per channel of k_proj and v_proj (keys after RoPE)
    FAQuant  scale and offset of queries, keys and values, one per head; those of keys and values quantize the cache, and
             queries stay as they are
How operands are quantized stands under `<attention>.quant_type`: parts such as INT8, KV_FP8 or Q_INT8_DYNAMIC, one after
another; without letters a part means Q, K and V; DYNAMIC: scales are computed and none are stored.
Source: formats specification, part 2, sections 2.2, 2.4; msmodelslim 26.1.0 AscendV1Saver.update_fa_quant_type (grammar).
"""

from __future__ import annotations

import re

from bitgrain.errors import ConfigError, MissingTensorError
from bitgrain.formats.attention_schemes import KVCacheScheme
from bitgrain.formats.base import ModuleView
from bitgrain.formats.kv_scales import kv_scales_in
from bitgrain.formats.modelslim.description import KIND_ENDING, Description

ELEMENTS = {"INT8": "int8", "FP8": "fp8_e4m3fn", "MXFP4": "fp4_e2m1"}
# Tensors of a C8 cache below its attention module.
C8_TENSORS = ("k_proj.kv_cache_scale", "v_proj.kv_cache_scale", "k_proj.kv_cache_offset", "v_proj.kv_cache_offset")
_PART = re.compile(r"(?:([QKVP]+)_)?(INT8|FP8|MXFP4)(_DYNAMIC)?(?:_|$)")


def operand_kinds(text: str, where: str) -> dict[str, tuple[str, bool]]:
    """Operand ("Q", "K", "V", "P") to (element type, dynamic).

    Raises:
        ConfigError: the text is not made of such parts.
    """
    kinds: dict[str, tuple[str, bool]] = {}
    at = 0
    while at < len(text):
        part = _PART.match(text, at)
        if part is None:
            raise ConfigError(where, repr(text), "parts such as INT8, KV_FP8 or Q_INT8_DYNAMIC", "correct the description, or update bitgrain if the writer is newer")
        kinds |= {letter: (ELEMENTS[part[2]], part[3] is not None) for letter in part[1] or "QKV"}
        at = part.end()
    return kinds


def cache_scheme(module: ModuleView, description: Description) -> KVCacheScheme:
    """What the checkpoint says about the cache of one attention module.

    Raises:
        MissingTensorError: a cache is described and not all of its tensors are stored.
        ConfigError:        keys and values are described differently.
    """
    scales = kv_scales_in(module)
    announced = [name for name in C8_TENSORS if description.describes(module.full_name(name))]
    if announced or any(name.endswith(C8_TENSORS) for name, _ in scales):
        _require(module, scales, C8_TENSORS)
        return KVCacheScheme("int8", "channel", symmetric=False, scales=scales)
    kind = description.attention.get(module.name)
    if kind is None and not scales:
        return KVCacheScheme()
    # the older tool writes no kind: its operands are int8 with stored scales
    kinds = operand_kinds(kind or "INT8", f"{module.name}{KIND_ENDING}")
    element, dynamic = kinds.get("K", ("none", False))
    if kinds.get("V", ("none", False)) != (element, dynamic):
        raise ConfigError(f"{module.name}{KIND_ENDING}", repr(kind), "keys and values of one type", "a cache of two types is not supported by this version")
    if element == "none" or dynamic:
        return KVCacheScheme(element, "token_head" if dynamic else "tensor", scales=scales, dynamic=dynamic)
    _require(module, scales, ("fa_k.scale", "fa_v.scale"))
    return KVCacheScheme(element, "head", symmetric=False, scales=scales)


def _require(module: ModuleView, scales: tuple[tuple[str, str], ...], endings: tuple[str, ...]) -> None:
    stored = {name for name, _ in scales}
    missing = [ending for ending in endings if not any(name.endswith(f".{ending}") for name in stored)]
    if missing:
        there = ", ".join(sorted(stored)) or "nothing"
        raise MissingTensorError(
            module.full_name(missing[0]), f"absent, and {len(missing) - 1} more; stored are {there}", "all tensors of the quantized cache", "fetch or write the checkpoint again"
        )
