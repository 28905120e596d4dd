"""Gemma, the first generation."""

from __future__ import annotations

from bitgrain.models.config import Traits
from bitgrain.models.pre_norm import PreNormLM

GELU = "gelu_pytorch_tanh"


class GemmaForCausalLM(PreNormLM):
    """As Llama, with scaled embeddings, norms that multiply by 1 + weight in float32, and a tied head.

    Source: transformers 5.19 modeling_gemma.
    """

    traits = Traits(
        head_dim=256,
        defaults={"hidden_act": GELU, "tie_word_embeddings": True},
        activations={"gelu": GELU},  # the published configurations say the one and mean the other
        wide_norm=True,
        norm_offset=1.0,
        scaled_embedding=True,
        implements=frozenset({"hidden_activation"}),  # some configurations say it there too
    )
