"""What a step computes between its matrix products: norms, rotary embedding, gates, attention."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from bitgrain.kernels.base import Join


class NormKernel(Protocol):
    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, wide: bool) -> Tensor:
        """y = weight * (x / sqrt(mean(x^2) + eps)) + bias of x's dtype, for x [..., K]; the quotient in float32.

        Args:
            weight: of x's dtype, or float32.
            wide:   the product is float32 too, and rounded after it; else the quotient is rounded first.
        """


class RotaryKernel(Protocol):
    def apply(self, x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
        """x [T, H, D] with its first R entries turned by the row's angles [T, 1, R], R <= D; a new tensor of x's dtype."""


class GateKernel(Protocol):
    def apply(self, join: Join, gate: Tensor, up: Tensor) -> Tensor:
        """join(gate, up): [M, K] of the dtype of gate and up [M, K].

        Args:
            join: its describe() is the problem's detail.
        """


class AttentionKernel(Protocol):
    def apply(
        self, q: Tensor, keys: Tensor, values: Tensor, window: int | None, sinks: Tensor | None, scale: float | None, cap: float | None
    ) -> Tensor:
        """[t, H, E]: causal attention of the last t of L tokens.

        Args:
            q:      [t, H, D], the last t tokens of the sequence.
            keys:   [L, G, D] of q's dtype, L >= t, G divides H.
            values: [L, G, E].
            window: tokens that a token attends to, itself included; None: all.
            sinks:  [H], a score that joins each head's softmax and brings no value; None: there is none.
            scale:  of scores; None: 1 / sqrt(D).
            cap:    scores s become cap * tanh(s / cap); None: they stay.
        """
