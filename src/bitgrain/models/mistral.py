"""Mistral 7B and its relatives."""

from __future__ import annotations

from bitgrain.models.config import Traits
from bitgrain.models.pre_norm import PreNormLM


class MistralForCausalLM(PreNormLM):
    """As Llama, with a sliding window over all layers when the configuration gives one."""

    traits = Traits(window="every")
