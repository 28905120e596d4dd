"""Ministral 8B."""

from __future__ import annotations

from bitgrain.models.config import Traits
from bitgrain.models.pre_norm import PreNormLM


class MinistralForCausalLM(PreNormLM):
    """As Mistral, with a sliding window over those layers that the configuration names."""

    traits = Traits(window="named")
