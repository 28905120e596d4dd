"""ModelSlim checkpoints: a type per tensor in `quant_model_description.json`, integer, fp8 and microscaling weights."""

from bitgrain.formats.modelslim.config import ModelSlimConfig

CONFIG = ModelSlimConfig

__all__ = ["CONFIG", "ModelSlimConfig"]
