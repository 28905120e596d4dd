"""AutoRound checkpoints: integer, FP8, MX and NVFP4 weights in the layouts that AutoRound packs under its own name."""

from bitgrain.formats.autoround.config import AutoRoundConfig

CONFIG = AutoRoundConfig

__all__ = ["CONFIG", "AutoRoundConfig"]
