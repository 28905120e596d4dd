"""What the native linear kernels share."""

from __future__ import annotations

from bitgrain.kernels.base import LinearProblem, Refusal
from bitgrain.kernels.cpu.library import instruction_set, missing


class NativeKernel:
    """A kernel of the native library; refuses when there is none."""

    @property
    def build(self) -> str:
        """What a remembered self-test depends on besides the kernel's name."""
        return instruction_set()

    def state(self) -> str:
        """ "available (instruction set)", or why not."""
        return missing() or f"available ({instruction_set()})"

    def refusal(self, problem: LinearProblem) -> Refusal | None:
        why = missing()
        return Refusal(why) if why else self._refusal(problem)

    def _refusal(self, problem: LinearProblem) -> Refusal | None:
        """Why the library cannot run the problem."""
        raise NotImplementedError
