"""ModelOpt checkpoints: FP8, NVFP4, MX, INT4 and INT8, one algorithm for all modules or one per module."""

from bitgrain.formats.modelopt.config import ModelOptConfig

CONFIG = ModelOptConfig

__all__ = ["CONFIG", "ModelOptConfig"]
