"""Norms, rotary embedding, gates and the attention of few rows by the native library.

Called with raw pointers and no operator in between: these take microseconds.  While torch compiles, and where the library's
functions do not fit, the plain ones of kernels.reference run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import Fidelity, Join, Refusal, StepProblem
from bitgrain.kernels.cpu.library import check, missing, native
from bitgrain.kernels.cpu.operators import DTYPE_IDS
from bitgrain.kernels.reference.attention import ReferenceAttention
from bitgrain.kernels.reference.step import ReferenceGate, ReferenceNorm, ReferenceRotary

LARGEST_HEAD = 1024  # entries that the rotary kernel turns; see native/include/step.hpp
# Rows of q up to which one pass over keys and values per row is faster than torch's blocked attention.
FEW_ROWS = 8


class _Native:
    """What the native ones share."""

    rank = 50

    def state(self) -> str:
        """ "available", or why not."""
        return missing() or "available"

    def fidelity(self, problem: StepProblem) -> Fidelity:
        return Fidelity.EXACT

    def refusal(self, problem: StepProblem) -> Refusal | None:
        why = missing()
        return Refusal(why) if why else self._refusal(problem)

    def _refusal(self, problem: StepProblem) -> Refusal | None:
        return None


class NativeNorm(_Native):
    """See kernels.step.NormKernel."""

    name = "cpu.norm"

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, wide: bool) -> Tensor:
        if torch.compiler.is_compiling():
            return ReferenceNorm().apply(x, weight, bias, eps, wide)
        flat = _rows(x)
        y = x.new_empty(x.shape)
        status = native().bg_norm(
            flat.data_ptr(), flat.shape[0], flat.shape[1], flat.stride(0), weight.data_ptr(), DTYPE_IDS[weight.dtype],
            None if bias is None else bias.data_ptr(), eps, int(wide), DTYPE_IDS[x.dtype], y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        check(status, "norm")
        return y


class NativeRotary(_Native):
    """See kernels.step.RotaryKernel."""

    name = "cpu.rotary"

    def _refusal(self, problem: StepProblem) -> Refusal | None:
        return Refusal(f"takes heads of up to {LARGEST_HEAD} entries, not {problem.size}") if problem.size > LARGEST_HEAD else None

    def apply(self, x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
        if torch.compiler.is_compiling() or cosine.dtype != x.dtype:
            return ReferenceRotary().apply(x, cosine, sine, interleaved)
        rows, heads, size = x.shape
        x = x if x.stride(2) == 1 and x.stride(1) == size else x.contiguous()
        cosine, sine = cosine.contiguous(), sine.contiguous()
        y = x.new_empty(rows, heads, size)
        status = native().bg_rotate(
            x.data_ptr(), rows, heads, size, x.stride(0), cosine.data_ptr(), sine.data_ptr(), cosine.shape[-1], int(interleaved), DTYPE_IDS[x.dtype], y.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        check(status, "rotary")
        return y


class NativeGate(_Native):
    """See kernels.step.GateKernel."""

    name = "cpu.gate"

    def _refusal(self, problem: StepProblem) -> Refusal | None:
        return None if problem.detail == "silu" else Refusal(f"computes silu, not {problem.detail}")

    def apply(self, join: Join, gate: Tensor, up: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return ReferenceGate().apply(join, gate, up)
        gate, up = _rows(gate), _rows(up)
        if gate.stride(0) != up.stride(0):
            gate, up = gate.contiguous(), up.contiguous()
        y = gate.new_empty(gate.shape)
        status = native().bg_gate(gate.data_ptr(), up.data_ptr(), *gate.shape, gate.stride(0), DTYPE_IDS[gate.dtype], y.data_ptr(), torch.get_num_threads())
        check(status, "gate")
        return y


class NativeAttention(_Native):
    """Few rows natively, in float32; more by torch's blocked attention.  See kernels.step.AttentionKernel."""

    name = "cpu.attention"

    def apply(
        self, q: Tensor, keys: Tensor, values: Tensor, window: int | None, sinks: Tensor | None, scale: float | None, cap: float | None
    ) -> Tensor:
        if q.shape[0] > FEW_ROWS or torch.compiler.is_compiling():
            return ReferenceAttention().apply(q, keys, values, window, sinks, scale, cap)
        (rows, heads, size), (total, groups, value_size) = q.shape, values.shape
        q, keys, values = (x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous() for x in (q, keys, values))
        sinks = None if sinks is None else sinks.float()
        y = q.new_empty(rows, heads, value_size)
        status = native().bg_attend(
            q.data_ptr(), rows, heads, size, q.stride(0), keys.data_ptr(), keys.stride(0), values.data_ptr(), values.stride(0), total, groups, value_size,
            window or 0, None if sinks is None else sinks.data_ptr(), size**-0.5 if scale is None else scale, cap or 0.0, DTYPE_IDS[q.dtype], y.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        check(status, "attention")
        return y


def _rows(x: Tensor) -> Tensor:
    """x [..., K] as [M, K] whose rows are contiguous; a view where that is possible."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()
