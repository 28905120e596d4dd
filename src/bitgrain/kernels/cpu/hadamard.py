"""Walsh-Hadamard transforms by the native library."""

from __future__ import annotations

from torch import Tensor

from bitgrain.kernels.base import Fidelity, HadamardProblem, Prepared, Refusal
from bitgrain.kernels.cpu.library import instruction_set, missing
from bitgrain.weights import Hadamard


class NativeHadamard:
    """Butterflies in float32, then the product with the base matrix; one rounding to x's dtype at the end.

    Powers of two come out as the definition's bits: the sums are the same ones.
    """

    name = "cpu.hadamard"
    rank = 50

    def state(self) -> str:
        """ "available (instruction set)", or why not."""
        return missing() or f"available ({instruction_set()})"

    def fidelity(self, problem: HadamardProblem) -> Fidelity:
        return Fidelity.EXACT

    def refusal(self, problem: HadamardProblem) -> Refusal | None:
        width = problem.size // problem.order
        if width * problem.order != problem.size or width & (width - 1):
            return Refusal(f"takes a power of two times the base's size, not {problem.size} with a base of {problem.order}")
        return Refusal(missing()) if missing() else None

    def prepare(self, transform: Hadamard) -> Prepared:
        tensors = {}
        if transform.base is not None:
            base = transform.base.float()
            tensors["base"] = (base.t() if transform.transpose else base).contiguous()
        return Prepared((transform.size, transform.size), tensors, meta={"factor": transform.factor})

    def apply(self, x: Tensor, prepared: Prepared) -> Tensor:
        from bitgrain.kernels.cpu.codebook_operators import hadamard

        y: Tensor = hadamard(x, prepared.tensors.get("base"), prepared.shape[0], prepared.meta["factor"])
        return y
