"""How a module's input is quantized before the product, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitgrain.numerics.small_floats import SMALL_FLOATS


@dataclass(frozen=True, slots=True)
class ActivationSpec:
    """Input quantization of one module; hashable, compared by value.

    quantize:   dynamic symmetric int: s = amax / (2**bits - 1) * 2, code = round(clamp(x / s, -2**(b-1), 2**(b-1) - 1))
                dynamic asymmetric int: s = (max - min) / (2**bits - 1), z = round(clamp(-2**(b-1) - min / s)),
                code = round(clamp(x / s + z)); min and max always include 0
                dynamic float: s = amax / max of the type, code = x / s rounded to the type
                static: the same with the stored scale and zero point
    Source: compressed-tensors 0.17 quantization/utils and lifecycle/forward (formulas); formats specification, section 4.

    Args:
        element:     "none", "int8", "int4", or a small float such as "fp8_e4m3fn".
        granularity: "tensor", "token" (a row of K) or "group" (`group_size` columns of a token).
        symmetric:   False: with a zero point.
        dynamic:     computed from each input; False: `scale` and `zero` come from the checkpoint.
        scale_type:  "float" or "e8m0" (dynamic scales rounded up to a power of two).
        scale:       static: the multiplier; None until the checkpoint has been read.
        zero:        static: the zero point, in the signed domain.
        upper_bound: dynamic float: amax is cut at this value (None: not).
    """

    element: str = "none"
    granularity: str = "tensor"
    group_size: int = 0
    symmetric: bool = True
    dynamic: bool = True
    scale_type: str = "float"
    scale: float | None = None
    zero: int = 0
    upper_bound: float | None = None

    @property
    def is_none(self) -> bool:
        return self.element == "none"

    @property
    def bits(self) -> int:
        if self.is_none:
            return 16
        return SMALL_FLOATS[self.element].bits if self.element in SMALL_FLOATS else int(self.element.removeprefix("int"))

    @property
    def is_integer(self) -> bool:
        return self.element.startswith("int")

    def without_values(self) -> ActivationSpec:
        """The same specification without stored numbers: what a kernel is chosen by."""
        return replace(self, scale=None, zero=0)

    def describe(self) -> str:
        """Short text such as "int8 token dynamic"."""
        if self.is_none:
            return "16-bit"
        parts = [self.element, f"g{self.group_size}" if self.granularity == "group" else self.granularity]
        parts.append("dynamic" if self.dynamic else "static")
        if not self.symmetric:
            parts.append("asym")
        return " ".join(parts)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize x.

        Args:
            x: floating point [M, K].
        Returns:
            (codes, scale, zero): codes int8 [M, K] for integers, float32 [M, K] on the type's grid for floats;
            scale and zero float32, [1, 1], [M, 1] or [M, G]; x is about (codes - zero) * scale.
        """
        values = x.float()
        grouped = self._grouped(values)
        scale, zero = self._parameters(grouped)
        if self.is_integer:
            low, high = -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
            codes = torch.round(torch.clamp(grouped / scale + zero, low, high)).to(torch.int8)
        else:
            kind = SMALL_FLOATS[self.element]
            limited = torch.clamp(grouped / scale, -kind.max, kind.max)
            if kind.storage is not None:
                codes = limited.to(kind.storage).float()
            else:
                from bitgrain.numerics.small_floats import round_to

                codes = round_to(limited, kind)
        rows = x.shape[0]
        codes = codes.reshape(rows, -1)[:, : x.shape[1]].contiguous()
        if self.granularity == "group":
            return codes, scale.view(rows, -1), zero.view(rows, -1)
        return codes, scale.view(-1, 1), zero.view(-1, 1)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """float32 [M, K]: x after quantization and back; x itself (as float32) when there is none."""
        if self.is_none:
            return x.float()
        codes, scale, zero = self.quantize(x)
        values = codes.float()
        if self.granularity == "group":
            scale = torch.repeat_interleave(scale, self.group_size, dim=1)[:, : x.shape[1]]
            zero = torch.repeat_interleave(zero, self.group_size, dim=1)[:, : x.shape[1]] if zero.numel() > 1 else zero
        return (values - zero) * scale

    def _grouped(self, values: Tensor) -> Tensor:
        if self.granularity != "group":
            return values
        short = -values.shape[1] % self.group_size
        padded = torch.nn.functional.pad(values, (0, short)) if short else values
        return padded.view(values.shape[0], -1, self.group_size)

    def _parameters(self, grouped: Tensor) -> tuple[Tensor, Tensor]:
        if not self.dynamic:
            # values may be missing only while planning, never while running
            assert self.scale is not None, "a static activation scale was not loaded"
            return torch.tensor([[self.scale]], device=grouped.device), torch.tensor([[float(self.zero)]], device=grouped.device)
        tensor_wide = self.granularity == "tensor"
        low = torch.clamp((grouped.amin() if tensor_wide else grouped.amin(-1, keepdim=True)), max=0.0)
        high = torch.clamp((grouped.amax() if tensor_wide else grouped.amax(-1, keepdim=True)), min=0.0)
        tiny = torch.finfo(torch.float32).eps
        if self.symmetric:
            peak = torch.maximum(-low, high)
            if self.upper_bound is not None:
                peak = torch.clamp(peak, max=self.upper_bound)
            top = ((1 << self.bits) - 1) / 2 if self.is_integer else SMALL_FLOATS[self.element].max
            scale = peak / top
            scale = torch.where(scale == 0, torch.full_like(scale, tiny), scale)
            if self.scale_type == "e8m0":
                scale = torch.exp2(torch.ceil(torch.log2(scale)))
            return scale.reshape(1, 1) if tensor_wide else scale, torch.zeros_like(scale).reshape(1, 1) if tensor_wide else torch.zeros_like(scale)
        scale = (high - low) / ((1 << self.bits) - 1)
        scale = torch.where(scale == 0, torch.full_like(scale, tiny), scale)
        bottom = -(1 << (self.bits - 1))
        zero = torch.round(torch.clamp(bottom - low / scale, bottom, -bottom - 1))
        return (scale.reshape(1, 1), zero.reshape(1, 1)) if tensor_wide else (scale, zero)


NO_ACTIVATION = ActivationSpec()
