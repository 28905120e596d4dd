"""Walsh-Hadamard transforms in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import Fidelity, HadamardProblem, Prepared, Refusal
from bitgrain.kernels.triton.availability import TritonKernel, missing
from bitgrain.weights import Hadamard

# Entries of a block that one program holds with its base, rows of that base, entries of the Sylvester factor.
LARGEST_TILE, LARGEST_BASE, LARGEST_WIDTH = 8192, 64, 16384
FEW = 1024  # entries of short rows that one program takes together


class TritonHadamard(TritonKernel):
    """Butterflies in float32, then the product with the base matrix; one rounding to x's dtype at the end.

    Powers of two come out as the definition's bits: the sums are the same ones.
    """

    name = "triton.hadamard"

    def fidelity(self, problem: HadamardProblem) -> Fidelity:
        return Fidelity.EXACT

    def refusal(self, problem: HadamardProblem) -> Refusal | None:
        width = problem.size // problem.order
        if width * problem.order != problem.size or width & (width - 1):
            return Refusal(f"takes a power of two times the base's size, not {problem.size} with a base of {problem.order}")
        if width > LARGEST_WIDTH:
            return Refusal(f"takes powers of two up to {LARGEST_WIDTH}, not {width}")
        why = missing(self.platform)
        return Refusal(why) if why else None

    def prepare(self, transform: Hadamard) -> Prepared:
        tensors = {}
        if transform.base is not None:
            base = transform.base.float()
            tensors["base"] = (base.t() if transform.transpose else base).contiguous()
        return Prepared((transform.size, transform.size), tensors, meta={"factor": transform.factor})

    def apply(self, x: Tensor, prepared: Prepared) -> Tensor:
        import triton

        from bitgrain.kernels.triton.hadamard_kernel import combine_rows, transform_blocks, transform_rows

        size, base = prepared.shape[0], prepared.tensors.get("base")
        order = 1 if base is None else base.shape[0]
        width, padded = size // order, triton.next_power_of_2(order)
        wide, factor = bool(triton.knobs.runtime.interpret), prepared.meta["factor"]
        x = x.contiguous()
        y = torch.empty_like(x)
        blocks = x.numel() // size
        if not blocks:
            return y
        stages = width.bit_length() - 1
        if base is None or (padded * width <= LARGEST_TILE and padded <= LARGEST_BASE):
            warps = 8 if padded * width > 4096 else 4
            signs = x if base is None else base
            transform_blocks[(blocks,)](x, signs, y, factor, ORDER=order, PADDED=padded, WIDTH=width, STAGES=stages, WIDE=wide, num_warps=warps)
            return y
        middle = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        rows = max(1, FEW // width)
        transform_rows[(triton.cdiv(blocks * order, rows),)](x, middle, blocks * order, ROWS=rows, WIDTH=width, STAGES=stages)
        block = min(64, max(16, triton.next_power_of_2(width)))
        grid = (blocks, triton.cdiv(order, 64), triton.cdiv(width, block))
        combine_rows[grid](middle, base, y, factor, order, width, WIDE=wide, ROWS=64, BLOCK=block, DEPTH=32)
        return y
