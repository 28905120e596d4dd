"""HQQ checkpoints: integer codes with float zero points, in groups of the flattened matrix along either dimension."""

from bitgrain.formats.hqq.config import HqqConfig

CONFIG = HqqConfig

__all__ = ["CONFIG", "HqqConfig"]
