"""Eight-bit floating-point weights with activations in 16 or 32 bits, exact."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.errors import BadValueError
from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.kernels.cpu import panels
from bitgrain.kernels.cpu.native_calls import NativeCall
from bitgrain.kernels.cpu.native_kernel import NativeKernel
from bitgrain.kernels.cpu.native_packing import COLUMNS, pack_units
from bitgrain.weights import ActivationSpec, FloatWeight, Weight

KINDS = {torch.float8_e4m3fn: panels.E4M3, torch.float8_e5m2: panels.E5M2}


class Float8Linear(NativeKernel):
    """y = sum over blocks of scale * dot(float8, x), in float32.

    A scheme's activation quantization is applied to x first; the products are wider than it asks for.
    """

    name = "cpu.float8"
    rank = 50

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.EXACT if problem.activation.is_none else Fidelity.EMULATED

    def _refusal(self, problem: LinearProblem) -> Refusal | None:
        if problem.weight.kind != "float":
            return Refusal(f"takes 8-bit floating-point weights, not {problem.weight.kind} ones")
        if problem.weight.element not in ("fp8_e4m3fn", "fp8_e5m2"):
            return Refusal(f"decodes fp8_e4m3fn and fp8_e5m2, not {problem.weight.element}")
        return None

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, FloatWeight)  # refusal() asked for the kind
        n, k = weight.shape
        raw = weight.codes.view(torch.uint8)
        fine = weight.codes.dtype == torch.float8_e4m3fn
        if fine and bool(((raw & 0x7F) == 0x7F).any()):
            raise BadValueError("weight", f"{int(((raw & 0x7F) == 0x7F).sum())} NaN codes", "finite values", "the file is damaged; fetch or write it again")
        gather, group_ends = panels.layout_columns(k, min(weight.block[1], k), None)
        codes = pack_units(raw, 8, k, gather, int(group_ends[-1]), COLUMNS)
        rows = torch.div(torch.arange(n), weight.block[0], rounding_mode="floor")
        scale = weight.scale[rows] * (panels.E4M3_FACTOR if fine else 1.0)
        tensors = {"codes": codes, "scale": panels.pack_group_values(panels.pad_rows(scale)), "group_ends": group_ends}
        if gather is not None:
            tensors["gather"] = gather
        return Prepared((n, k), tensors, activation, {"kind": KINDS[weight.codes.dtype], "zero": 0.0})

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        return self._grouped(x, prepared, bias)

    def native_call(self, prepared: Prepared, bias: Tensor | None) -> NativeCall | str:
        return self._grouped_call(prepared, bias)
