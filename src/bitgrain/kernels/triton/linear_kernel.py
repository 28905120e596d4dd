"""Linear modules in Triton: tiles of the output, for few rows with the columns split over programs, for many on programs that stay.

The terms of an output are added up in one order for every number of rows: the columns are cut into `splits` runs, each is summed in steps
of BLOCK_K, and the runs are added in order.  Few rows give each run to a program of its own and add the results afterwards, without
atomics; many rows sum the runs one after another in one program.  One source for every device that Triton compiles for.
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitgrain.kernels.triton.ahead import CompileExample
from bitgrain.kernels.triton.availability import interpreted
from bitgrain.kernels.triton.packed import COLUMN, E4M3, FLOATS, FP8, INT8, INTEGER, SEGMENT, WHOLE, Layout
from bitgrain.kernels.triton.packed_product import finish, product
from bitgrain.kernels.triton.rounding import narrowed
from bitgrain.kernels.triton.tuning import Tiles

# elements of a tile whose runs are added up
COMBINED_N, COMBINED_M = 128, 4


@triton.jit(do_not_specialize=["m"])
def linear_tiles(
    a, a_scale, a_zero, codes, scale, zero, sums, gather, row_index, bias, out, m,
    n, k, segment, width, segments, row_bytes, w_rows, w_group, w_groups, a_group, a_step, steps, per_split,
    BITS: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr, MIDDLE: tl.constexpr, DOT: tl.constexpr, FLOAT8: tl.constexpr, WIDE: tl.constexpr,
    ZERO: tl.constexpr, SCALES: tl.constexpr, POWERS: tl.constexpr, ROW_SCALED: tl.constexpr, GROUP_SCALED: tl.constexpr, SHIFTED: tl.constexpr,
    GATHER: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr, SPLITS: tl.constexpr, PARTIAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[m, n] (+ bias), or with PARTIAL out[split, m, n], the sums of one run of steps each; see packed_product.product.

    Args:
        row_index: int32 [N], the row of scales of each row, if ROWS; else that is n // w_rows.
        out:       [M, N], or float32 or int32 [SPLITS, M, N].
        steps:     of BLOCK_K slots; per_split of them are a run.
    """
    m_tiles = tl.cdiv(m, BLOCK_M)
    tiles = m_tiles * tl.cdiv(n, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        # programs that run together share rows of the weight, which is the larger operand
        n_at = tile // m_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        m_at = tile % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        row = tl.minimum(n_at, n - 1).to(tl.int64)
        source = tl.minimum(m_at, m - 1).to(tl.int64)
        if ROWS:
            scale_row = tl.load(row_index + row).to(tl.int64)
        else:
            scale_row = row // w_rows
        first_run = tl.program_id(1) if PARTIAL else 0
        total = product(
            a, a_scale, a_zero, codes, scale, zero, sums, gather, source, row, scale_row,
            first_run * per_split, tl.minimum(first_run * per_split + per_split, steps),
            k, segment, width, segments, row_bytes, w_group, w_groups, a_group, a_step,
            BITS, UNIT, KIND, MIDDLE, DOT, FLOAT8, WIDE, ZERO, SCALES, POWERS, GROUP_SCALED, SHIFTED, GATHER, EVEN, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        if SPLITS > 1 and not PARTIAL:
            for run in range(1, SPLITS):
                total += product(
                    a, a_scale, a_zero, codes, scale, zero, sums, gather, source, row, scale_row,
                    run * per_split, tl.minimum(run * per_split + per_split, steps),
                    k, segment, width, segments, row_bytes, w_group, w_groups, a_group, a_step,
                    BITS, UNIT, KIND, MIDDLE, DOT, FLOAT8, WIDE, ZERO, SCALES, POWERS, GROUP_SCALED, SHIFTED, GATHER, EVEN, BLOCK_N, BLOCK_M, BLOCK_K,
                )  # fmt: skip
        here = (n_at < n)[:, None] & (m_at < m)[None, :]
        at = source[None, :] * n + row[:, None]
        if PARTIAL:
            tl.store(out + first_run * m.to(tl.int64) * n + at, total, mask=here)
        else:
            y = finish(total, a_scale, a_step, scale, bias, source, row, scale_row, SCALES, POWERS, ROW_SCALED, BIAS)
            tl.store(out + at, narrowed(y, out.dtype.element_ty, WIDE), mask=here)


@triton.jit(do_not_specialize=["m"])
def combine_runs(
    parts, a_scale, scale, row_index, bias, out, m, n, w_rows, a_step,
    WIDE: tl.constexpr, SCALES: tl.constexpr, POWERS: tl.constexpr, ROW_SCALED: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out[m, n] of the runs' sums [SPLITS, M, N], added in order."""
    n_at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_at = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = (n_at < n)[:, None] & (m_at < m)[None, :]
    row = tl.minimum(n_at, n - 1).to(tl.int64)
    source = tl.minimum(m_at, m - 1).to(tl.int64)
    at = source[None, :] * n + row[:, None]
    total = tl.load(parts + at)
    for run in range(1, SPLITS):
        total += tl.load(parts + run * m.to(tl.int64) * n + at)
    if ROWS:
        scale_row = tl.load(row_index + row).to(tl.int64)
    else:
        scale_row = row // w_rows
    y = finish(total, a_scale, a_step, scale, bias, source, row, scale_row, SCALES, POWERS, ROW_SCALED, BIAS)
    tl.store(out + at, narrowed(y, out.dtype.element_ty, WIDE), mask=here)


def launch(x: Tensor, x_scale: Tensor | None, x_zero: Tensor | None, tensors: dict[str, Tensor], layout: Layout, bias: Tensor | None, out: Tensor, tiles: Tiles, cores: int) -> None:
    """out [M, N] = x W^T (+ bias); nothing here waits for the device.

    Args:
        x, x_scale, x_zero: what packed.quantized() gives.
        tensors: what packed.pack() made, of `layout`.
        cores:   programs that run at once, at least.
    """
    (m, n), slots = out.shape, layout.slots
    steps = slots.total // tiles.block_k
    splits = min(tiles.splits, steps)
    per_split = -(-steps // splits)
    splits = -(-steps // per_split)
    grid = triton.cdiv(m, tiles.block_m) * triton.cdiv(n, tiles.block_n)
    partial = splits > 1 and grid < cores
    grouped, a_step = layout.a_group > 0, 0 if x_scale is None or x_scale.shape[0] == 1 else x_scale.shape[1]
    scaling = {"ROW_SCALED": x_scale is not None and not grouped, "ROWS": layout.row_index, "BIAS": bias is not None, "WIDE": interpreted()}
    scaling |= {"SCALES": layout.scales, "POWERS": layout.powers, "SPLITS": splits}
    target = out
    if partial:
        raw = layout.dot == INT8 and layout.scales == WHOLE and not grouped
        target = torch.empty(splits, m, n, dtype=torch.int32 if raw else torch.float32, device=x.device)
    unused = tensors["codes"]
    index, scale, a_scale = tensors.get("row_index", unused), tensors["scale"], unused if x_scale is None else x_scale
    linear_tiles[(grid if partial else min(grid, tiles.waves * cores), splits if partial else 1)](
        x, a_scale, unused if x_zero is None else x_zero, tensors["codes"], scale, tensors.get("zero", unused), tensors.get("sums", unused),
        tensors.get("gather", unused), index, unused if bias is None else bias, target, m,
        n, x.shape[1], slots.segment, slots.width, slots.count, slots.total // 8 * layout.bits, layout.w_rows, layout.w_group, layout.w_groups, max(1, layout.a_group), a_step, steps, per_split,
        **constants(layout), **scaling, GROUP_SCALED=grouped, SHIFTED=x_zero is not None, EVEN=slots.even(x.shape[1]), PARTIAL=partial,
        BLOCK_N=tiles.block_n, BLOCK_M=tiles.block_m, BLOCK_K=tiles.block_k, num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if partial:
        combine_runs[(triton.cdiv(n, COMBINED_N), triton.cdiv(m, COMBINED_M))](
            target, a_scale, scale, index, unused if bias is None else bias, out, m, n, layout.w_rows, a_step, **scaling,
            BLOCK_N=COMBINED_N, BLOCK_M=COMBINED_M, enable_fp_fusion=False,
        )  # fmt: skip


def constants(layout: Layout) -> dict[str, object]:
    """Arguments of packed_product.product that a layout decides."""
    return {
        "BITS": layout.bits, "UNIT": layout.slots.unit, "KIND": layout.kind, "MIDDLE": layout.middle, "DOT": layout.dot,
        "FLOAT8": getattr(tl, layout.float8) if layout.float8 else tl.float8e5, "ZERO": layout.zero, "GATHER": not layout.slots.regular,
    }  # fmt: skip


_SIZES = ("m", "n", "k", "segment", "width", "segments", "row_bytes", "w_rows", "w_group", "w_groups", "a_group", "a_step", "steps", "per_split")
_MULTIPLES = ("n", "k", "segment", "width", "row_bytes", "w_group", "a_group")
_PLAIN = {
    "BITS": 4, "UNIT": 64, "KIND": INTEGER, "MIDDLE": 8, "DOT": FLOATS, "FLOAT8": tl.float8e5, "WIDE": False, "ZERO": 0, "SCALES": SEGMENT, "POWERS": False,
    "ROW_SCALED": False, "GROUP_SCALED": False, "SHIFTED": False, "GATHER": False, "EVEN": True, "ROWS": False, "BIAS": False, "SPLITS": 1, "PARTIAL": False,
    "BLOCK_N": 64, "BLOCK_M": 16, "BLOCK_K": 64,
}  # fmt: skip


def _example(
    name: str, x: str = "bf16", zero: str = "i16", out: str = "", feature: str = "", only: tuple[str, ...] = (), warps: int = 4, stages: int = 3, **changed: object
) -> CompileExample:
    types = {
        "a": f"*{x}", "a_scale": "*fp32", "a_zero": "*fp32", "codes": "*u8", "scale": "*fp16", "zero": f"*{zero}", "sums": "*i32", "gather": "*i32", "row_index": "*i32",
        "bias": "*bf16", "out": out or f"*{x}", **dict.fromkeys(_SIZES, "i32"),
    }  # fmt: skip
    return CompileExample(linear_tiles, types, {**_PLAIN, **changed}, name, feature, only, _MULTIPLES if changed.get("EVEN", True) else (), warps, stages)


_SM90 = ("sm90",)
COMPILE_EXAMPLES = [
    _example("4 bits, few rows", out="*fp32", stages=4, SPLITS=4, PARTIAL=True),
    _example("4 bits, many rows", "fp16", only=("sm90", "gfx942"), SPLITS=2, ZERO=1, BIAS=True, BLOCK_M=64, warps=8, stages=2),
    _example("7 bits, looked up columns", zero="fp32", only=_SM90, BITS=7, MIDDLE=64, ZERO=2, GATHER=True, EVEN=False),
    _example("3 bits, scales of columns", zero="fp32", only=_SM90, BITS=3, MIDDLE=4, ZERO=2, SCALES=COLUMN, ROWS=True, EVEN=False, BLOCK_K=32, UNIT=32, stages=2),
    _example("float32", "fp32", only=_SM90, BITS=8, MIDDLE=128, SCALES=WHOLE, stages=2),
    _example("int8", "i8", "i32", "*bf16", BITS=8, MIDDLE=128, DOT=INT8, SCALES=WHOLE, ROW_SCALED=True, ZERO=1, SHIFTED=True, BLOCK_K=128),
    _example("int8 groups", "i8", "i32", "*fp16", only=_SM90, DOT=INT8, GROUP_SCALED=True, BLOCK_K=128),
    _example("fp8 with 16 bits", only=("sm80", "gfx942"), KIND=E4M3, BITS=8, MIDDLE=0, BLOCK_M=64),
    _example("fp8", "u8", out="*bf16", feature="fp8_dot", KIND=E4M3, BITS=8, MIDDLE=0, DOT=FP8, FLOAT8=tl.float8e4nv, GROUP_SCALED=True, BLOCK_K=128),
    _example("fp8 fnuz", "u8", out="*bf16", feature="fp8_fnuz_dot", KIND=E4M3, BITS=8, MIDDLE=0, DOT=FP8, FLOAT8=tl.float8e4b8, ROW_SCALED=True, SCALES=WHOLE),
    CompileExample(
        combine_runs,
        {"parts": "*fp32", "a_scale": "*fp32", "scale": "*fp16", "row_index": "*i32", "bias": "*bf16", "out": "*bf16", **dict.fromkeys(("m", "n", "w_rows", "a_step"), "i32")},
        {"WIDE": False, "SCALES": WHOLE, "POWERS": False, "ROW_SCALED": True, "ROWS": False, "BIAS": True, "SPLITS": 4, "BLOCK_N": COMBINED_N, "BLOCK_M": COMBINED_M},
        only=_SM90,
    ),
]
