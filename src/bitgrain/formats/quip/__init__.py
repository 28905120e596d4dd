"""QuIP# checkpoints: points of the E8 lattice between two Hadamard transforms."""

from bitgrain.formats.quip.config import QuipConfig

CONFIG = QuipConfig

__all__ = ["CONFIG", "QuipConfig"]
