"""Quantizing 16-bit weights: what a run asks for while it loads."""

from bitgrain.quantize.nearest import quantize_nearest
from bitgrain.quantize.targets import TARGETS, Target, find_target

__all__ = ["TARGETS", "Target", "find_target", "quantize_nearest"]
