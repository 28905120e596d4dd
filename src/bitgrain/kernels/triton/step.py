"""Norms, rotary embedding, gates and attention in Triton: one launch each, where torch needs many."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import Fidelity, Join, Refusal, StepProblem
from bitgrain.kernels.triton.availability import TritonKernel, missing
from bitgrain.numerics.gates import ClampedGate, parse_gate

GATES = {"silu": 0, "gelu": 1, "gelu_new": 2, "relu": 3}
CLAMPED = 4
# Entries of a head that the registers of a program hold; keys that are joined by themselves; rows of q up to which chunks run side by side.
LARGEST_HEAD, CHUNK, FEW_ROWS = 1024, 1024, 16


class _Step(TritonKernel):
    """What the steps share."""


    def fidelity(self, problem: StepProblem) -> Fidelity:
        return Fidelity.EXACT

    def refusal(self, problem: StepProblem) -> Refusal | None:
        why = self._beyond(problem) or missing(self.platform)
        return Refusal(why) if why else None

    def _beyond(self, problem: StepProblem) -> str:
        """Why the problem itself is not taken; empty when it is."""
        return ""


class TritonNorm(_Step):
    """See kernels.step.NormKernel."""

    name = "triton.norm"

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, wide: bool) -> Tensor:
        import triton

        from bitgrain.kernels.triton.step_kernels import norm_rows

        flat, y = _rows(x), x.new_empty(x.shape)
        if x.numel():
            block = min(4096, triton.next_power_of_2(x.shape[-1]))
            norm_rows[(flat.shape[0],)](
                flat, weight, x if bias is None else bias, y, x.shape[-1], flat.stride(0), eps, BIAS=bias is not None, LATE=wide, WIDE=_interpreted(), BLOCK=block,
                num_warps=8 if block > 2048 else 4,
            )  # fmt: skip
        return y


class TritonRotary(_Step):
    """See kernels.step.RotaryKernel."""

    name = "triton.rotary"

    def _beyond(self, problem: StepProblem) -> str:
        return _large(problem)

    def apply(self, x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
        import triton

        from bitgrain.kernels.triton.step_kernels import rotate_heads

        rows, heads, size = x.shape
        x = x if x.stride(2) == 1 else x.contiguous()
        y = x.new_empty(x.shape)
        if y.numel():
            width = triton.next_power_of_2(size)
            few = max(1, min(2048 // width, triton.next_power_of_2(heads)))
            rotate_heads[(rows, triton.cdiv(heads, few))](
                x, cosine.contiguous(), sine.contiguous(), y, heads, size, cosine.shape[-1], x.stride(0), x.stride(1),
                INTERLEAVED=interleaved, WIDE=_interpreted(), BLOCK_H=few, BLOCK_D=width, enable_fp_fusion=False,
            )  # fmt: skip
        return y


class TritonGate(_Step):
    """See kernels.step.GateKernel."""

    name = "triton.gate"

    def _beyond(self, problem: StepProblem) -> str:
        return "" if problem.detail in GATES or isinstance(parse_gate(problem.detail), ClampedGate) else f"computes {', '.join(GATES)} and clamped gates, not {problem.detail}"

    def apply(self, join: Join, gate: Tensor, up: Tensor) -> Tensor:
        import triton

        from bitgrain.kernels.triton.step_kernels import join_halves

        gate, up = _rows(gate), _rows(up)
        y = gate.new_empty(gate.shape)
        if y.numel():
            clamped = parse_gate(join.describe())
            alpha, limit = (clamped.alpha, clamped.limit) if isinstance(clamped, ClampedGate) else (0.0, 0.0)
            block = min(1024, triton.next_power_of_2(y.numel()))
            join_halves[(triton.cdiv(y.numel(), block),)](
                gate, up, y, y.numel(), gate.shape[1], gate.stride(0), up.stride(0), alpha, limit,
                GATE=GATES.get(join.describe(), CLAMPED), WIDE=_interpreted(), BLOCK=block, enable_fp_fusion=False,
            )  # fmt: skip
        return y


class TritonAttention(_Step):
    """See kernels.step.AttentionKernel.  Memory: of few rows over many keys, a float32 row of values per row, head and CHUNK keys."""

    name = "triton.attention"

    def _beyond(self, problem: StepProblem) -> str:
        return _large(problem)

    def apply(
        self, q: Tensor, keys: Tensor, values: Tensor, window: int | None, sinks: Tensor | None, scale: float | None, cap: float | None
    ) -> Tensor:
        import triton

        from bitgrain.kernels.triton.attention_kernel import attend, join_parts

        (count, heads, size), (length, groups, value_size) = q.shape, values.shape
        y = q.new_empty(count, heads, value_size)
        if not y.numel():
            return y
        q, keys, values = (part if part.stride(2) == 1 else part.contiguous() for part in (q, keys, values))
        per, depth, breadth = heads // groups, max(16, triton.next_power_of_2(size)), max(16, triton.next_power_of_2(value_size))
        if q.dtype == torch.float32:  # no instruction takes whole tiles of these
            block_l, tile = (32 if depth <= 128 else 16), 16
        else:
            block_l = 64 if depth <= 128 else (32 if depth <= 512 else 16)
            tile = 16 if count * per <= 16 or depth > 256 else 64
        chunks = triton.cdiv(length, CHUNK)
        beside = chunks > 1 and count <= FEW_ROWS
        shape = (chunks, count, heads)
        out = torch.empty(*shape, value_size, dtype=torch.float32, device=q.device) if beside else y
        peaks, totals = (torch.empty(shape if beside else (1,), dtype=torch.float32, device=q.device) for _ in range(2))
        sunk = q if sinks is None else sinks
        attend[(triton.cdiv(count * per, tile), groups, chunks if beside else 1)](
            q, keys, values, sunk, out, peaks, totals,
            count, length, heads, per, size, value_size, q.stride(0), q.stride(1), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
            length if window is None else window, size**-0.5 if scale is None else scale, cap or 1.0, CHUNK,
            SINKS=sinks is not None, CAPPED=cap is not None, PARTS=beside, WIDE=_interpreted(), BLOCK_M=tile, BLOCK_L=block_l, BLOCK_D=depth, BLOCK_E=breadth,
        )  # fmt: skip
        if beside:
            join_parts[(triton.cdiv(count * heads, 4),)](
                out, peaks, totals, sunk, y, count * heads, heads, value_size, chunks, SINKS=sinks is not None, WIDE=_interpreted(), BLOCK_M=4, BLOCK_E=breadth
            )
        return y


# (operation, class)
STEP_KERNELS = (("norm", TritonNorm), ("rotary", TritonRotary), ("gate", TritonGate), ("attention", TritonAttention))


def _large(problem: StepProblem) -> str:
    return f"takes heads of up to {LARGEST_HEAD} entries, not {problem.size}" if problem.size > LARGEST_HEAD else ""


def _rows(x: Tensor) -> Tensor:
    """x [..., K] as [M, K] whose rows are contiguous; a view where that is possible."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
