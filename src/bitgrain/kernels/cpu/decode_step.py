"""A whole decode step in one call of the native library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from bitgrain.kernels.base import Fidelity, Refusal
from bitgrain.kernels.cpu.dense import native_rows
from bitgrain.kernels.cpu.library import check, missing, native
from bitgrain.kernels.cpu.native_calls import (
    ADDRESS,
    NUMBER,
    AddCall,
    AppendCall,
    AttendCall,
    DenseCall,
    GateCall,
    NativeCall,
    NormCall,
    RotateCall,
    StepAngles,
    StepPlace,
    StepState,
    address,
)
from bitgrain.kernels.cpu.native_calls import StepOperation as NativeOperation
from bitgrain.kernels.cpu.operators import DTYPE_IDS
from bitgrain.kernels.cpu.step import NativeAttention, NativeGate, NativeNorm, NativeRotary
from bitgrain.kernels.decode_step import (
    AddOperation,
    AppendOperation,
    AttentionOperation,
    DecodeStepProblem,
    GateOperation,
    LinearOperation,
    NormOperation,
    Operation,
    Place,
    RotaryOperation,
    StepDescription,
    StepRows,
)

# Rows of a step in general; see dense.native_rows for those with a dense matrix.
MOST_ROWS = 256


class NativeDecodeStep:
    """See kernels.decode_step.DecodeStepKernel: every operation by the function that its own kernel calls, in one parallel region.

    What concerns a row alone is done by the thread that owns the row; threads meet around matrices, and around the attention of
    long contexts.
    """

    name = "cpu.decode_step"
    rank = 50

    def state(self) -> str:
        """ "available", or why not."""
        return missing() or "available"

    def fidelity(self, problem: DecodeStepProblem) -> Fidelity:
        return Fidelity.EXACT

    def refusal(self, problem: DecodeStepProblem) -> Refusal | None:
        why = missing() or problem.obstacle
        if why or problem.step is None:
            return Refusal(why or "no module has said what it does")
        for operation in problem.step.operations:
            why = _obstacle(operation)
            if why:
                return Refusal(why)
        return None

    def prepare(self, step: StepDescription) -> NativeStep:
        return NativeStep(self, step)

    def apply(self, operations: Any, count: int, state: Any, scratch: Tensor, counters: Tensor) -> None:
        """The native call alone, whose time is that of its operations."""
        check(native().bg_run_step(operations, count, state, scratch.data_ptr(), counters.data_ptr()), "decode step")


def _obstacle(operation: Operation) -> str:
    """Why the library cannot run an operation; empty where it can."""
    if isinstance(operation, LinearOperation):
        describe = getattr(operation.kernel, "native_call", None)
        if describe is None:
            return f"{operation.kernel.name} is not a function of the native library that a step can call"
        call = describe(operation.prepared, operation.bias)
        return f"{operation.kernel.name}: {call}" if isinstance(call, str) else ""
    wanted: dict[type, type] = {NormOperation: NativeNorm, RotaryOperation: NativeRotary, AttentionOperation: NativeAttention, GateOperation: NativeGate}
    needed = wanted.get(type(operation))
    kernel = getattr(operation, "kernel", None)
    return "" if needed is None or isinstance(kernel, needed) else f"{kernel.name} runs where {needed.name} would have to"  # type: ignore[union-attr,attr-defined]


class NativeStep:
    """See kernels.decode_step.RunnableStep.  Steps share buffers: one that another thread asks for waits."""

    def __init__(self, kernel: NativeDecodeStep, step: StepDescription) -> None:
        self._lock = Lock()
        self._kernel, self._dtype, self._widths = kernel, getattr(torch, step.dtype), tuple(step.widths)
        operations = _joined(step.operations)
        self._calls = [_CALLS[type(operation)](operation) for operation in operations]
        self._kept = (step, operations)  # own what the calls point to
        self._operations = (NativeOperation * len(operations))(*(_operation(o, call, self._widths) for o, call in zip(operations, self._calls, strict=True)))
        few = min(native_rows(self._dtype), MOST_ROWS)
        # of dense matrices only the head may be left to torch, behind the native call
        self.most_rows = few if any(isinstance(call, DenseCall) for call in self._calls[:-1]) else MOST_ROWS
        self._rows_with_head = few if isinstance(self._calls[-1], DenseCall) else MOST_ROWS
        self._row_widths = (NUMBER * len(self._widths))(*self._widths)
        self._counters = torch.zeros(len(operations), dtype=torch.int64)
        self._frames: dict[int, _Frame] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8)
        last = step.operations[-1]
        assert isinstance(last, LinearOperation)
        self._head, self._last = last, last.target.buffer

    def run(self, rows: StepRows) -> Tensor:
        with self._lock:
            return self._run(rows)

    def _run(self, rows: StepRows) -> Tensor:
        count = len(rows.lengths)
        frame = self._frames.get(count) or self._new_frame(count)
        with_head = count <= self._rows_with_head
        y = rows.x.new_empty(count if with_head else 0, self._widths[self._last])
        frame.addresses[0], frame.addresses[self._last] = rows.x.data_ptr(), y.data_ptr()
        for angles, (cosine, sine) in zip(frame.angles, rows.angles, strict=True):
            angles.cosine, angles.sine, angles.turned = cosine.data_ptr(), sine.data_ptr(), cosine.shape[-1]
        frame.stores[:] = [store.data_ptr() for store in rows.stores]
        frame.lengths[:] = rows.lengths
        frame.state.threads = torch.get_num_threads()
        state, operations = ctypes.addressof(frame.state), len(self._operations) - (not with_head)
        needed = native().bg_step_scratch(self._operations, operations, state)
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed * 5 // 4, dtype=torch.uint8)  # contexts grow
        self._kernel.apply(self._operations, operations, state, self._scratch, self._counters)
        if with_head:
            return y
        head, final = self._head, self._buffers[self._head.source.buffer][:count]
        logits: Tensor = head.kernel.apply(final, head.prepared, head.bias)
        return logits

    def _new_frame(self, count: int) -> _Frame:
        """Buffers for so many rows; larger ones are kept, so that batches that shrink and grow allocate nothing."""
        if not self._frames or count > max(self._frames):
            self._frames.clear()
            self._buffers = [torch.empty(0 if place in (0, self._last) else count, width, dtype=self._dtype) for place, width in enumerate(self._widths)]
        addresses = (ADDRESS * len(self._widths))(*(buffer.data_ptr() for buffer in self._buffers))
        frame = _Frame(addresses, (StepAngles * 2)(), (ADDRESS * count)(), (NUMBER * count)(), StepState())
        pointers = {name: ctypes.addressof(getattr(frame, name)) for name in ("angles", "stores", "lengths")}
        frame.state = StepState(buffers=ctypes.addressof(addresses), widths=ctypes.addressof(self._row_widths), rows=count, dtype=DTYPE_IDS[self._dtype], **pointers)
        self._frames[count] = frame
        return frame


@dataclass(slots=True)
class _Frame:
    """What a step of so many rows is told, and the arrays that `state` points to."""

    addresses: Any
    angles: Any
    stores: Any
    lengths: Any
    state: Any


def _joined(operations: Sequence[Operation]) -> list[Operation]:
    """The same with rotary embeddings of neighbours as one."""
    found: list[Operation] = []
    for one in operations:
        before = found[-1] if found else None
        if isinstance(one, RotaryOperation) and isinstance(before, RotaryOperation):
            a, b = before.place, one.place
            if a.buffer == b.buffer and a.first + a.width == b.first and replace(before, place=b) == one:
                found[-1] = replace(before, place=Place(a.buffer, a.first, a.width + b.width))
                continue
        found.append(one)
    return found


def _linear(operation: LinearOperation) -> NativeCall:
    call: NativeCall = operation.kernel.native_call(operation.prepared, operation.bias)
    return call


def _attend(o: AttentionOperation) -> AttendCall:
    scale = o.size**-0.5 if o.scale is None else o.scale
    sinks = None if o.sinks is None else o.sinks.float()
    call = AttendCall(address(sinks), o.layer, o.heads, o.groups, o.size, o.size, o.window or 0, scale, o.cap or 0.0)
    call.kept = sinks  # the structure holds an address only
    return call


_CALLS: dict[type, Callable[[Any], NativeCall]] = {
    LinearOperation: _linear,
    NormOperation: lambda o: NormCall(address(o.weight), address(o.bias), o.size, o.source.width // o.size, int(o.wide), DTYPE_IDS[o.weight.dtype], o.eps),
    RotaryOperation: lambda o: RotateCall(o.size, o.place.width // o.size, int(o.interleaved), int(o.local)),
    AppendOperation: lambda o: AppendCall(o.layer, o.keys.width, o.values.width),
    AttentionOperation: _attend,
    GateOperation: lambda o: GateCall(o.target.width),
    AddOperation: lambda o: AddCall(o.target.width),
}


def _operation(operation: Operation, call: NativeCall, widths: Sequence[int]) -> NativeOperation:
    """The operation with its places; `second` is the gate's other half, or the values beside keys."""
    if isinstance(operation, RotaryOperation):
        places = (operation.place, operation.place, operation.place)
    elif isinstance(operation, AppendOperation):
        places = (operation.keys, operation.values, operation.keys)
    elif isinstance(operation, GateOperation):
        places = (operation.gate, operation.up, operation.target)
    else:
        places = (operation.source, operation.source, operation.target)
    if call.whole:  # describe_step() gives matrices buffers of their own
        assert all(place.first == 0 and place.width == widths[place.buffer] for place in places)
    return NativeOperation(call.kind, *(StepPlace(place.buffer, place.first) for place in places), ctypes.addressof(call))
