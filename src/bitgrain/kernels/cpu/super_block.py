"""Weights in blocks with one or two levels of scales: exact with activations in 16 or 32 bits, or fast with 8-bit ones."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.errors import BadValueError
from bitgrain.kernels import block_layouts
from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.kernels.cpu import block_packing
from bitgrain.kernels.cpu.library import instruction_set
from bitgrain.kernels.cpu.native_calls import BlockCall, NativeCall, address
from bitgrain.kernels.cpu.native_kernel import NativeKernel
from bitgrain.weights import ActivationSpec, BlockFloatWeight, Weight

EXACT, INT8 = 0, 1
# one-byte scales from here on are no positive numbers
E8M0_LAST, E4M3_LAST = 0xFF, 0x7F
# instruction sets with products of bfloat16
BFLOAT16_SETS = ("avx512bf16", "amx")


class SuperBlockLinear(NativeKernel):
    """y = sum over groups of scale * dot(code - zero, x) + minimum * sum(x), the dot products in integers.

    Per 32 in features, x is a power of two times up to four signed bytes: 31 bits below the largest of them, so products are
    those of x itself unless magnitudes inside 32 neighbours differ by more than 2^7 (float32), 2^20 (float16) or 2^23 (bfloat16);
    what is lost then is below 2^-31 of the largest.  Each group rounds once, and groups are added in float32.
    """

    name = "cpu.super_block"
    rank = 55
    precision = EXACT

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.EXACT

    def _refusal(self, problem: LinearProblem) -> Refusal | None:
        return self._unsuitable(problem) or _better_elsewhere(problem)

    def _unsuitable(self, problem: LinearProblem) -> Refusal | None:
        if not problem.activation.is_none:
            return Refusal("does not quantize activations as schemes ask for")
        layout = block_layouts.layout_of(problem.weight)
        if isinstance(layout, str):
            return Refusal(layout)
        if problem.k % block_packing.UNIT:
            return Refusal(f"takes K in multiples of {block_packing.UNIT}")
        return None

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        if isinstance(weight, BlockFloatWeight):
            _check_scales(weight)
        layout, parts = block_layouts.split(weight)
        dtype = torch.float16 if parts.scale is None else parts.scale.dtype
        tensors = {"packed": block_packing.pack(layout, parts, weight.shape[1]), "format": torch.tensor(layout.format(dtype), dtype=torch.int32)}
        if parts.factor is not None:
            tensors["factor"] = parts.factor
        return Prepared(weight.shape, tensors, activation, {"layout": layout, "scale_dtype": dtype})

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        from bitgrain.kernels.cpu.block_operator import block_linear

        t = prepared.tensors
        y: Tensor = block_linear(x, t["packed"], t["format"], t.get("factor"), bias, prepared.shape[0], self.precision)
        return y

    def native_call(self, prepared: Prepared, bias: Tensor | None) -> NativeCall:
        t, (n, k) = prepared.tensors, prepared.shape
        return BlockCall(t["format"].data_ptr(), t["packed"].data_ptr(), address(t.get("factor")), address(bias), n, k, self.precision)

    def rows(self, prepared: Prepared, index: Tensor) -> Tensor:
        """float32 [M, K]: rows int64 [M] of the weight, out of the prepared panels; the numbers of dequantize()."""
        t, meta = prepared.tensors, prepared.meta
        if not len(index):
            return torch.empty(0, prepared.shape[1])
        places = meta.get("places")
        if places is None:
            places = meta["places"] = block_packing.lane_places(meta["layout"], meta["scale_dtype"], prepared.shape[1])
        panels, factor = block_packing.gather_rows(t["packed"], places, index), t.get("factor")
        parts = block_packing.unpack(meta["layout"], panels, meta["scale_dtype"], None if factor is None else factor[index], len(index), prepared.shape[1])
        return block_packing.values(meta["layout"], parts)

    def unpack(self, prepared: Prepared) -> Tensor:
        """float32 [N, K]: what prepare() packed, decoded, for tests."""
        t, meta = prepared.tensors, prepared.meta
        parts = block_packing.unpack(meta["layout"], t["packed"], meta["scale_dtype"], t.get("factor"), *prepared.shape)
        return block_packing.values(meta["layout"], parts)


class SuperBlockInt8Linear(SuperBlockLinear):
    """The same product with x rounded to int8, one scale per token and 32 in features.

    Where codes of eight bits are multiplied as words (AVX2), x keeps 16 bits instead, at no cost.
    """

    name = "cpu.super_block_int8"
    rank = 58
    precision = INT8

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.APPROXIMATE

    def _refusal(self, problem: LinearProblem) -> Refusal | None:
        return self._unsuitable(problem)


def _better_elsewhere(problem: LinearProblem) -> Refusal | None:
    """Weights that other exact kernels keep as small, and multiply as fast or faster."""
    spec, has_products = problem.weight, problem.dtype == "bfloat16" and instruction_set() in BFLOAT16_SETS
    if spec.kind == "block_float" and (has_products or problem.dtype == "float32"):
        return Refusal(f"leaves floats in blocks to cpu.block_float, which is as fast with {problem.dtype} activations here")
    if spec.kind == "int_affine" and spec.bits in (4, 8) and has_products:
        return Refusal(f"leaves integers of {spec.bits} bits to cpu.int_affine, which multiplies in bfloat16 here")
    return None


def _check_scales(weight: BlockFloatWeight) -> None:
    last = E8M0_LAST if weight.scale_type == "e8m0" else E4M3_LAST
    bad = int((weight.scale >= last).sum())
    if bad:
        raise BadValueError("weight", f"{bad} block scales that are no positive numbers", "finite scales", "the file is damaged; fetch or write it again")
