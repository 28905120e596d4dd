"""The experts of one layer in one native call, on the layouts of the linear kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bitgrain.kernels.base import ExpertsProblem, Fidelity, Join, LinearProblem, Prepared, PreparedExpert, PreparedExperts, Refusal
from bitgrain.kernels.cpu.block_float import BlockFloatLinear
from bitgrain.kernels.cpu.dense_panels import DensePanels
from bitgrain.kernels.cpu.expert_tables import is_integer, matrix_table, side_table
from bitgrain.kernels.cpu.float8 import Float8Linear
from bitgrain.kernels.cpu.int_affine import IntAffineLinear
from bitgrain.kernels.cpu.int_dot import IntDotLinear
from bitgrain.kernels.cpu.library import build_stamp, instruction_set, missing
from bitgrain.kernels.cpu.native_kernel import quantized_input
from bitgrain.kernels.cpu.super_block import SuperBlockLinear
from bitgrain.numerics.gates import ClampedGate, Gated
from bitgrain.weights import ActivationSpec, Weight


class MatrixKernel(Protocol):
    """What of a linear kernel prepares the matrices of experts."""

    def fidelity(self, problem: LinearProblem) -> Fidelity: ...

    def refusal(self, problem: LinearProblem) -> Refusal | None: ...

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared: ...


# native/include/experts.hpp
JOINS = {"silu": 0, "gelu": 1, "gelu_new": 2, "relu": 3}
CLAMPED = 4
# The first that takes a matrix prepares it.
MATRICES: tuple[MatrixKernel, ...] = (IntDotLinear(), IntAffineLinear(), Float8Linear(), BlockFloatLinear(), SuperBlockLinear(), DensePanels())


class NativeExperts:
    """y[m] = sum over p of weight[m, p] * down_e(join(gate_e(x[m]), up_e(x[m]))), sums in float32, one rounding of y.

    Gate, up and h are rounded to x's dtype.  Tokens are ordered by expert; the weights are read packed, and no dense copy of
    them is made.  A scheme's activation quantization other than int8 per token is applied between two native calls.
    """

    name = "cpu.experts"
    rank = 50

    @property
    def build(self) -> str:
        """What a remembered self-test depends on besides the kernel's name."""
        return f"{instruction_set()} {build_stamp()}"

    def state(self) -> str:
        """ "available (instruction set)", or why not."""
        return missing() or f"available ({instruction_set()})"

    def fidelity(self, problem: ExpertsProblem) -> Fidelity:
        kinds = [_matrix_kernel(linear).fidelity(linear) for linear in problem.linears]
        return next((kind for kind in (Fidelity.EMULATED, Fidelity.NATIVE) if kind in kinds), Fidelity.EXACT)

    def refusal(self, problem: ExpertsProblem) -> Refusal | None:
        why = missing()
        if why:
            return Refusal(why)
        for part, linear in zip(("gate and up", "down"), problem.linears, strict=True):
            if all(_refusal(kernel, linear) for kernel in MATRICES):
                return Refusal(f"multiplies {linear.weight.describe()} weights ({part}) in no native kernel of experts")
        return None

    def prepare(
        self,
        gate_up: Weight,
        down: Weight,
        gate_up_activation: ActivationSpec,
        down_activation: ActivationSpec,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> PreparedExpert:
        biases = [None if bias is None else bias.contiguous() for bias in (gate_up_bias, down_bias)]
        return PreparedExpert(_prepared(gate_up, gate_up_activation), _prepared(down, down_activation), biases[0], biases[1])

    def assemble(self, experts: Sequence[PreparedExpert], join: Join) -> PreparedExperts:
        gate_ups, downs = [e.gate_up for e in experts], [e.down for e in experts]
        known = _join(join)
        tables = {
            "gate_up": matrix_table(gate_ups, [e.gate_up_bias for e in experts]),
            "down": matrix_table(downs, [e.down_bias for e in experts]),
            "sides": torch.stack([side_table(gate_ups), side_table(downs)]),
            "join": known,
            # one call does it all: nothing between the two products needs torch
            "whole": known is not None and all(is_integer(p) or p.activation.is_none for e in experts for p in (e.gate_up, e.down)),
        }
        return PreparedExperts(tuple(experts), join, tables)

    def apply(self, x: Tensor, weight: Tensor, chosen: Tensor, prepared: PreparedExperts) -> Tensor:
        from bitgrain.kernels.cpu.expert_operators import experts

        if not prepared.meta["whole"]:
            return _apply_in_steps(x, weight, chosen, prepared)
        tables, (join, alpha, limit) = prepared.meta, prepared.meta["join"]
        size = prepared.experts[0].down.shape[1]
        y: Tensor = experts(x, weight, chosen, tables["gate_up"], tables["down"], tables["sides"], size, join, alpha, limit)
        return y


def _refusal(kernel: MatrixKernel, problem: LinearProblem) -> Refusal | None:
    if isinstance(kernel, IntDotLinear) and problem.activation.granularity == "tensor" and problem.activation.dynamic:
        return Refusal("quantizes the rows of an expert one by one")
    return kernel.refusal(problem)


def _matrix_kernel(problem: LinearProblem) -> MatrixKernel:
    return next(kernel for kernel in MATRICES if _refusal(kernel, problem) is None)


def _prepared(weight: Weight, activation: ActivationSpec) -> Prepared:
    n, k = weight.shape
    # no dtype of x decides on a layout
    return _matrix_kernel(LinearProblem(weight.spec, activation.without_values(), n, k, "float32")).prepare(weight, activation)


def _join(join: Join) -> tuple[int, float, float] | None:
    """(number, alpha, limit) of a join that the library knows."""
    if isinstance(join, ClampedGate):
        return CLAMPED, join.alpha, join.limit
    return (JOINS[join.describe()], 0.0, 0.0) if isinstance(join, Gated) and join.describe() in JOINS else None


def _apply_in_steps(x: Tensor, weight: Tensor, chosen: Tensor, prepared: PreparedExperts) -> Tensor:
    """Both products natively, quantization and join between them in torch."""
    flat = chosen.flatten()
    order = torch.argsort(flat, stable=True)
    order = order[int((flat < 0).sum()) :]
    if len(order) == 0:
        return torch.zeros_like(x)
    counts = torch.bincount(flat[order], minlength=len(prepared.experts))
    rows = torch.div(order, chosen.shape[1], rounding_mode="floor")
    gate, up = _product(x[rows], counts, prepared, "gate_up", 0).chunk(2, dim=-1)
    parts = _product(prepared.join(gate, up), counts, prepared, "down", 1, torch.float32)
    parts *= weight.flatten()[order, None].float()
    # a row's parts, in the order of experts: one of each row at a time
    places = torch.full((x.shape[0], chosen.shape[1]), -1, dtype=torch.int64)
    nth = torch.argsort(torch.argsort(rows, stable=True)) - _starts(rows, x.shape[0])[rows]
    places[rows, nth] = torch.arange(len(rows))
    y = torch.zeros(x.shape, dtype=torch.float32)
    for place in places.T:
        has = place >= 0
        y[has] += parts[place[has]]
    return y.to(x.dtype)


def _starts(rows: Tensor, count: int) -> Tensor:
    """int64 [count]: how many entries of `rows` are below each row."""
    per_row = torch.bincount(rows, minlength=count)
    return torch.cumsum(per_row, 0) - per_row


def _product(x: Tensor, counts: Tensor, prepared: PreparedExperts, name: str, side: int, dtype: torch.dtype | None = None) -> Tensor:
    """[pairs, N] of one matrix of the experts that pairs are ordered by; of x's dtype unless another is asked for."""
    from bitgrain.kernels.cpu.expert_operators import experts_product

    sides, matrices = prepared.meta["sides"], [getattr(expert, name) for expert in prepared.experts]
    dtype = x.dtype if dtype is None else dtype
    values, row_scale = (x, None) if is_integer(matrices[0]) else _quantized(x, counts, matrices)
    bias: Tensor | None = getattr(prepared.experts[0], f"{name}_bias")
    # the library adds a bias of y's dtype only
    native_bias = bias is None or bias.dtype == dtype
    table = prepared.meta[name] if native_bias else matrix_table(matrices, [None] * len(matrices))
    y: Tensor = experts_product(values, torch.cumsum(counts, 0), table, sides[side], row_scale, matrices[0].shape[0], dtype)
    if not native_bias:
        biases = torch.stack([getattr(expert, f"{name}_bias") for expert in prepared.experts])
        y += torch.repeat_interleave(biases.to(dtype), counts, dim=0)
    return y


def _quantized(x: Tensor, counts: Tensor, matrices: Sequence[Prepared]) -> tuple[Tensor, Tensor | None]:
    """quantized_input() of rows that are ordered by expert; each expert's stored values and ranges are its own."""
    first = matrices[0].activation
    if first.is_none:
        return x, None
    own = first.has_stored_values or (first.dynamic and (first.granularity == "tensor" or first.second_scale == "dynamic" or first.outlier_threshold is not None))
    if not own:
        return quantized_input(first, x)
    found = [quantized_input(matrix.activation, part) for matrix, part in zip(matrices, x.split(counts.tolist()), strict=True) if len(part)]
    scales = [scale for _, scale in found if scale is not None]
    return torch.cat([values for values, _ in found]), torch.cat(scales) if scales else None
