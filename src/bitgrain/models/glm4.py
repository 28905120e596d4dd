"""GLM-4-0414."""

from __future__ import annotations

from bitgrain.models.decoder import LayerNorms
from bitgrain.models.glm import GLM
from bitgrain.models.pre_norm import PreNormLM


class Glm4ForCausalLM(PreNormLM):
    """As GLM, with norms behind attention and MLP too.

    Source: transformers 5.19 modeling_glm4.
    """

    traits = GLM
    interleaved = True
    joint_mlp = True
    norms = LayerNorms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
