"""compressed-tensors: what llmcompressor writes."""

from bitgrain.formats.compressed_tensors.config import CompressedTensorsConfig

CONFIG = CompressedTensorsConfig

__all__ = ["CONFIG", "CompressedTensorsConfig"]
