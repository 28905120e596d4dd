"""How matrices and steps are described to the native library: the structures of native/include/decode_step.hpp.

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
    # reads and writes whole rows of buffers only
    whole: ClassVar[bool] = False
    kept: Tensor | None = None


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


class StepPlace(ctypes.Structure):
    """A column of a buffer."""

    _fields_ = [("buffer", NUMBER), ("column", NUMBER)]


class StepOperation(ctypes.Structure):
    """One operation, and where its own structure lies."""

    _fields_ = [("kind", NUMBER), ("source", StepPlace), ("second", StepPlace), ("target", StepPlace), ("call", ADDRESS)]


class NormCall(NativeCall):
    """Norms of neighbours of `size` entries."""

    kind = NORM
    _fields_ = [("weight", ADDRESS), ("bias", ADDRESS), ("size", NUMBER), ("heads", NUMBER), ("wide", NUMBER), ("weight_dtype", NUMBER), ("eps", REAL)]


class RotateCall(NativeCall):
    """Heads that are turned in place."""

    kind = ROTATE
    _fields_ = [("size", NUMBER), ("heads", NUMBER), ("interleaved", NUMBER), ("angles", NUMBER)]


class AppendCall(NativeCall):
    """Keys and values for the stores of a layer."""

    kind = APPEND
    _fields_ = [("layer", NUMBER), ("key_width", NUMBER), ("value_width", NUMBER)]


class AttendCall(NativeCall):
    """Attention of one query per row."""

    kind = ATTEND
    _fields_ = [
        ("sinks", ADDRESS), ("layer", NUMBER), ("heads", NUMBER), ("groups", NUMBER), ("size", NUMBER), ("value_size", NUMBER), ("window", NUMBER), ("scale", REAL),
        ("cap", REAL),
    ]  # fmt: skip


class GateCall(NativeCall):
    """silu(gate) * up."""

    kind = GATE
    _fields_ = [("width", NUMBER)]


class AddCall(NativeCall):
    """target += source."""

    kind = ADD
    _fields_ = [("width", NUMBER)]


class StepAngles(ctypes.Structure):
    """Cosines and sines of the rows."""

    _fields_ = [("cosine", ADDRESS), ("sine", ADDRESS), ("turned", NUMBER)]


class StepState(ctypes.Structure):
    """What changes from step to step."""

    _fields_ = [
        ("buffers", ADDRESS), ("widths", ADDRESS), ("angles", ADDRESS), ("stores", ADDRESS), ("lengths", ADDRESS), ("rows", NUMBER), ("dtype", NUMBER),
        ("threads", NUMBER),
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
