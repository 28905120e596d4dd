"""Models some of whose layers are mixtures of experts."""

from __future__ import annotations

from torch import nn

from bitgrain.formats.expert_stacks import ExpertStack
from bitgrain.layers.builder import ModelBuilder
from bitgrain.layers.sparse_mlp import SparseMLP
from bitgrain.models.config import ModelConfig
from bitgrain.models.decoder import SlotList
from bitgrain.models.pre_norm import PreNormLM


class SparseLM(PreNormLM):
    """As its base, with experts in place of the MLP in the layers that the configuration names."""

    @classmethod
    def expert_stack(cls, config: ModelConfig, count: int) -> ExpertStack:
        """How `count` experts lie where they are stored together."""
        return ExpertStack(count, config.hidden_size, config.mixtures.size)

    @classmethod
    def mlp_slots(cls, slots: SlotList, config: ModelConfig, index: int, name: str) -> None:
        mixtures = config.mixtures
        routing = mixtures.routings[index]
        if routing is None:
            super().mlp_slots(slots, config, index, name)
            return
        name = f"{name.rpartition('.')[0]}.{mixtures.module}"
        stack = cls.expert_stack(config, routing.count)
        slots.router(f"{name}.{routing.router}", routing, stack.biased)
        slots.experts(f"{name}.experts", stack)
        if mixtures.shared is not None:
            slots.mlp(f"{name}.{mixtures.shared.name}", mixtures.shared.size)
            if mixtures.shared.gate:
                slots.linear(f"{name}.{mixtures.shared.gate}", 1, config.hidden_size)

    def make_mlp(self, builder: ModelBuilder, index: int, name: str) -> nn.Module:
        mixtures = self.config.mixtures
        routing = mixtures.routings[index]
        if routing is None:
            return super().make_mlp(builder, index, name)
        return SparseMLP(builder, f"{name.rpartition('.')[0]}.{mixtures.module}", self.config.join, routing, mixtures.shared)
