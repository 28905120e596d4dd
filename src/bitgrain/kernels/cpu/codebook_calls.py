"""The structures of native/include/codebook.hpp and hadamard.hpp, field by field, and the calls that take them."""

from __future__ import annotations

from ctypes import Structure, byref, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from bitgrain.kernels.cpu.library import check, native

DTYPE_IDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class CodeProduct(Structure):
    _fields_ = [
        ("x", c_void_p), ("x_dtype", c_int32), ("rows", c_int64), ("k", c_int64), ("n", c_int64), ("units", c_int64), ("gather", c_void_p),
        ("column_scale", c_void_p), ("column_offset", c_void_p), ("scale", c_void_p), ("scale_dtype", c_int32), ("scale_rows", c_int64), ("factor", c_float),
        ("bias", c_void_p), ("y", c_void_p), ("y_dtype", c_int32), ("threads", c_int32), ("scratch", c_void_p),
    ]  # fmt: skip


class AdditiveCodes(Structure):
    _fields_ = [
        ("codes", c_void_p), ("code_bytes", c_int32), ("bits", c_int32), ("count", c_int64), ("books", c_void_p), ("book_dtype", c_int32), ("h", c_int64), ("g", c_int64),
    ]  # fmt: skip


class LatticeCodes(Structure):
    _fields_ = [
        ("codes", c_void_p), ("residual", c_void_p), ("residual_bytes", c_int32), ("residual_factor", c_float), ("magnitudes", c_void_p), ("signs", c_void_p),
        ("shifts", c_void_p), ("second", c_void_p),
    ]  # fmt: skip


class TrellisCodes(Structure):
    _fields_ = [
        ("packed", c_void_p), ("bits", c_int32), ("window", c_int32), ("step", c_int32), ("decoder", c_int32), ("table_bits", c_int32), ("fragments", c_int32),
        ("table", c_void_p),
    ]  # fmt: skip


class VectorBook(Structure):
    _fields_ = [("codes", c_void_p), ("book", c_void_p), ("code_bytes", c_int32), ("start", c_void_p)]


class VectorCodes(Structure):
    _fields_ = [("main", VectorBook), ("residual", VectorBook), ("dtype", c_int32), ("v", c_int64), ("columns", c_int64), ("units", c_int64)]


class LookupCodes(Structure):
    _fields_ = [
        ("packed", c_void_p), ("row_bytes", c_int64), ("bits", c_int32), ("table", c_void_p), ("table_stride", c_int64), ("scale", c_void_p), ("scale_dtype", c_int32),
        ("groups", c_int64), ("units_per_group", c_int64),
    ]  # fmt: skip


class HadamardArgs(Structure):
    _fields_ = [
        ("x", c_void_p), ("y", c_void_p), ("dtype", c_int32), ("blocks", c_int64), ("size", c_int64), ("base", c_void_p), ("order", c_int64), ("factor", c_float),
        ("threads", c_int32), ("scratch", c_void_p),
    ]  # fmt: skip


def pointer(tensor: Tensor | None) -> int | None:
    """Address of the data, or None."""
    return None if tensor is None else tensor.data_ptr()


def product(
    call: str,
    codes: Any,
    x: Tensor,
    n: int,
    units: int,
    dtype: torch.dtype,
    bias: Tensor | None,
    gather: Tensor | None = None,
    column_scale: Tensor | None = None,
    column_offset: Tensor | None = None,
    scale: Tensor | None = None,
    scale_rows: int = 1,
    factor: float = 1.0,
) -> Tensor:
    """y [rows, n] of `dtype` from the native function `call`; the arguments as CodeProduct and `codes`, a structure or an array of them."""
    x = x.contiguous()
    y = x.new_empty(x.shape[0], n, dtype=dtype)
    if y.numel() == 0:
        return y
    common = CodeProduct(
        x.data_ptr(), DTYPE_IDS[x.dtype], x.shape[0], x.shape[1], n, units, pointer(gather), pointer(column_scale), pointer(column_offset), pointer(scale),
        0 if scale is None else DTYPE_IDS[scale.dtype], scale_rows, factor, pointer(bias), y.data_ptr(), DTYPE_IDS[dtype], torch.get_num_threads(), None,
    )  # fmt: skip
    more = () if isinstance(codes, Structure) else (len(codes),)
    check(getattr(native(), call)(byref(common), byref(codes), *more), call)
    return y
