"""The layer that most models share: a norm before attention, a norm before a gated MLP, both added to the residual."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from bitgrain.formats.slots import ModelSlots
from bitgrain.layers.attention import Attention, AttentionShape
from bitgrain.layers.builder import ModelBuilder
from bitgrain.layers.mlp import GatedMLP
from bitgrain.models.causal_lm import CausalLM
from bitgrain.models.config import ModelConfig
from bitgrain.models.decoder import DecoderLayer, SlotList, layers, norm


class PreNormLM(CausalLM):
    """A model of such layers; architectures say what they do otherwise.

    Attributes:
        qk_norm: each head of q and k goes through a norm of its own.
        sinks:   each head of attention has a sink.
    """

    qk_norm: ClassVar[bool] = False
    sinks: ClassVar[bool] = False

    @classmethod
    def slots(cls, config: ModelConfig) -> ModelSlots:
        slots = SlotList(config)
        for index, name in layers(config):
            slots.layer_norms(name)
            slots.attention(f"{name}.self_attn", qk_norm=cls.qk_norm, sinks=cls.sinks)
            cls.mlp_slots(slots, config, index, f"{name}.mlp")
        return slots.finish()

    @classmethod
    def mlp_slots(cls, slots: SlotList, config: ModelConfig, index: int, name: str) -> None:
        """Add the modules of layer `index`'s MLP."""
        slots.mlp(name, config.intermediate_size)

    def make_layer(self, builder: ModelBuilder, index: int, name: str) -> DecoderLayer:
        c = self.config
        eps = c.rms_norm_eps if self.qk_norm else None
        shape = AttentionShape(c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.windows[index], eps, self.sinks)
        return DecoderLayer(
            norm(builder, f"{name}.input_layernorm"),
            Attention(builder, f"{name}.self_attn", index, shape),
            norm(builder, f"{name}.post_attention_layernorm"),
            self.make_mlp(builder, index, f"{name}.mlp"),
        )

    def make_mlp(self, builder: ModelBuilder, index: int, name: str) -> nn.Module:
        """The MLP of layer `index`."""
        return GatedMLP(builder, name, self.config.join)
