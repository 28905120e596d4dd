"""How a matrix is described to the native library: structures of native/include/decode_step.hpp, filled from prepared tensors.

A structure holds addresses only; its owner keeps the tensors.
"""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

from torch import Tensor

from bitgrain.kernels.base import Prepared
from bitgrain.kernels.cpu.operators import DTYPE_IDS

ADDRESS, NUMBER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double

(NORM, ROTATE, APPEND, ATTEND, GATE, ADD, BLOCK, DENSE, GROUPED, INTEGER) = range(10)


class NativeCall(ctypes.Structure):
    """What an operation of the step runs; `kind` says which."""

    kind: ClassVar[int]
    # y of whole rows of a buffer only, x likewise
    whole: ClassVar[bool] = False


class BlockCall(NativeCall):
    """See bg_block_linear."""

    kind = BLOCK
    _fields_ = [("format", ADDRESS), ("data", ADDRESS), ("factor", ADDRESS), ("bias", ADDRESS), ("n", NUMBER), ("k", NUMBER), ("precision", NUMBER)]


class DenseCall(NativeCall):
    """See bg_dense."""

    kind, whole = DENSE, True
    _fields_ = [("weight", ADDRESS), ("bias", ADDRESS), ("n", NUMBER), ("k", NUMBER), ("weight_dtype", NUMBER)]


class GroupedCall(NativeCall):
    """See bg_grouped_table; x is not quantized."""

    kind, whole = GROUPED, True
    _fields_ = [
        ("gather", ADDRESS), ("codes", ADDRESS), ("scale", ADDRESS), ("second", ADDRESS), ("table", ADDRESS), ("whole_table", ADDRESS), ("zero", ADDRESS),
        ("group_ends", ADDRESS), ("bias", ADDRESS), ("n", NUMBER), ("k", NUMBER), ("code_kind", NUMBER), ("scale_dtype", NUMBER), ("zero_is_float", NUMBER),
        ("groups", NUMBER), ("units", NUMBER), ("zero_constant", REAL), ("whole_step", REAL),
    ]  # fmt: skip


class IntegerCall(NativeCall):
    """See bg_integer."""

    kind, whole = INTEGER, True
    _fields_ = [
        ("codes", ADDRESS), ("scale", ADDRESS), ("column_sums", ADDRESS), ("bias", ADDRESS), ("n", NUMBER), ("k", NUMBER), ("quads", NUMBER), ("rules", NUMBER),
        ("ranges", NUMBER), ("static_zero", NUMBER), ("static_scale", REAL), ("top", REAL),
    ]  # fmt: skip


def address(tensor: Tensor | None) -> int | None:
    """Where its first element lies; None of None."""
    return None if tensor is None else tensor.data_ptr()


def grouped_call(prepared: Prepared, bias: Tensor | None) -> GroupedCall:
    """The grouped product of a prepared weight with x as it is."""
    tensors, meta, (n, k) = prepared.tensors, prepared.meta, prepared.shape
    given: dict[str, Any] = {name: address(tensors.get(name)) for name in ("gather", "codes", "scale", "second", "table", "whole_table", "zero", "group_ends")}
    zero = tensors.get("zero")
    return GroupedCall(
        **given, bias=address(bias), n=n, k=k, code_kind=meta["kind"], scale_dtype=DTYPE_IDS[tensors["scale"].dtype],
        zero_is_float=int(zero is not None and zero.is_floating_point()), groups=tensors["group_ends"].numel(), units=tensors["codes"].shape[1],
        zero_constant=meta["zero"], whole_step=meta.get("whole_step", 1.0),
    )  # fmt: skip
