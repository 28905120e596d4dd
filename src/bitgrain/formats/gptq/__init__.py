"""GPTQ checkpoints: 2- to 8-bit weights as AutoGPTQ, GPTQModel, optimum and AutoRound write them."""

from bitgrain.formats.gptq.config import GptqConfig

CONFIG = GptqConfig

__all__ = ["CONFIG", "GptqConfig"]
