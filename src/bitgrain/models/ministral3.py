"""Ministral 3, its text model."""

from __future__ import annotations

from bitgrain.models.config import GROWTH, Traits
from bitgrain.models.pre_norm import PreNormLM

# Where config.json says nothing of it.
YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0, GROWTH: 0.1,
}  # fmt: skip


class Ministral3ForCausalLM(PreNormLM):
    """As Mistral, with queries that grow with their position beyond the trained length.

    Source: transformers 5.19 modeling_ministral3.
    """

    traits = Traits(
        window="every",
        head_dim=128,
        defaults={"sliding_window": None, "rms_norm_eps": 1e-5},
        rope=YARN,
        rope_keys=frozenset({GROWTH, "max_position_embeddings"}),  # the latter repeats the one outside
    )
