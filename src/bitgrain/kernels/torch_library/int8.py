"""Eight-bit integer weights and activations through torch's integer product."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import LinearProblem, Prepared
from bitgrain.kernels.torch_library import contracts
from bitgrain.kernels.torch_library.operators import TorchLinear, finished, operator, quantized
from bitgrain.platforms.probe import target
from bitgrain.weights import ActivationSpec, IntAffineWeight, Weight

# (rows above which the operator starts, what K and N are multiples of); on other platforms it takes every size
LIMITS = {"cuda": (contracts.INT_ROWS, 8), "hip": (contracts.INT_ROWS, 8)}
# 32 rows fill a tile of every integer instruction
PADDED_ROWS = 32
# K * 128 * 255 stays below 2^31
LARGEST_K = 65536
MIDDLE = 128


class Int8Linear(TorchLinear):
    """y = s_x s_w ((q_x - z_x) . (q_w - z_w)) + b: the product in int32, exact; zero points join through sums of the codes.

    Its rank is below Triton's: the operator writes int32 [M, N] and leaves scales to a second pass, which costs about what its faster
    product gains for many rows, and few rows are padded.
    """

    name = "torch.int8"
    rank = 35
    operator = "_int_mm"

    def _problem(self, problem: LinearProblem) -> str:
        spec, act = problem.weight, problem.activation
        if spec.kind != "int_affine" or spec.bits != 8:
            return f"takes 8-bit integer weights, not {spec.describe()}"
        if spec.granularity not in ("channel", "tensor") or spec.group_index or spec.row_index:
            return "takes one scale per channel or tensor of the weight"
        if spec.zero == "float":
            return "takes integer zero points"
        if not act.is_integer or not act.is_plain:
            return f"takes integer activations with one scale per token or tensor, not {act.describe()}"
        step = LIMITS.get(self.platform, (0, 1))[1]
        if problem.n % step or problem.k % step:
            return f"takes N and K that are multiples of {step}, not {problem.n} and {problem.k}"
        if problem.k > LARGEST_K:
            return f"takes K up to {LARGEST_K}, so that sums stay in int32, not {problem.k}"
        return "" if "int8_dot" in target(self.platform).features else "the device does not multiply 8-bit integers"

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, IntAffineWeight)  # _problem() asked for the kind
        n, k = weight.shape
        codes = (weight.packed.view(n, k) ^ MIDDLE).view(torch.int8)  # code - 128, by its highest bit
        tensors = {"codes": codes, "scale": weight.scale.float().reshape(1, -1)}
        if isinstance(weight.zero, Tensor):
            tensors["zero"] = weight.zero.reshape(1, -1).long() - MIDDLE
        elif weight.zero != MIDDLE:
            tensors["zero"] = torch.full((1, 1), weight.zero - MIDDLE, dtype=torch.int64, device=codes.device)
        if not activation.symmetric:
            tensors["sums"] = codes.sum(1, dtype=torch.int32)[None]
        return Prepared((n, k), tensors, activation)

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        held, k = prepared.tensors, prepared.shape[1]
        codes, scale, zero = quantized(self.platform, prepared.activation, x)
        dots = self._product(codes, held["codes"])
        if "sums" in held:
            dots = dots - zero.int() * held["sums"]
        if "zero" in held:
            moved = codes.sum(1, keepdim=True, dtype=torch.int64) - zero.long() * k
            dots = dots.long() - moved * held["zero"]
        return finished(dots.float() * held["scale"] * scale, bias, x.dtype)

    def _product(self, codes: Tensor, weight: Tensor) -> Tensor:
        """int32 [M, N] of int8 [M, K] and [N, K]; rows that the operator asks for are added, and dropped again."""
        rows, least = codes.shape[0], LIMITS.get(self.platform, (0, 1))[0]
        if rows == 0:
            return torch.zeros(0, weight.shape[0], dtype=torch.int32, device=codes.device)
        if rows <= least:
            codes = torch.nn.functional.pad(codes, (0, 0, 0, PADDED_ROWS - rows))
        model = contracts.int_mm if least else torch.ops.aten._int_mm
        return operator(codes, "_int_mm", model)(codes, weight.t())[:rows]
