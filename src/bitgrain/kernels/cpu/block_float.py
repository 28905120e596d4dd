"""Small floats in blocks along K that share a one-byte scale (the MX formats, NVFP4) with activations in 16 or 32 bits, exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.errors import BadValueError
from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.kernels.cpu import panels
from bitgrain.kernels.cpu.native_calls import NativeCall
from bitgrain.kernels.cpu.native_kernel import NativeKernel
from bitgrain.kernels.cpu.native_packing import COLUMNS, NIBBLES, QUADS, pack_units
from bitgrain.numerics.small_floats import E4M3FN, SMALL_FLOATS, decode, decode_table, encode
from bitgrain.weights import ActivationSpec, BlockFloatWeight, Weight

# what a four-bit type is multiplied by to become whole numbers
WHOLE = {"fp4_e2m1": 2, "fp4_e0m3": 4}


@dataclass(frozen=True, slots=True)
class _Codes:
    """Packed codes of one kind, and what their values lack: weight = value * factor * scale."""

    kind: int
    packed: Tensor
    factor: float = 1.0


class BlockFloatLinear(NativeKernel):
    """y = sum over blocks of (scale * second) * dot(element, x), in float32.

    Four-bit elements are looked up, six-bit ones become E4M3, which holds them all.  A scheme's activation quantization is
    applied to x first; the products are wider than it asks for.
    """

    name = "cpu.block_float"
    rank = 50

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.EXACT if problem.activation.is_none else Fidelity.EMULATED

    def _refusal(self, problem: LinearProblem) -> Refusal | None:
        if problem.weight.kind != "block_float":
            return Refusal(f"takes small floats in blocks, not {problem.weight.kind} weights")
        return None

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, BlockFloatWeight)  # refusal() asked for the kind
        k = weight.in_features
        scale, second, size, index = _scales(weight)
        gather, group_ends = panels.layout_columns(k, size, index)
        codes = _pack(weight, scale, second, gather, int(group_ends[-1]))
        tensors = {"codes": codes.packed, "scale": panels.pack_group_values(panels.pad_rows(scale)), "group_ends": group_ends}
        if second is not None or codes.factor != 1:
            ones = torch.ones(weight.shape[0]) if second is None else second
            tensors["second"] = panels.pad_rows(ones * codes.factor)
        whole_step = 1.0
        if codes.kind == panels.TABLE4:
            tensors["table"] = decode_table(SMALL_FLOATS[weight.element]).clone()
            tensors["whole_table"] = (tensors["table"] * WHOLE[weight.element]).to(torch.int8)
            whole_step = 1 / WHOLE[weight.element]
        if gather is not None:
            tensors["gather"] = gather
        return Prepared(weight.shape, tensors, activation, {"kind": codes.kind, "zero": 0.0, "whole_step": whole_step})

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        return self._grouped(x, prepared, bias)

    def native_call(self, prepared: Prepared, bias: Tensor | None) -> NativeCall | str:
        return self._grouped_call(prepared, bias)


def _scales(weight: BlockFloatWeight) -> tuple[Tensor, Tensor | None, int, Tensor | None]:
    """(scale [N, G] bfloat16 or float32, second float32 [N] or None, columns per scale, the scale of each column where sizes differ).

    One-byte scales are exact in bfloat16; a second scale that changes along K is multiplied in, in float32.
    """
    n, k = weight.shape
    scale, second = weight.scales(), weight.second
    if second is None:
        return scale.bfloat16(), None, weight.block, None
    if second.shape[1] == 1:
        return scale.bfloat16(), second[:, 0].expand(n).contiguous(), weight.block, None
    column = torch.arange(k)
    starts = column[(column % weight.block == 0) | (column % weight.second_group == 0)]
    product = scale[:, starts // weight.block] * second.expand(n, -1)[:, starts // weight.second_group]
    if weight.second_group % weight.block == 0:
        return product, None, weight.block, None
    return product, None, 0, (torch.searchsorted(starts, column, right=True) - 1).to(torch.int32)


def _pack(weight: BlockFloatWeight, scale: Tensor, second: Tensor | None, gather: Tensor | None, units: int) -> _Codes:
    """The codes in the places of `gather`.

    Raises:
        BadValueError: E4M3 codes that are NaN, which the kernel has no number for.
    """
    k, stored = weight.in_features, weight.packed
    if weight.bits == 4:
        return _Codes(panels.TABLE4, pack_units(stored, 4, k, gather, units, NIBBLES))
    if weight.element == "int8":
        return _Codes(panels.BYTE, pack_units(stored, 8, k, gather, units, QUADS), 1 / 64)
    if weight.element == "fp8_e5m2":
        return _Codes(panels.E5M2, pack_units(stored, 8, k, gather, units, COLUMNS))
    kind = SMALL_FLOATS[weight.element]
    bad = int(((stored & 0x7F) == 0x7F).sum()) if kind is E4M3FN else 0
    if bad:
        raise BadValueError("weight", f"{bad} NaN codes", "finite values", "the file is damaged; fetch or write it again")
    largest = scale.float().abs().nan_to_num(nan=0.0).amax(1) * (1.0 if second is None else second.abs())
    if bool(torch.isfinite(largest * panels.E4M3_FACTOR).all()):
        fine = stored if kind is E4M3FN else encode(decode_table(kind), E4M3FN)[weight.codes().long()]
        return _Codes(panels.E4M3, pack_units(fine, 8, k, gather, units, COLUMNS), panels.E4M3_FACTOR)
    # scales near the end of float32 leave no room for the factor
    placed = panels.pad_rows(panels.place_columns(weight.codes(), gather, units * panels.UNIT, 0))
    return _Codes(panels.DENSE_BF16, panels.pack_pairs(decode(placed, kind).bfloat16()))
