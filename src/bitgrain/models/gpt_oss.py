"""gpt-oss: mixtures of experts with attention sinks and a sliding window in every second layer."""

from __future__ import annotations

from dataclasses import replace

from bitgrain.formats.expert_stacks import ExpertStack
from bitgrain.models.config import ModelConfig, Traits
from bitgrain.models.routing_config import ExpertTraits
from bitgrain.models.sparse import SparseLM

# Where config.json says nothing of it.
YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096,
}  # fmt: skip


class GptOssForCausalLM(SparseLM):
    """As Llama, with experts in every layer, biases everywhere, a sink per attention head, and a clamped gate in the experts.

    Source: transformers 5.19 modeling_gpt_oss.
    """

    traits = Traits(
        window="alternate",
        experts=ExpertTraits("over chosen", "intermediate_size", router="router"),
        head_dim=64,
        defaults={"rms_norm_eps": 1e-5, "attention_bias": True, "mlp_bias": True, "sliding_window": 128},
        rope=YARN,
        rope_theta=150000.0,
        clamped_gate=True,
        wide_norm=True,
        implements=frozenset({"swiglu_alpha", "swiglu_limit"}),
    )
    sinks = True

    @classmethod
    def expert_stack(cls, config: ModelConfig, count: int) -> ExpertStack:
        return replace(super().expert_stack(config, count), transposed=True, interleaved=True, biased=True)
