"""The tensors in which HQQ stores how a module was quantized: numbers, flags and texts, one each.

    integers int32 []    flags uint8 []    texts uint8 [characters]    shape int64 [2]    nbits may be a float (1.58)

Source: hqq 0.2.8, core/utils.py (encode_safetensor_type) and core/quantize.py (HQQLinear.state_dict).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from bitgrain.checkpoint.headers import TensorHeader
from bitgrain.formats.base import TensorRule

_NUMBER: tuple[tuple[int, ...], ...] = ((), (1,))
_INTEGERS, _BYTES = ("I32", "I64"), ("U8",)
_FLAG = (("U8", "BOOL"), _NUMBER)
_TEXT: tuple[tuple[str, ...], tuple[tuple[int, ...], ...]] = (_BYTES, ((-1,),))

# Local name: (element types, shapes).  The first group decides what the codes mean; nothing follows from the second but
# how the producer made the module or computes with it.
_MEANING: Mapping[str, tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]] = {
    "nbits": ((*_INTEGERS, "F32"), _NUMBER),
    "group_size": (_INTEGERS, _NUMBER),
    "axis": (_INTEGERS, _NUMBER),
    "shape": (("I64", "I32"), ((2,),)),
    "packing": _TEXT,
    "view_as_float": _FLAG,
    "unpack_view_dtype": _TEXT,
    "quant_scale": _FLAG,
    "quant_zero": _FLAG,
    "channel_wise": _FLAG,
}
_NEUTRAL: Mapping[str, tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]] = {
    "compute_dtype": _TEXT,
    "offload_meta": _FLAG,
    "encoded_state_dict": _FLAG,
    "stores_quant_config": _FLAG,
    "optimize": _FLAG,
    "round_zero": _FLAG,
}
KINDS = {**_MEANING, **_NEUTRAL}
TEXTS = frozenset(name for name, kind in KINDS.items() if kind is _TEXT)
FLAGS = tuple(name for name, kind in KINDS.items() if kind is _FLAG)
# What every version of the writer stores.
ALWAYS = frozenset({"nbits", "axis", "shape", "packing"})
# What describes scales that are quantized themselves.
NESTED = ("nbits", "axis", "shape", "packing", "group_size", "view_as_float", "unpack_view_dtype", "compute_dtype")

Value = float | str | tuple[int, ...]


def descriptor_rules(required: frozenset[str], prefix: str = "", names: tuple[str, ...] = tuple(KINDS)) -> list[TensorRule]:
    """The rules of the descriptors `names`, their local names under `prefix`."""
    return [TensorRule(prefix + name, *KINDS[name], required=name in required) for name in names]


def read_descriptors(tensors: Mapping[str, TensorHeader], read_small: Callable[[str], Tensor], prefix: str = "") -> dict[str, Value]:
    """The values of the descriptors that are stored as they should be; comparing headers names the others.

    Args:
        tensors: local name to header.
        prefix:  of the local names, "" or "meta_scale." and the like.
    Returns:
        Name without prefix to a number (flags are 0 or 1), a text or a shape.
    """
    found: dict[str, Value] = {}
    for rule in descriptor_rules(frozenset()):
        header = tensors.get(prefix + rule.name)
        if header is None or header.dtype not in rule.dtypes or not rule.allows_shape(header.shape):
            continue
        values = read_small(header.name).reshape(-1).tolist()
        if rule.name in TEXTS:
            found[rule.name] = "".join(map(chr, values))
        elif rule.name == "shape":
            found[rule.name] = tuple(values)
        else:
            found[rule.name] = float(values[0])
    return found
