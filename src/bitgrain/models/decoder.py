"""The pre-norm residual block that all architectures here share, and the modules that it needs of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from bitgrain.formats.base import ModuleKind
from bitgrain.formats.expert_stacks import ExpertStack
from bitgrain.formats.slots import ModelSlots, ModuleSlot
from bitgrain.layers.attention import Attention, Step
from bitgrain.layers.builder import ModelBuilder
from bitgrain.layers.norm import RMSNorm
from bitgrain.models.config import ModelConfig

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, attention_norm: RMSNorm, attention: Attention, mlp_norm: RMSNorm, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.attention, self.mlp_norm, self.mlp = attention_norm, attention, mlp_norm, mlp

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """[T, hidden] for x [T, hidden]."""
        x = x + self.attention(self.attention_norm(x), step)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


def layer_name(index: int) -> str:
    return f"model.layers.{index}"


def norm(builder: ModelBuilder, name: str) -> RMSNorm:
    """The norm over the hidden size called `name`."""
    size, eps = builder.config.hidden_size, builder.config.rms_norm_eps
    bias = builder.optional_vector(f"{name}.bias", size)
    return RMSNorm(builder.vector(f"{name}.weight", size), eps, bias, builder.config.wide_norm)


class SlotList:
    """Collects the slots of a model in the order in which it is built."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._modules: list[ModuleSlot] = [self._matrix(EMBEDDING, ModuleKind.EMBEDDING, config.vocab_size, config.hidden_size)]
        self._groups: list[tuple[str, ...]] = []
        self._attention: list[str] = []
        self._experts: ExpertStack | None = None

    @staticmethod
    def _matrix(name: str, kind: ModuleKind, n: int, k: int, biased: bool = False, tied_to: str | None = None) -> ModuleSlot:
        return ModuleSlot(name, kind, (n, k), "required" if biased else "optional", tied_to)

    def vectors(self, size: int, *names: str) -> None:
        self._modules += [ModuleSlot(name, ModuleKind.VECTOR, (size,)) for name in names]

    def layer_norms(self, name: str) -> None:
        self.vectors(self.config.hidden_size, f"{name}.input_layernorm", f"{name}.post_attention_layernorm")

    def attention(self, name: str, qk_norm: bool = False, sinks: bool = False) -> None:
        """q, k, v and o of an attention module, its norms and its heads' sinks."""
        c = self.config
        for part, heads in (("q", c.num_attention_heads), ("k", c.num_key_value_heads), ("v", c.num_key_value_heads)):
            self._modules.append(self._matrix(f"{name}.{part}_proj", ModuleKind.LINEAR, heads * c.head_dim, c.hidden_size, c.qkv_bias))
        self._modules.append(self._matrix(f"{name}.o_proj", ModuleKind.LINEAR, c.hidden_size, c.num_attention_heads * c.head_dim, c.o_bias))
        if qk_norm:
            self.vectors(c.head_dim, f"{name}.q_norm", f"{name}.k_norm")
        if sinks:
            self._modules.append(ModuleSlot(f"{name}.sinks", ModuleKind.VECTOR, (c.num_attention_heads,), bare=True))
        self._groups.append((f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj"))
        self._attention.append(name)

    def mlp(self, name: str, size: int, kind: ModuleKind = ModuleKind.LINEAR) -> None:
        """gate, up and down of a gated MLP, or of one expert."""
        hidden, biased = self.config.hidden_size, self.config.mlp_bias
        gate, up = f"{name}.gate_proj", f"{name}.up_proj"
        self._modules += [self._matrix(gate, kind, size, hidden, biased), self._matrix(up, kind, size, hidden, biased)]
        self._modules.append(self._matrix(f"{name}.down_proj", kind, hidden, size, biased))
        self._groups.append((gate, up))

    def router(self, name: str, experts: int, biased: bool = False) -> None:
        self._modules.append(self._matrix(name, ModuleKind.LINEAR, experts, self.config.hidden_size, biased))

    def experts(self, name: str, stack: ExpertStack) -> None:
        """gate, up and down of each expert under `name`, however they are stored."""
        self._experts = stack
        for expert in range(stack.count):
            self.mlp(f"{name}.{expert}", stack.size, ModuleKind.EXPERT)

    def finish(self) -> ModelSlots:
        """All slots, the final norm and the head added."""
        self.vectors(self.config.hidden_size, FINAL_NORM)
        tied_to = EMBEDDING if self.config.tie_word_embeddings else None
        self._modules.append(self._matrix(HEAD, ModuleKind.LM_HEAD, self.config.vocab_size, self.config.hidden_size, tied_to=tied_to))
        return ModelSlots(tuple(self._modules), tuple(self._groups), tuple(self._attention), self._experts)


def layers(config: ModelConfig) -> Iterator[tuple[int, str]]:
    """(index, module name) of each layer."""
    return ((i, layer_name(i)) for i in range(config.num_hidden_layers))
