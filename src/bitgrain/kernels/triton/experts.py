"""Experts as two grouped products: rows sorted by expert, tables of pointers instead of stacked weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitgrain.kernels.base import ExpertsProblem, Fidelity, Join, Prepared, PreparedExpert, PreparedExperts, Refusal
from bitgrain.kernels.triton.availability import TritonKernel, missing
from bitgrain.kernels.triton.packed import Layout, fidelity_of, input_problem, pack, quantized, weight_problem, with_segments, with_zeros
from bitgrain.weights import ActivationSpec, Weight

# Rows of a tile: a little more than the rows that an expert gets on average, within these.
SMALLEST_TILE, LARGEST_TILE = 16, 64


class TritonExperts(TritonKernel):
    """Gate and up of all experts in one product, their join, down of all experts in one; then each row's terms, added up.

    Sums are float32; an integer product is exact.  Values between the products are rounded to x's dtype.
    """

    name = "triton.experts"

    def fidelity(self, problem: ExpertsProblem) -> Fidelity:
        found = {fidelity_of(linear, self.target.features) for linear in problem.linears}
        return next(f for f in (Fidelity.EMULATED, Fidelity.NATIVE, Fidelity.EXACT) if f in found)

    def refusal(self, problem: ExpertsProblem) -> Refusal | None:
        why = ""
        for what, linear in zip(("gate and up", "down"), problem.linears, strict=True):
            problem_here = weight_problem(linear.weight) or input_problem(linear, self.target.features) or _not_of_rows(linear.activation)
            why = why or (f"{what}: {problem_here}" if problem_here else "")
        why = why or missing(self.platform)
        return Refusal(why) if why else None

    def prepare(
        self,
        gate_up: Weight,
        down: Weight,
        gate_up_activation: ActivationSpec,
        down_activation: ActivationSpec,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> PreparedExpert:
        return PreparedExpert(pack(gate_up, gate_up_activation, self.target.features), pack(down, down_activation, self.target.features), gate_up_bias, down_bias)

    def assemble(self, experts: Sequence[PreparedExpert], join: Join) -> PreparedExperts:
        meta = {
            "gate_up": _Product([e.gate_up for e in experts], [e.gate_up_bias for e in experts]),
            "down": _Product([e.down for e in experts], [e.down_bias for e in experts]),
        }
        return PreparedExperts(tuple(experts), join, meta)

    def apply(self, x: Tensor, weight: Tensor, chosen: Tensor, prepared: PreparedExperts) -> Tensor:
        if x.shape[0] == 0:
            return torch.zeros_like(x)
        count = len(prepared.experts)
        rows, tile_expert, block = sort_rows(chosen, count)
        expert_of_row = chosen.flatten()
        first, second = prepared.meta["gate_up"], prepared.meta["down"]
        gate, up = first.run(x, chosen.shape[1], expert_of_row, rows, tile_expert, block).chunk(2, dim=-1)
        middle = prepared.join(gate, up)
        parts = second.run(middle, 1, expert_of_row, rows, tile_expert, block)
        return add_up(parts.view(*chosen.shape, -1), weight, chosen)


def _not_of_rows(activation: ActivationSpec) -> str:
    """Why an input cannot be quantized before its rows are sorted, each row by itself; empty when it can."""
    if activation.is_none:
        return ""
    if activation.dynamic and (activation.granularity == "tensor" or activation.second_scale == "dynamic"):
        return "takes ranges of activations of a token or a group, or stored ones: that of the whole input is one of the rows of each expert"
    return "takes stored zero points of 0" if not activation.dynamic and not activation.symmetric else ""


class _Product:
    """One of the two matrices of every expert, as a table of addresses."""

    def __init__(self, experts: Sequence[Prepared], biases: Sequence[Tensor | None]) -> None:
        from bitgrain.kernels.triton.grouped_gemm import COLUMNS

        experts, self.layout = _alike(experts)
        first = experts[0]
        self.shape, self.activation = first.shape, first.activation
        self.scale, self.zero = first.tensors["scale"], first.tensors.get("zero")
        self.biased = biases[0] is not None
        rows = [e.tensors if bias is None else {**e.tensors, "bias": bias} for e, bias in zip(experts, biases, strict=True)]
        addresses = [[row[name].data_ptr() if name in row else 0 for name in COLUMNS] for row in rows]
        self.table = torch.tensor(addresses, dtype=torch.int64, device=first.tensors["codes"].device)
        self.held = rows  # what the addresses point to
        self.stored = None
        if not first.activation.is_none and not first.activation.dynamic:
            self.stored = torch.tensor([e.activation.scale for e in experts], dtype=torch.float32, device=self.table.device)

    def run(self, x: Tensor, per_row: int, expert_of_row: Tensor, rows: Tensor, tile_expert: Tensor, block: int) -> Tensor:
        """[R, N] of x's dtype: row r is x[r // per_row] times the matrix of its expert; rows without an expert are not written."""
        from bitgrain.kernels.triton.grouped_gemm import launch

        out = torch.zeros(expert_of_row.shape[0], self.shape[0], dtype=x.dtype, device=x.device)
        stored = None
        if self.stored is not None:  # each expert quantizes its input with a scale of its own: one row per choice
            stored = self.stored[expert_of_row.clamp(min=0)][:, None]
            x, per_row = x.repeat_interleave(per_row, 0), 1
        values, scale, zero = quantized(self.layout, self.activation, x.contiguous(), stored)
        launch(values, scale, zero, out, self.table, rows, tile_expert, self.layout, self.scale, self.zero, self.biased, per_row, block)
        return out


def _alike(experts: Sequence[Prepared]) -> tuple[list[Prepared], Layout]:
    """The experts with one layout.

    Those of one problem may differ in what their zero points need, and in the longest group of act-order.
    """
    layouts = [e.meta["layout"] for e in experts]
    if len(set(layouts)) == 1:
        return list(experts), layouts[0]
    segment = max(layout.slots.segment for layout in layouts)
    changed = [with_segments(with_zeros(expert), segment) for expert in experts]
    return changed, changed[0].meta["layout"]


def sort_rows(chosen: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
    """Rows by expert, each expert's padded to whole tiles, without asking the device for their number.

    Args:
        chosen: int64 [M, P]; -1: nobody.  Row m * P + p is the choice of token m at place p.
    Returns:
        (rows int64 [tiles * block], -1 for padding; expert of each tile int32 [tiles], `count` for tiles that nobody needs; block).
    """
    flat = chosen.flatten()
    flat = torch.where(flat < 0, count, flat)
    average = flat.numel() / count
    block = min(LARGEST_TILE, max(SMALLEST_TILE, 1 << max(0, int(average) - 1).bit_length()))
    order = torch.argsort(flat, stable=True)
    # counted without asking the device for the largest number
    counts = torch.zeros(count + 1, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    tiles_of = (counts + block - 1).div(block, rounding_mode="floor")
    ends = torch.cumsum(tiles_of, 0)
    tiles = min(flat.numel(), count + 1) + flat.numel() // block  # the most that there can be
    expert = torch.searchsorted(ends[:count].contiguous(), torch.arange(tiles, device=flat.device), right=True).to(torch.int32)
    starts = torch.cumsum(counts, 0) - counts
    sorted_expert = flat[order]
    place = (ends - tiles_of)[sorted_expert] * block + torch.arange(flat.numel(), device=flat.device) - starts[sorted_expert]
    rows = torch.full((tiles * block,), -1, dtype=torch.int64, device=flat.device)
    rows[place] = order
    return rows, expert, block


def add_up(parts: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """[M, N] of the parts' dtype: weighted parts [M, P, N] added in the order of their experts' indices, each sum rounded."""
    terms = (parts * weight[..., None]).to(parts.dtype)
    terms = terms.masked_fill((chosen < 0)[..., None], 0)
    order = torch.argsort(chosen, dim=1)
    terms = terms.gather(1, order[..., None].expand_as(terms))
    out = torch.zeros_like(terms[:, 0])
    for place in range(chosen.shape[1]):
        out = out + terms[:, place]
    return out
