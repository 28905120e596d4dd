"""FP8 checkpoints: block, channel and tensor scales beside eight-bit floating-point weights."""

from bitgrain.formats.fp8.config import FP8Config

CONFIG = FP8Config

__all__ = ["CONFIG", "FP8Config"]
