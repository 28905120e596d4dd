"""Qwen3, the mixtures of experts."""

from __future__ import annotations

from torch import nn

from bitgrain.formats.base import ModuleKind
from bitgrain.formats.slots import ModelSlots
from bitgrain.layers.attention import Attention, AttentionShape
from bitgrain.layers.builder import ModelBuilder
from bitgrain.layers.experts import SparseMLP
from bitgrain.layers.mlp import GatedMLP
from bitgrain.models.causal_lm import CausalLM
from bitgrain.models.config import ModelConfig, Traits
from bitgrain.models.decoder import DecoderLayer, SlotList, layers, norm


class Qwen3MoeForCausalLM(CausalLM):
    """As Qwen3, with experts in place of the MLP in the layers that the configuration names."""

    traits = Traits(window="switched", experts=True, implements=frozenset({"num_experts", "num_local_experts"}))

    @staticmethod
    def slots(config: ModelConfig) -> ModelSlots:
        slots = SlotList(config)
        for index, name in layers(config):
            slots.layer_norms(name)
            slots.attention(f"{name}.self_attn", qk_norm=True)
            routing = config.routing(index)
            if routing is None:
                slots.mlp(f"{name}.mlp", config.intermediate_size)
                continue
            slots.router(f"{name}.mlp.gate", routing.count)
            for expert in range(routing.count):
                slots.mlp(f"{name}.mlp.experts.{expert}", config.moe_intermediate_size, ModuleKind.EXPERT)
        return slots.finish()

    def make_layer(self, builder: ModelBuilder, index: int, name: str) -> DecoderLayer:
        c = self.config
        shape = AttentionShape(c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.windows[index], c.rms_norm_eps)
        return DecoderLayer(
            norm(builder, f"{name}.input_layernorm"),
            Attention(builder, f"{name}.self_attn", index, shape),
            norm(builder, f"{name}.post_attention_layernorm"),
            self._mlp(builder, index, f"{name}.mlp"),
        )

    def _mlp(self, builder: ModelBuilder, index: int, name: str) -> nn.Module:
        routing = self.config.routing(index)
        if routing is None:
            return GatedMLP(builder, name, self.config.hidden_act)
        return SparseMLP(builder, name, self.config.hidden_act, routing)
