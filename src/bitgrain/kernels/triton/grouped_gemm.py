"""Grouped matrix product in Triton: rows sorted by expert, each tile of rows times its expert's packed matrix.

One source for every device that Triton compiles for.  This module imports triton, and is imported only when a product runs.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bitgrain.kernels.triton.ahead import CompileExample
from bitgrain.kernels.triton.availability import interpreted
from bitgrain.kernels.triton.linear_kernel import constants
from bitgrain.kernels.triton.packed import FLOATS, INT8, INTEGER, SEGMENT, WHOLE, Layout
from bitgrain.kernels.triton.packed_product import finish, product
from bitgrain.kernels.triton.rounding import narrowed
from bitgrain.kernels.triton.tuning import steps_of

# What the table of addresses holds of each expert, in this order.
COLUMNS = ("codes", "scale", "zero", "sums", "gather", "row_index", "bias")


@triton.jit
def grouped_gemm(
    a, a_scale, a_zero, out, table, rows, tile_expert,
    n, k, segment, width, segments, row_bytes, w_rows, w_group, w_groups, a_group, a_step, steps, row_div, experts,
    SCALE: tl.constexpr, ZERO_TYPE: tl.constexpr,
    BITS: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr, MIDDLE: tl.constexpr, DOT: tl.constexpr, FLOAT8: tl.constexpr, WIDE: tl.constexpr,
    ZERO: tl.constexpr, SCALES: tl.constexpr, POWERS: tl.constexpr, ROW_SCALED: tl.constexpr, GROUP_SCALED: tl.constexpr, SHIFTED: tl.constexpr,
    GATHER: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[r, n] = the packed product of row r // row_div of `a` with its expert's matrix (+ bias), for the rows r of one tile.

    Args:
        table:       int64 [experts, 7], addresses of COLUMNS; 0: none.
        rows:        int64 [tiles * BLOCK_M], row numbers in out; -1: none.
        tile_expert: int32 [tiles]; `experts` or more: no rows.
        SCALE, ZERO_TYPE: types of scales and zero points.
    """
    expert = tl.load(tile_expert + tl.program_id(0))
    if expert >= experts:
        return
    entry = table + expert * 7
    # addresses come from allocations, which are aligned for vectors
    codes = tl.multiple_of(tl.load(entry), 16).to(tl.pointer_type(tl.uint8))
    scale = tl.multiple_of(tl.load(entry + 1), 16).to(tl.pointer_type(SCALE))
    zero = tl.load(entry + 2).to(tl.pointer_type(ZERO_TYPE))
    sums = tl.load(entry + 3).to(tl.pointer_type(tl.int32))
    gather = tl.load(entry + 4).to(tl.pointer_type(tl.int32))
    row_index = tl.load(entry + 5).to(tl.pointer_type(tl.int32))
    bias = tl.load(entry + 6).to(tl.pointer_type(out.dtype.element_ty))
    m_at = tl.load(rows + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))
    n_at = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = tl.where(m_at >= 0, m_at // row_div, 0)
    row = tl.minimum(n_at, n - 1).to(tl.int64)
    if ROWS:
        scale_row = tl.load(row_index + row).to(tl.int64)
    else:
        scale_row = row // w_rows
    total = product(
        a, a_scale, a_zero, codes, scale, zero, sums, gather, source, row, scale_row, 0, steps,
        k, segment, width, segments, row_bytes, w_group, w_groups, a_group, a_step,
        BITS, UNIT, KIND, MIDDLE, DOT, FLOAT8, WIDE, ZERO, SCALES, POWERS, GROUP_SCALED, SHIFTED, GATHER, EVEN, BLOCK_N, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    y = finish(total, a_scale, a_step, scale, bias, source, row, scale_row, SCALES, POWERS, ROW_SCALED, BIAS)
    tl.store(out + m_at[None, :] * n + row[:, None], narrowed(y, out.dtype.element_ty, WIDE), mask=(n_at < n)[:, None] & (m_at >= 0)[None, :])


def launch(
    x: Tensor, x_scale: Tensor | None, x_zero: Tensor | None, out: Tensor, table: Tensor, rows: Tensor, tile_expert: Tensor,
    layout: Layout, scale: Tensor, zero: Tensor | None, biased: bool, per_row: int, block_m: int,
) -> None:  # fmt: skip
    """Run grouped_gemm over all tiles of `rows` and all columns of `out` [R, N].

    Args:
        x, x_scale, x_zero: what packed.quantized() gives, of R / per_row rows.
        scale, zero: of any expert: their types are those of all.
    """
    slots, n, k = layout.slots, out.shape[1], x.shape[1]
    block_k, grouped = max(steps_of(layout)), layout.a_group > 0
    block_n = min(64, max(16, triton.next_power_of_2(n)))
    grouped_gemm[(tile_expert.shape[0], triton.cdiv(n, block_n))](
        x, x if x_scale is None else x_scale, x if x_zero is None else x_zero, out, table, rows, tile_expert,
        n, k, slots.segment, slots.width, slots.count, slots.total // 8 * layout.bits, layout.w_rows, layout.w_group, layout.w_groups, max(1, layout.a_group),
        0 if x_scale is None or x_scale.shape[0] == 1 else x_scale.shape[1], slots.total // block_k, per_row, table.shape[0],
        SCALE=_type(scale), ZERO_TYPE=tl.float32 if zero is None else _type(zero),
        **constants(layout), SCALES=layout.scales, POWERS=layout.powers, ROW_SCALED=x_scale is not None and not grouped, GROUP_SCALED=grouped, SHIFTED=x_zero is not None,
        EVEN=slots.even(k), ROWS=layout.row_index, BIAS=biased, WIDE=interpreted(), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, enable_fp_fusion=False,
    )  # fmt: skip


def _type(tensor: Tensor) -> tl.dtype:
    return getattr(tl, str(tensor.dtype).removeprefix("torch."))


_SIZES = ("n", "k", "segment", "width", "segments", "row_bytes", "w_rows", "w_group", "w_groups", "a_group", "a_step", "steps", "row_div", "experts")
_TYPES = {
    "a": "*bf16", "a_scale": "*fp32", "a_zero": "*fp32", "out": "*bf16", "table": "*i64", "rows": "*i64", "tile_expert": "*i32", **dict.fromkeys(_SIZES, "i32"),
}  # fmt: skip
_PLAIN = {
    "SCALE": tl.float16, "ZERO_TYPE": tl.int16, "BITS": 4, "UNIT": 64, "KIND": INTEGER, "MIDDLE": 8, "DOT": FLOATS, "FLOAT8": tl.float8e5, "WIDE": False, "ZERO": 1,
    "SCALES": SEGMENT, "POWERS": False, "ROW_SCALED": False, "GROUP_SCALED": False, "SHIFTED": False, "GATHER": False, "EVEN": True, "ROWS": False, "BIAS": True,
    "BLOCK_N": 64, "BLOCK_M": 16, "BLOCK_K": 64,
}  # fmt: skip
_INT8 = {"ZERO_TYPE": tl.int32, "BITS": 8, "MIDDLE": 128, "DOT": INT8, "ZERO": 0, "SCALES": WHOLE, "ROW_SCALED": True}
COMPILE_EXAMPLES = [
    CompileExample(grouped_gemm, _TYPES, _PLAIN, "4 bits", only=("sm90", "gfx942"), multiples=("n", "k", "segment", "width", "row_bytes", "w_group")),
    CompileExample(grouped_gemm, {**_TYPES, "a": "*i8"}, {**_PLAIN, **_INT8}, "int8", only=("sm90",)),
]
