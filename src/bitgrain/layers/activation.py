"""Activation functions and joins of gated MLPs, as layers and models import them; kernels of experts see them too."""

from bitgrain.numerics.gates import ACTIVATIONS, ClampedGate, Gate, Gated

__all__ = ["ACTIVATIONS", "ClampedGate", "Gate", "Gated"]
