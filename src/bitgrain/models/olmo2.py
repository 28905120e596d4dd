"""OLMo 2."""

from __future__ import annotations

from bitgrain.models.config import Traits
from bitgrain.models.decoder import LayerNorms
from bitgrain.models.pre_norm import PreNormLM


class Olmo2ForCausalLM(PreNormLM):
    """As Llama, with norms behind attention and MLP instead of before them, and one norm over all of q and one over all of k.

    Norms multiply, and heads are rotated, in float32.  Source: transformers 5.19 modeling_olmo2.
    """

    traits = Traits(defaults={"rms_norm_eps": 1e-5}, wide_norm=True)
    norms = LayerNorms("", "post_attention_layernorm", "", "post_feedforward_layernorm")
    qk_norm_all = True
    wide_rope = True
