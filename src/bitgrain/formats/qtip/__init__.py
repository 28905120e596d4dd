"""QTIP checkpoints: trellis codes between two Hadamard transforms."""

from bitgrain.formats.qtip.config import QtipConfig

CONFIG = QtipConfig

__all__ = ["CONFIG", "QtipConfig"]
