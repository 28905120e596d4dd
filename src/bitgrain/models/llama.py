"""Llama 1 to 3 and the many models that share its architecture."""

from __future__ import annotations

from bitgrain.formats.slots import ModelSlots
from bitgrain.layers.attention import Attention, AttentionShape
from bitgrain.layers.builder import ModelBuilder
from bitgrain.layers.mlp import GatedMLP
from bitgrain.models.causal_lm import CausalLM
from bitgrain.models.config import ModelConfig, Traits
from bitgrain.models.decoder import DecoderLayer, SlotList, layers, norm


class LlamaForCausalLM(CausalLM):
    """Rotary grouped-query attention and a gated MLP; biases only where the configuration has them."""

    traits = Traits(window="none")

    @staticmethod
    def slots(config: ModelConfig) -> ModelSlots:
        slots = SlotList(config)
        for _, name in layers(config):
            slots.layer_norms(name)
            slots.attention(f"{name}.self_attn")
            slots.mlp(f"{name}.mlp", config.intermediate_size)
        return slots.finish()

    def make_layer(self, builder: ModelBuilder, index: int, name: str) -> DecoderLayer:
        c = self.config
        shape = AttentionShape(c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        return DecoderLayer(
            norm(builder, f"{name}.input_layernorm"),
            Attention(builder, f"{name}.self_attn", index, shape),
            norm(builder, f"{name}.post_attention_layernorm"),
            GatedMLP(builder, f"{name}.mlp", c.hidden_act),
        )
