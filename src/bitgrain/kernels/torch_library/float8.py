"""Eight-bit floating-point weights and activations through torch's scaled product."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.errors import BadValueError
from bitgrain.kernels.base import LinearProblem, Prepared
from bitgrain.kernels.torch_library import contracts
from bitgrain.kernels.torch_library.operators import TorchLinear, finished, operator, quantized
from bitgrain.platforms.probe import target
from bitgrain.weights import ActivationSpec, FloatWeight, Weight

STEP = 16


class Float8Linear(TorchLinear):
    """y = s_x s_w (q_x . q_w) + b with scales per tensor, or per token and channel; full accumulation is asked for.

    Where the device's products take the other e4m3, whose exponents are biased by one more, the same codes stand for half the
    value: they are used as they are with scales twice as large, so that nothing is rounded.
    """

    name = "torch.fp8"
    rank = 50
    operator = "_scaled_mm"

    def _problem(self, problem: LinearProblem) -> str:
        spec, act, features = problem.weight, problem.activation, target(self.platform).features
        if spec.kind != "float" or spec.granularity not in ("tensor", "channel"):
            return f"takes 8-bit floating-point weights with one scale per channel or tensor, not {spec.describe()}"
        if act.element != "fp8_e4m3fn" or act.granularity == "group":
            return f"takes fp8_e4m3fn activations with one scale per token or tensor, not {act.describe()}"
        taken = ("fp8_e4m3fn", "fp8_e5m2") if "fp8_dot" in features else ("fp8_e4m3fn",)
        if spec.element not in taken:
            return f"multiplies {' and '.join(taken)} weights here, not {spec.element}"
        if problem.dtype == "float32":
            return "adds up with fewer bits than float32 outputs hold"
        if problem.n % STEP or problem.k % STEP:
            return f"takes N and K that are multiples of {STEP}, not {problem.n} and {problem.k}"
        return "" if {"fp8_dot", "fp8_fnuz_dot"} & features else "the device does not multiply 8-bit floats"

    @property
    def _halved(self) -> bool:
        """The device's e4m3 is the one without negative zero."""
        return "fp8_dot" not in target(self.platform).features

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, FloatWeight)  # _problem() asked for the kind
        codes, scale = weight.codes, weight.scale.reshape(1, -1)
        if self._halved:
            codes, scale = halved(codes), scale * 2
        tensors = {"codes": codes, "scale": scale.contiguous(), "one": torch.ones((), device=codes.device)}
        return Prepared(weight.shape, tensors, activation, {"halved": self._halved})

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        held, dtype = prepared.tensors, x.dtype
        weight, scale_w, one = held["codes"], held["scale"], held["one"]
        if prepared.meta["halved"]:
            values, scale, _ = quantized(self.platform, prepared.activation, x)
            codes, scale = (values * 0.5).to(torch.float8_e4m3fnuz), scale * 2
        else:
            codes, scale, _ = quantized(self.platform, prepared.activation, x, torch.float8_e4m3fn)
        product = operator(x, "_scaled_mm", contracts.scaled_mm)
        if scale.numel() == 1 and scale_w.numel() == 1 and x.shape[0] > 0:
            return product(codes, weight.t(), scale.reshape(()), scale_w.reshape(()), bias=bias, out_dtype=dtype, use_fast_accum=False)
        if dtype is torch.bfloat16 and weight.dtype is codes.dtype and x.shape[0] > 0:
            by_row, by_channel = scale.expand(x.shape[0], 1).contiguous(), scale_w.expand(1, weight.shape[0]).contiguous()
            return product(codes, weight.t(), by_row, by_channel, bias=bias, out_dtype=dtype, use_fast_accum=False)
        # what takes scales of rows for these types differs between libraries: they are applied afterwards, in float32
        sums = product(codes, weight.t(), one, one, out_dtype=torch.float32, use_fast_accum=False)
        return finished(sums * scale_w * scale, bias, dtype)


def halved(codes: Tensor) -> Tensor:
    """float8_e4m3fnuz [N, K] of half the values of float8_e4m3fn codes: the same bytes, but for negative zero.

    Raises:
        BadValueError: NaN codes, which have another place in the other type.
    """
    raw = codes.view(torch.uint8)
    bad = int(((raw & 0x7F) == 0x7F).sum())
    if bad:
        raise BadValueError("weight", f"{bad} NaN codes", "finite values", "the file is damaged; fetch or write it again")
    return torch.where(raw == 0x80, 0, raw).view(torch.float8_e4m3fnuz)
