"""GLM-4.5 and later, the mixtures of experts."""

from __future__ import annotations

from dataclasses import replace

from bitgrain.layers.attention import AttentionShape
from bitgrain.models.config import ModelConfig, Traits
from bitgrain.models.routing_config import ExpertTraits
from bitgrain.models.sparse import SparseLM


class Glm4MoeForCausalLM(SparseLM):
    """Half of each head is rotated; perhaps norms over each head of q and k; experts that are routed as in DeepSeek-V3.

    Source: transformers 5.19 modeling_glm4_moe.
    """

    traits = Traits(
        experts=ExpertTraits("corrected", dense="leading", shared="shared_experts"),
        further_layers=True,
        rotated_share=0.5,
        output_bias=False,
        defaults={"rms_norm_eps": 1e-5, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "first_k_dense_replace": 1},
        implements=frozenset({"use_qk_norm"}),
    )

    @classmethod
    def attention_shape(cls, config: ModelConfig, index: int) -> AttentionShape:
        shape = super().attention_shape(config, index)
        return replace(shape, norm=config.norm_style if config.qk_norm else None)
