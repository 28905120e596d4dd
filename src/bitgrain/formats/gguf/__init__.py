"""GGUF files: K- and I-quants, small integers, ternary and four-bit float blocks."""

from bitgrain.formats.gguf.config import GGUFConfig

CONFIG = GGUFConfig

__all__ = ["CONFIG", "GGUFConfig"]
