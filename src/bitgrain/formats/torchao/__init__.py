"""torchao checkpoints: tensor subclasses taken apart, described in the metadata of the safetensors files."""

from bitgrain.formats.torchao.config import TorchAOConfig

CONFIG = TorchAOConfig

__all__ = ["CONFIG", "TorchAOConfig"]
