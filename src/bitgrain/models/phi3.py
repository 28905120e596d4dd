"""Phi-3 and Phi-4."""

from __future__ import annotations

from bitgrain.models.config import Traits
from bitgrain.models.pre_norm import PreNormLM


class Phi3ForCausalLM(PreNormLM):
    """As Llama, with q, k, v and gate, up stored as one module each, and perhaps only a part of each head rotated.

    Source: transformers 5.19 modeling_phi3.
    """

    traits = Traits(window="every", defaults={"sliding_window": None, "rms_norm_eps": 1e-5}, rotated_share=1.0)
    joint_qkv = True
    joint_mlp = True
