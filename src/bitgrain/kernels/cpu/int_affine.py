"""Integer weights of 1 to 8 bits with activations in 16 or 32 bits, exact."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.kernels.cpu import panels
from bitgrain.kernels.cpu.native_calls import NativeCall
from bitgrain.kernels.cpu.native_kernel import NativeKernel
from bitgrain.kernels.cpu.native_packing import NIBBLES, QUADS, pack_units
from bitgrain.weights import ActivationSpec, IntAffineWeight, Weight, WeightSpec


class IntAffineLinear(NativeKernel):
    """y = sum over groups of scale * (dot(code, x) - zero * sum(x)), in float32; codes of up to 4 bits take half a byte.

    Act-order becomes a gather of x.  A scheme's activation quantization is applied to x first; the products are wider than it asks for.
    """

    name = "cpu.int_affine"
    rank = 50

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.EXACT if problem.activation.is_none else Fidelity.EMULATED

    def _refusal(self, problem: LinearProblem) -> Refusal | None:
        if problem.weight.kind != "int_affine":
            return Refusal(f"takes integer weights, not {problem.weight.kind} ones")
        if problem.weight.row_index:
            return Refusal("takes groups along K, not along N")
        return None

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, IntAffineWeight)  # refusal() asked for the kind
        n, k = weight.shape
        small = weight.bits <= 4
        middle = 8 if small else 128
        gather, group_ends = panels.layout_columns(k, weight.group_size, weight.group_index)
        groups, units = group_ends.numel(), int(group_ends[-1])
        # the kernel reads signed codes: nibble - 8, or a byte with its top bit flipped
        packed = pack_units(weight.packed, weight.bits, k, gather, units, NIBBLES if small else QUADS, middle, 0 if small else 0x80)
        tensors = {
            "codes": packed,
            "scale": panels.pack_group_values(panels.pad_rows(_per_row(weight.scale[:, :groups], n))),
            "group_ends": group_ends,
        }
        constant = 0.0
        if isinstance(weight.zero, Tensor):
            zero = panels.pad_rows(_per_row(weight.zero[:, :groups] - middle, n))
            tensors["zero"] = panels.pack_group_values(zero)
        else:
            constant = float(weight.zero - middle)
        if gather is not None:
            tensors["gather"] = gather
        return Prepared((n, k), tensors, activation, {"kind": panels.NIBBLE if small else panels.BYTE, "zero": constant})

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        return self._grouped(x, prepared, bias)

    def native_call(self, prepared: Prepared, bias: Tensor | None) -> NativeCall | str:
        return self._grouped_call(prepared, bias)

    def rows_refusal(self, spec: WeightSpec) -> str:
        return "" if spec.zero != "float" else "fractional zero points are rounded while they are packed"

    def unpack(self, prepared: Prepared) -> Tensor:
        """Unsigned codes uint8 [N, K]: what prepare() packed, for tests."""
        codes, (n, k) = prepared.tensors["codes"], prepared.shape
        placed = panels.unpack_nibbles(codes) if prepared.meta["kind"] == panels.NIBBLE else panels.unpack_quads(codes) ^ 0x80
        gather = prepared.tensors.get("gather")
        if gather is None:
            return placed[:n, :k].contiguous()
        restored = torch.empty(n, k, dtype=torch.uint8)
        real = gather >= 0
        restored[:, gather[real].long()] = placed[:n][:, real]
        return restored


def _per_row(values: Tensor, n: int) -> Tensor:
    return values.expand(n, -1) if values.shape[0] == 1 else values
