"""Llama 1 to 3 and the many models that share its architecture."""

from __future__ import annotations

from bitgrain.models.config import Traits
from bitgrain.models.pre_norm import PreNormLM


class LlamaForCausalLM(PreNormLM):
    """Rotary grouped-query attention and a gated MLP; biases only where the configuration has them."""

    traits = Traits(window="none")
