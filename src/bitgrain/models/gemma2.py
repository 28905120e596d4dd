"""Gemma 2."""

from __future__ import annotations

from bitgrain.models.config import Traits
from bitgrain.models.decoder import LayerNorms
from bitgrain.models.gemma import GELU
from bitgrain.models.pre_norm import PreNormLM

FOUR_NORMS = LayerNorms("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


class Gemma2ForCausalLM(PreNormLM):
    """As Gemma, with norms behind attention and MLP too, soft caps on scores and logits, and a window in every second layer.

    Source: transformers 5.19 modeling_gemma2.
    """

    traits = Traits(
        window="alternate",
        head_dim=256,
        defaults={
            "hidden_activation": GELU, "tie_word_embeddings": True, "sliding_window": 4096, "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        },
        activation="hidden_activation",
        wide_norm=True,
        norm_offset=1.0,
        scaled_embedding=True,
        implements=frozenset({"hidden_activation", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"}),
    )  # fmt: skip
    norms = FOUR_NORMS
