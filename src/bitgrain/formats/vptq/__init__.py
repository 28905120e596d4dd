"""VPTQ checkpoints: vectors of rows as codebook entries, with residuals and outlier columns."""

from bitgrain.formats.vptq.config import VptqConfig

CONFIG = VptqConfig

__all__ = ["CONFIG", "VptqConfig"]
