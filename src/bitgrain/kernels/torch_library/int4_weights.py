"""Four-bit integer weights in groups through torch's own product, which rounds each weight to bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared
from bitgrain.kernels.torch_library import contracts
from bitgrain.kernels.torch_library.operators import TorchLinear, finished, missing_dtype, operator
from bitgrain.weights import ActivationSpec, IntAffineWeight, Weight

GROUPS = (32, 64, 128, 256)
# rows of a tile of the weight, where they are not 8
TILE_ROWS = {"hip": 16}
MIDDLE = 8


class Int4WeightLinear(TorchLinear):
    """y = x W^T + b with W = (q - 8) * s + (8 - z) * s, s and (8 - z) * s and then W rounded to bfloat16: changes numerics.

    Below Triton's kernels, which are exact; for where they are missing.
    """

    name = "torch.int4_weights"
    rank = 30
    operator = "_weight_int4pack_mm"

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.APPROXIMATE

    def _problem(self, problem: LinearProblem) -> str:
        spec, rows = problem.weight, TILE_ROWS.get(self.platform, 8)
        if spec.kind != "int_affine" or spec.bits != 4 or spec.granularity != "group" or spec.group_index or spec.row_index:
            return f"takes 4-bit integer weights in groups, in order, not {spec.describe()}"
        if spec.group_size not in GROUPS or problem.k % spec.group_size:
            return f"takes whole groups of {', '.join(map(str, GROUPS))}, not {spec.group_size} in K = {problem.k}"
        if not problem.activation.is_none:
            return "does not quantize activations"
        if problem.dtype != "bfloat16":
            return f"takes bfloat16, not {problem.dtype}"
        if problem.n % rows:
            return f"takes N that are multiples of {rows}, not {problem.n}"
        return missing_dtype(self.platform, problem.dtype)

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, IntAffineWeight)  # _problem() asked for the kind
        n, k = weight.shape
        # the operator's even columns are in the high nibbles
        swapped = (weight.packed << 4) | (weight.packed >> 4)
        inner = next(tiles for tiles in (8, 4, 2) if k % (16 * tiles) == 0)
        convert = operator(weight.packed, "_convert_weight_to_int4pack", contracts.convert_weight_to_int4pack)
        scale = weight.scale.float()
        zero = weight.zero.float() if isinstance(weight.zero, Tensor) else torch.full_like(scale, float(weight.zero))
        pairs = torch.stack((scale, (MIDDLE - zero) * scale), dim=-1).expand(n, -1, 2)
        tensors = {"codes": convert(swapped, inner), "scale": pairs.transpose(0, 1).contiguous().bfloat16()}
        return Prepared((n, k), tensors, activation, {"group": weight.group_size})

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        held = prepared.tensors
        if x.shape[0] == 0:
            return x.new_zeros(0, prepared.shape[0])
        y = operator(x, "_weight_int4pack_mm", contracts.weight_int4pack_mm)(x, held["codes"], prepared.meta["group"], held["scale"])
        return y if bias is None else finished(y.float(), bias, x.dtype)
