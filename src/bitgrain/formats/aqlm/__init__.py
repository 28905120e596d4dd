"""AQLM checkpoints: blocks as sums of codebook entries."""

from bitgrain.formats.aqlm.config import AqlmConfig

CONFIG = AqlmConfig

__all__ = ["CONFIG", "AqlmConfig"]
