"""Gemma 3, its text model."""

from __future__ import annotations

from bitgrain.models.config import Traits
from bitgrain.models.gemma import GELU
from bitgrain.models.gemma2 import FOUR_NORMS
from bitgrain.models.pre_norm import PreNormLM


class Gemma3ForCausalLM(PreNormLM):
    """As Gemma 2, with norms over heads of q and k in place of the cap on scores, five layers with a window to one without,
    and a rotary embedding of their own in those with one.

    Source: transformers 5.19 modeling_gemma3.
    """

    traits = Traits(
        window="pattern",
        head_dim=256,
        defaults={"hidden_activation": GELU, "tie_word_embeddings": True, "sliding_window": 4096, "query_pre_attn_scalar": 256},
        rope_theta=1e6,
        local_theta=1e4,
        activation="hidden_activation",
        wide_norm=True,
        norm_offset=1.0,
        scaled_embedding=True,
        implements=frozenset({
            "hidden_activation", "query_pre_attn_scalar", "final_logit_softcapping", "sliding_window_pattern", "rope_local_base_freq",
        }),
    )  # fmt: skip
    norms = FOUR_NORMS
    qk_norm = True
