"""AMD Quark checkpoints: integers, small floats and blocks of them, described tensor by tensor."""

from bitgrain.formats.quark.config import QuarkConfig

CONFIG = QuarkConfig

__all__ = ["CONFIG", "QuarkConfig"]
