"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from bitgrain.models.config import Traits
from bitgrain.models.pre_norm import PreNormLM


class Qwen2ForCausalLM(PreNormLM):
    """As Llama, with biases of q, k and v, and a sliding window over some layers when the configuration switches it on."""

    traits = Traits(window="chosen", qkv_bias=True)
