"""Qwen3, the mixtures of experts."""

from __future__ import annotations

from torch import nn

from bitgrain.formats.expert_stacks import ExpertStack
from bitgrain.layers.builder import ModelBuilder
from bitgrain.layers.sparse_mlp import SparseMLP
from bitgrain.models.config import ModelConfig, Traits
from bitgrain.models.decoder import SlotList
from bitgrain.models.pre_norm import PreNormLM


class Qwen3MoeForCausalLM(PreNormLM):
    """As Qwen3, with experts in place of the MLP in the layers that the configuration names."""

    traits = Traits(window="switched", experts=True, implements=frozenset({"num_experts", "num_local_experts"}))
    qk_norm = True

    @classmethod
    def mlp_slots(cls, slots: SlotList, config: ModelConfig, index: int, name: str) -> None:
        routing = config.routing(index)
        if routing is None:
            super().mlp_slots(slots, config, index, name)
            return
        slots.router(f"{name}.{routing.router}", routing.count)
        slots.experts(f"{name}.experts", ExpertStack(routing.count, config.hidden_size, config.moe_intermediate_size))

    def make_mlp(self, builder: ModelBuilder, index: int, name: str) -> nn.Module:
        routing = self.config.routing(index)
        if routing is None:
            return super().make_mlp(builder, index, name)
        return SparseMLP(builder, name, self.config.join, routing)
