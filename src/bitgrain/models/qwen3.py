"""Qwen3, the dense models."""

from __future__ import annotations

from bitgrain.models.config import Traits
from bitgrain.models.pre_norm import PreNormLM


class Qwen3ForCausalLM(PreNormLM):
    """As Llama, with a norm over each head of q and k, and a sliding window over some layers when it is switched on."""

    traits = Traits(window="chosen", head_dim=128)
    qk_norm = True
