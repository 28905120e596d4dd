"""GLM-4 of 2024, in the naming of transformers."""

from __future__ import annotations

from bitgrain.models.config import Traits
from bitgrain.models.pre_norm import PreNormLM

GLM = Traits(
    head_dim=128,
    defaults={"attention_bias": True, "rms_norm_eps": 1.5625e-7, "num_key_value_heads": 2},
    rotated_share=0.5,
    output_bias=False,
)


class GlmForCausalLM(PreNormLM):
    """As Llama, with neighbouring rotary pairs in a half of each head, biases of q, k and v, and gate and up stored as one module.

    Source: transformers 5.19 modeling_glm.
    """

    traits = GLM
    interleaved = True
    joint_mlp = True
