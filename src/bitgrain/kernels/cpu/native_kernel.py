"""What the native linear kernels share."""

from __future__ import annotations

from torch import Tensor

from bitgrain.kernels.base import LinearProblem, Prepared, Refusal
from bitgrain.kernels.cpu.library import build_stamp, instruction_set, missing
from bitgrain.kernels.cpu.native_calls import NativeCall, grouped_call
from bitgrain.kernels.cpu.panel_rows import decoded_rows
from bitgrain.weights import ActivationSpec, WeightSpec


class NativeKernel:
    """A kernel of the native library; refuses when there is none."""

    @property
    def build(self) -> str:
        """What a remembered self-test depends on besides the kernel's name."""
        return f"{instruction_set()} {build_stamp()}"

    def state(self) -> str:
        """ "available (instruction set)", or why not."""
        return missing() or f"available ({instruction_set()})"

    def refusal(self, problem: LinearProblem) -> Refusal | None:
        why = missing()
        return Refusal(why) if why else self._refusal(problem)

    def _grouped_call(self, prepared: Prepared, bias: Tensor | None) -> NativeCall | str:
        """The same product as the native library is told of it, for callers in it; or why there is none."""
        if not prepared.activation.is_none:
            return f"its input is quantized ({prepared.activation.describe()}) outside of the native library"
        return grouped_call(prepared, bias)

    def _grouped(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        """The grouped product of a prepared weight with x, quantized as the scheme says."""
        from bitgrain.kernels.cpu.operators import grouped_linear

        t, n, meta, dtype = prepared.tensors, prepared.shape[0], prepared.meta, x.dtype
        x, row_scale = quantized_input(prepared.activation, x)
        y: Tensor = grouped_linear(
            x, t["codes"], t.get("scale"), t.get("zero"), t["group_ends"], t.get("gather"), row_scale, bias, n, meta["kind"], meta["zero"], dtype,
            t.get("second"), t.get("table"), t.get("whole_table"), meta.get("whole_step", 1.0),
        )  # fmt: skip
        return y

    def rows_refusal(self, spec: WeightSpec) -> str:
        """Why rows() does not give the numbers of dequantize() for such a weight; empty when it does."""
        return ""

    def rows(self, prepared: Prepared, index: Tensor) -> Tensor:
        """float32 [M, K]: rows int64 [M] of the weight, out of the prepared panels; the numbers of dequantize()."""
        return decoded_rows(prepared, index)

    def _refusal(self, problem: LinearProblem) -> Refusal | None:
        """Why the library cannot run the problem."""
        raise NotImplementedError


def quantized_input(activation: ActivationSpec, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What x amounts to after the scheme's activation quantization.

    Returns:
        (values, row_scale): x is values * row_scale[:, None], or values when row_scale is None.  With one scale per row,
        values are code - zero, below 2^8 or on a float8 grid and so exact in bfloat16; with scales per group they are float32.
    """
    if activation.is_none:
        return x, None
    if not activation.is_plain:
        return activation.fake_quantize(x), None
    codes, scale, zero = activation.quantize(x)
    return (codes.float() - zero).bfloat16(), scale.reshape(-1).expand(x.shape[0]).contiguous()
