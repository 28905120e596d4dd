"""Checkpoints without quantization: every matrix is a 16- or 32-bit float."""

from bitgrain.formats.unquantized.config import UnquantizedConfig

CONFIG = UnquantizedConfig

__all__ = ["CONFIG", "UnquantizedConfig"]
