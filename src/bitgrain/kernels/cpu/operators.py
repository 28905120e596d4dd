"""torch operators around the native library, with fake implementations so that torch.compile traces through them.

The operators own no state: every tensor that a kernel reads is an argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.cpu.library import check, native

DTYPE_IDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_library = torch.library.Library("bitgrain", "FRAGMENT")
_library.define(
    "grouped_linear(Tensor x, Tensor codes, Tensor? scale, Tensor? zero, Tensor group_ends, Tensor? gather, Tensor? row_scale, Tensor? bias, "
    "int n, int code_kind, float zero_constant, ScalarType dtype, Tensor? second=None, Tensor? table=None, Tensor? whole_table=None, float whole_step=1.0) -> Tensor"
)
_library.define(
    "integer_linear(Tensor x, Tensor codes, Tensor scale, Tensor column_sums, Tensor? bias, int n, int rules, int ranges, "
    "float static_scale, int static_zero, float top) -> Tensor"
)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _grouped_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    group_ends: Tensor,
    gather: Tensor | None,
    row_scale: Tensor | None,
    bias: Tensor | None,
    n: int,
    code_kind: int,
    zero_constant: float,
    dtype: torch.dtype,
    second: Tensor | None = None,
    table: Tensor | None = None,
    whole_table: Tensor | None = None,
    whole_step: float = 1.0,
) -> Tensor:
    x = x.contiguous()
    y = x.new_empty(x.shape[0], n, dtype=dtype)
    if y.numel() == 0:
        return y
    status = native().bg_grouped_table(
        x.data_ptr(), DTYPE_IDS[x.dtype], x.shape[0], x.shape[1], _pointer(gather), codes.data_ptr(), code_kind,
        _pointer(scale), DTYPE_IDS[torch.float32 if scale is None else scale.dtype], _pointer(second), _pointer(table), _pointer(whole_table), whole_step, _pointer(zero), int(zero is not None and zero.is_floating_point()), zero_constant,
        group_ends.data_ptr(), group_ends.numel(), codes.shape[1], n, _pointer(row_scale), _pointer(bias), y.data_ptr(), DTYPE_IDS[dtype], torch.get_num_threads(),
    )  # fmt: skip
    check(status, "grouped_linear")
    return y


def _integer_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    column_sums: Tensor,
    bias: Tensor | None,
    n: int,
    rules: int,
    ranges: int,
    static_scale: float,
    static_zero: int,
    top: float,
) -> Tensor:
    x = x.contiguous()
    y = x.new_empty(x.shape[0], n)
    if y.numel() == 0:
        return y
    status = native().bg_integer(
        x.data_ptr(), DTYPE_IDS[x.dtype], x.shape[0], x.shape[1], rules, ranges, static_scale, static_zero, top,
        codes.data_ptr(), scale.data_ptr(), column_sums.data_ptr(), codes.shape[1], n, _pointer(bias), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    check(status, "integer_linear")
    return y


_library.impl("grouped_linear", _grouped_linear, "CPU")
_library.impl("integer_linear", _integer_linear, "CPU")


def _grouped_fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    group_ends: Tensor,
    gather: Tensor | None,
    row_scale: Tensor | None,
    bias: Tensor | None,
    n: int,
    code_kind: int,
    zero_constant: float,
    dtype: torch.dtype,
    second: Tensor | None = None,
    table: Tensor | None = None,
    whole_table: Tensor | None = None,
    whole_step: float = 1.0,
) -> Tensor:
    return x.new_empty(x.shape[0], n, dtype=dtype)


def _integer_fake(
    x: Tensor, codes: Tensor, scale: Tensor, column_sums: Tensor, bias: Tensor | None, n: int, rules: int, ranges: int, static_scale: float, static_zero: int,
    top: float,
) -> Tensor:
    return x.new_empty(x.shape[0], n)


torch.library.register_fake("bitgrain::grouped_linear", _grouped_fake)
torch.library.register_fake("bitgrain::integer_linear", _integer_fake)

grouped_linear = torch.ops.bitgrain.grouped_linear.default
integer_linear = torch.ops.bitgrain.integer_linear.default
