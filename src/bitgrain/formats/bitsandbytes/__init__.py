"""bitsandbytes checkpoints: four-bit lookup tables over flattened blocks, and LLM.int8() rows."""

from bitgrain.formats.bitsandbytes.config import BitsAndBytesConfig

CONFIG = BitsAndBytesConfig

__all__ = ["CONFIG", "BitsAndBytesConfig"]
