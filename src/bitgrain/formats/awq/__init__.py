"""AWQ checkpoints: 4- to 7-bit weights as AutoAWQ, llm-awq, GPTQModel and AutoRound write them."""

from bitgrain.formats.awq.config import AwqConfig

CONFIG = AwqConfig

__all__ = ["CONFIG", "AwqConfig"]
