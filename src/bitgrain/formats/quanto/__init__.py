"""optimum-quanto checkpoints: bytes, nibbles and crumbs with a scale per row or group, and a map of quantized modules."""

from bitgrain.formats.quanto.config import QuantoConfig

CONFIG = QuantoConfig

__all__ = ["CONFIG", "QuantoConfig"]
