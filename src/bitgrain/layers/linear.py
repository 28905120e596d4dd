"""Linear layers: one prepared matrix, or several that share an input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bitgrain.kernels.base import LinearKernel, Prepared
from bitgrain.kernels.decode_step import LinearOperation, Place, StepDescription, Undescribed
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, LowRank, Transform


class Linear(nn.Module):
    """y[M, N] = q(o(kernel(t(x)[M, K]) + low_rank(t(x))) + bias).

    t are the input transforms one after another, o those of the output, q is the quantization of the output.

    Args:
        bias: [N] of the activations' dtype, or None.
    """

    def __init__(
        self,
        name: str,
        kernel: LinearKernel,
        prepared: Prepared,
        bias: Tensor | None,
        transforms: tuple[Transform, ...] = (),
        low_rank: LowRank | None = None,
        outputs: tuple[Transform, ...] = (),
        quantized_output: ActivationSpec = NO_ACTIVATION,
    ) -> None:
        super().__init__()
        self.name, self.kernel, self.prepared, self.bias = name, kernel, prepared, bias
        self.transforms, self.low_rank, self.outputs, self.quantized_output = transforms, low_rank, outputs, quantized_output

    def forward(self, x: Tensor) -> Tensor:
        for transform in self.transforms:
            x = transform.apply(x)
        y = self.kernel.apply(x, self.prepared, None if self.outputs else self.bias)
        if self.low_rank is not None:
            y = (y.float() + self.low_rank.apply(x)).to(y.dtype)
        for transform in self.outputs:
            y = transform.apply(y)
        if self.outputs and self.bias is not None:
            y = y + self.bias
        return y if self.quantized_output.is_none else self.quantized_output.fake_quantize(y).to(y.dtype)

    def describe_step(self, step: StepDescription, source: Place, name: str) -> Place:
        """Its operations in a decode step; see kernels.decode_step."""
        beside = [what for what, there in (("maps its input or output", self.transforms or self.outputs), ("has a low-rank part", self.low_rank is not None)) if there]
        if not self.quantized_output.is_none:
            beside.append("quantizes its output")
        if beside:
            raise Undescribed(f"{self.name} {' and '.join(beside)}")
        target = step.place(name, self.prepared.shape[0])
        step.add(LinearOperation(self.kernel, source, target, self.prepared, self.bias))
        return target

    @property
    def is_plain(self) -> bool:
        """Nothing but the kernel's product, the bias and the quantization of the output."""
        return not self.transforms and not self.outputs and self.low_rank is None

    @property
    def nbytes(self) -> int:
        """Bytes of the prepared weight, the bias and the transforms."""
        held = [t for transform in (*self.transforms, *self.outputs) for t in transform.data_tensors().values()]
        held += [] if self.low_rank is None else [self.low_rank.down, self.low_rank.up]
        held += [] if self.bias is None else [self.bias]
        return self.prepared.nbytes + sum(t.numel() * t.element_size() for t in held)

    def extra_repr(self) -> str:
        return f"{self.name} {list(self.prepared.shape)} {self.kernel.name}"


class FusedLinear(nn.Module):
    """Several linears as one matrix; returns one output per part.

    Args:
        sizes:  N of each part, as they are stacked.
        places: where each output's part stands; in order if not given.
    """

    def __init__(self, linear: Linear, sizes: Sequence[int], places: Sequence[int] = ()) -> None:
        super().__init__()
        self.linear, self.sizes, self.places = linear, list(sizes), tuple(places) or tuple(range(len(sizes)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = torch.split(self.linear(x), self.sizes, dim=-1)
        return tuple(parts[place] for place in self.places)

    def describe_step(self, step: StepDescription, source: Place, name: str) -> tuple[Place, ...]:
        """Its operations in a decode step; see kernels.decode_step."""
        parts = step.through(self.linear, source, name).split(self.sizes)
        return tuple(parts[place] for place in self.places)


class ParallelLinear(nn.Module):
    """Several linears side by side on one input; returns one output per part."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(x) for part in self.parts)

    def describe_step(self, step: StepDescription, source: Place, name: str) -> tuple[Place, ...]:
        """Its operations in a decode step; see kernels.decode_step."""
        return tuple(step.through(part, source, f"{name}.{i}") for i, part in enumerate(self.parts))
