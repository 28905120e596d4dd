"""gpt-oss: mixtures of experts with attention sinks and a sliding window in every second layer."""

from __future__ import annotations

from torch import nn

from bitgrain.formats.expert_stacks import ExpertStack
from bitgrain.layers.builder import ModelBuilder
from bitgrain.layers.sparse_mlp import SparseMLP
from bitgrain.models.config import ModelConfig, Traits
from bitgrain.models.decoder import SlotList
from bitgrain.models.pre_norm import PreNormLM

# Where config.json says nothing of it.
YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096,
}  # fmt: skip


class GptOssForCausalLM(PreNormLM):
    """As Llama, with experts in every layer, biases everywhere, a sink per attention head, and a clamped gate in the experts.

    Source: transformers 5.19 modeling_gpt_oss.
    """

    traits = Traits(
        window="alternate",
        experts=True,
        head_dim=64,
        defaults={"rms_norm_eps": 1e-5, "attention_bias": True, "mlp_bias": True, "sliding_window": 128},
        rope=YARN,
        rope_theta=150000.0,
        expert_size="intermediate_size",
        router=("router", True),
        clamped_gate=True,
        wide_norm=True,
        implements=frozenset({"num_experts", "num_local_experts", "swiglu_alpha", "swiglu_limit"}),
    )
    sinks = True

    @classmethod
    def mlp_slots(cls, slots: SlotList, config: ModelConfig, index: int, name: str) -> None:
        routing = config.routing(index)
        assert routing is not None  # every layer is sparse
        slots.router(f"{name}.{routing.router}", routing.count, biased=True)
        stack = ExpertStack(routing.count, config.hidden_size, config.moe_intermediate_size, transposed=True, interleaved=True, biased=True)
        slots.experts(f"{name}.experts", stack)

    def make_mlp(self, builder: ModelBuilder, index: int, name: str) -> nn.Module:
        routing = self.config.routing(index)
        assert routing is not None
        return SparseMLP(builder, name, self.config.join, routing)
