"""Mixtral."""

from __future__ import annotations

from bitgrain.models.config import Traits
from bitgrain.models.routing_config import ExpertTraits
from bitgrain.models.sparse import SparseLM


class MixtralForCausalLM(SparseLM):
    """As Mistral, with experts in every layer.

    Checkpoints call them block_sparse_moe.experts.N.{w1, w3, w2}, or as other architectures do.
    Source: transformers 5.19 modeling_mixtral.
    """

    traits = Traits(
        window="every",
        experts=ExpertTraits("normalized", "intermediate_size", older=("block_sparse_moe", ("w1", "w3", "w2"))),
        defaults={"sliding_window": None, "rms_norm_eps": 1e-5},
        rope_theta=1e6,
    )
