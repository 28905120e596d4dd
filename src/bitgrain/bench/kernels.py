"""Linear kernels: achieved rates over measured limits, and the ratio to torch's product of 16-bit weights in the same rounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from bitgrain.bench.limits import Machine, limit_of, seconds
from bitgrain.bench.sampling import Sample, sample
from bitgrain.errors import RequestError
from bitgrain.kernels.base import LinearProblem, Prepared
from bitgrain.kernels.selection import Policy, Selection, select
from bitgrain.platforms.host_memory import copied_weight
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, WeightSpec
from bitgrain.weights.block_float import block_float_spec
from bitgrain.weights.codebook import codebook_spec
from bitgrain.weights.super_block import super_block_spec
from bitgrain.weights.synthetic import sample_weight


def _integers(bits: int, group: int, scale: str, zero: str = "constant") -> WeightSpec:
    return WeightSpec("int_affine", f"uint{bits}", bits, "group" if group else "channel", group, zero=zero, scale_dtype=scale)


INT8_TOKEN = ActivationSpec("int8", "token", top=127.0)
CASES: dict[str, tuple[WeightSpec, ActivationSpec]] = {
    "w4-g128": (_integers(4, 128, "float16"), NO_ACTIVATION),
    "w4-g128-asym": (_integers(4, 128, "bfloat16", "integer"), NO_ACTIVATION),
    "w4-g32": (_integers(4, 32, "float16"), NO_ACTIVATION),
    "w8": (_integers(8, 0, "bfloat16"), NO_ACTIVATION),
    "w8a8": (_integers(8, 0, "bfloat16"), INT8_TOKEN),
    "fp8": (WeightSpec("float", "fp8_e4m3fn", 8, "block", block=(128, 128), scale_dtype="float32"), NO_ACTIVATION),
    "mxfp4": (block_float_spec("fp4_e2m1", 32, "e8m0"), NO_ACTIVATION),
    "nvfp4": (block_float_spec("fp4_e2m1", 16, "e4m3", "tensor"), NO_ACTIVATION),
    "q4_k": (super_block_spec("Q4_K"), NO_ACTIVATION),
    "q6_k": (super_block_spec("Q6_K"), NO_ACTIVATION),
    "nf4": (codebook_spec(4, 64), NO_ACTIVATION),
}
WORKING_SET = 600_000_000  # bytes through which weights rotate where one row is multiplied, so that they come from memory


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One kernel at one size.

    Args:
        nbytes:     of the prepared weight.
        torch_bf16: median seconds of torch's product in the same rounds.
        limit:      the fastest arithmetic that the kernel may use, a name of Machine.peaks().
        peak:       its operations per second.
    """

    case: str
    kernel: str
    fidelity: str
    rows: int
    n: int
    k: int
    nbytes: int
    taken: Sample
    torch_bf16: float
    limit: str
    peak: float

    @property
    def operations(self) -> float:
        return 2.0 * self.rows * self.n * self.k

    @property
    def of_read(self) -> float:
        return self.taken.share_of_read(self.nbytes)

    @property
    def of_arithmetic(self) -> float:
        return self.operations / self.taken.median / self.peak if self.peak else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "case": self.case, "kernel": self.kernel, "fidelity": self.fidelity, "rows": self.rows, "n": self.n, "k": self.k, "bytes": self.nbytes,
            "us": round(self.taken.median * 1e6, 1), "best_us": round(self.taken.best * 1e6, 1), "GB_per_s": round(self.nbytes / self.taken.median / 1e9, 2),
            "of_read": round(self.of_read, 3), "GFLOP_per_s": round(self.operations / self.taken.median / 1e9, 2), "of_arithmetic": round(self.of_arithmetic, 3), "arithmetic": self.limit,
            "times_torch_bf16": round(self.torch_bf16 / self.taken.median, 2), "read_GB_per_s": round(self.taken.read / 1e9, 1), "rejected": self.taken.rejected,
            "disturbed": self.taken.is_disturbed,
        }  # fmt: skip


def measure_kernels(names: Sequence[str], shapes: Sequence[tuple[int, int]], rows: Sequence[int], policy: Policy, platform: str, machine: Machine, repeats: int) -> Iterator[KernelRow]:
    """Rows as they are measured.

    Args:
        shapes: (N, K).
    Raises:
        RequestError: no case is called so.
    """
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise RequestError("bench kernels", f"no case is called {', '.join(unknown)}", f"some of {', '.join(CASES)}", "correct the names")
    peaks = machine.peaks()
    for n, k in shapes:
        dense = torch.randn(n, k).bfloat16()
        for name in names:
            weight, activation = CASES[name]
            selection = select(LinearProblem(weight, activation, n, k, "bfloat16"), platform, policy)
            for count in rows:
                yield _measure(name, selection, count, dense, peaks, machine, repeats)


def _measure(name: str, selection: Selection, rows: int, dense: torch.Tensor, peaks: dict[str, float], machine: Machine, repeats: int) -> KernelRow:
    (n, k), kernel = dense.shape, selection.kernel
    weight, activation = CASES[name]
    first = kernel.prepare(sample_weight(weight, n, k), activation)
    held = [_copied(first) for _ in range(_copies(first.nbytes, rows))]
    others = [copied_weight(dense) for _ in range(_copies(2 * n * k, rows))]
    x = torch.randn(rows, k).bfloat16()
    peer: list[float] = []

    def times() -> list[float]:
        peer.clear()
        own = []
        # each by itself: a step runs one product of the kernel after the other
        for turn in range(repeats + 2):
            own.append(seconds(partial(kernel.apply, x, held[turn % len(held)], None)))
        for turn in range(repeats + 2):
            peer.append(seconds(partial(torch.nn.functional.linear, x, others[turn % len(others)])))
        return own[2:]

    taken = sample(times, machine)
    return KernelRow(name, kernel.name, selection.fidelity.value, rows, n, k, first.nbytes, taken, sorted(peer[2:])[len(peer[2:]) // 2], *limit_of(selection.fidelity, weight, activation, peaks))


def _copies(nbytes: int, rows: int) -> int:
    return max(1, min(64, WORKING_SET // nbytes)) if rows == 1 else 1


def _copied(prepared: Prepared) -> Prepared:
    """A copy in large pages, as packed weights have them."""
    return replace(prepared, tensors={name: copied_weight(tensor) for name, tensor in prepared.tensors.items()})
