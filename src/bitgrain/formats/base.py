"""The contracts of the first two nouns: Config (detects, parses, chooses) and Scheme (what one module's tensors mean)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from bitgrain.checkpoint.described_tokenizer import TokenizerDescription
from bitgrain.checkpoint.headers import FLOAT_CODES, TORCH_DTYPES, TensorHeader
from bitgrain.checkpoint.parts import StoredPart
from bitgrain.errors import RuleMismatchError
from bitgrain.formats.attention_schemes import KVCacheScheme
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.expert_stacks import ExpertStack, divide_experts
from bitgrain.formats.value_checks import require_finite
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, DenseWeight, Weight, WeightSpec

if TYPE_CHECKING:
    from typing_extensions import Self


class ModuleKind(str, Enum):
    """What a checkpoint module is; each kind has its own way to a scheme."""

    LINEAR = "linear"
    EXPERT = "expert"  # one projection of one expert
    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    VECTOR = "vector"  # norms and other one-dimensional parameters
    ATTENTION = "attention"  # holds scales of the KV cache, no weight


MATRIX_KINDS = (ModuleKind.LINEAR, ModuleKind.EXPERT, ModuleKind.EMBEDDING, ModuleKind.LM_HEAD)


@dataclass(frozen=True, slots=True)
class ModuleView:
    """One checkpoint module as its headers show it.

    Args:
        name:    checkpoint module name, e.g. "model.layers.0.mlp.down_proj".
        tensors: local name (what follows the module name) to header.
        shape:   (N, K) that the architecture gives the module; None when no architecture is known.
        heights: N of each module that this one stands for, in stored order; () if it is one of the architecture's own.
    """

    name: str
    kind: ModuleKind
    tensors: Mapping[str, TensorHeader]
    shape: tuple[int, int] | None = None
    heights: tuple[int, ...] = ()

    def full_name(self, local: str) -> str:
        return f"{self.name}.{local}" if self.name else local


@dataclass(frozen=True, slots=True)
class TensorRule:
    """One tensor that a scheme declares.

    Args:
        name:     local name.
        dtypes:   allowed element types, as safetensors spells them.
        shapes:   allowed shapes, the usual one first; a size of -1 stands for any.
        required: False: may be absent.
    """

    name: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    required: bool = True

    def allows_shape(self, shape: tuple[int, ...]) -> bool:
        return any(len(s) == len(shape) and all(a in (-1, b) for a, b in zip(s, shape, strict=True)) for s in self.shapes)


def scalar_shapes() -> tuple[tuple[int, ...], ...]:
    """The ways in which producers store one number."""
    return ((1,), (), (1, 1))


class Scheme(ABC):
    """What the tensors of one module mean.  Frozen dataclasses; made from headers, before any data is read.

    Args:
        shape:      (N, K).
        activation: the input quantization that belongs to the module (static values still unknown).
    """

    shape: tuple[int, int]
    activation: ActivationSpec

    @property
    @abstractmethod
    def weight_spec(self) -> WeightSpec:
        """The spec that to_weight()'s result will have (scale dtypes included)."""

    @abstractmethod
    def tensors(self) -> tuple[TensorRule, ...]:
        """Every tensor of the module, the bias left out."""

    @abstractmethod
    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        """Decode the module's tensors (local name to data, as stored) into its canonical weight.

        A module whose input is scaled or rotated first gives a weights.Transformed, and says so in `transforms_input`.

        Raises:
            BadValueError, LabelMismatchError, ShapeMismatchError: the data cannot mean what the headers promise; `where`
            is the tensor's local name, to which the loader adds the module and the file.
        """

    def to_bias(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """[N], what is added to the product; None if nothing is."""
        bias = tensors.get("bias")
        return None if bias is None else require_finite("bias", bias)

    def to_activation(self, tensors: Mapping[str, Tensor]) -> ActivationSpec:
        """The activation specification with static values filled in."""
        return self.activation

    @property
    def transforms_input(self) -> bool:
        """The module has input transforms (or a low-rank correction) of its own, stored beside its weight."""
        return False

    @property
    def has_own_codebooks(self) -> bool:
        """The module's codes look their values up in codebooks stored for it alone."""
        return False

    @property
    def borrowed(self) -> tuple[tuple[str, str], ...]:
        """(local name, full name) of tensors that other modules store and this one uses too; tensors() declares them."""
        return ()

    @property
    def holds_bias(self) -> bool:
        """A bias may be part of other tensors, so that a required one need not be stored by its name."""
        return False

    @property
    def label(self) -> str:
        """Notation such as "W4A16 int4 g128 asym"."""
        spec = self.weight_spec
        act = self.activation
        head = f"W{spec.bits}A{act.bits}"
        tail = "" if act.is_none else f", activation {act.describe()}"
        return f"{head} {spec.describe()}{tail}{', input transform' if self.transforms_input else ''}"

    def bias_rule(self) -> TensorRule:
        """The bias that any linear module may have: [N]."""
        return TensorRule("bias", FLOAT_CODES, ((self.shape[0],),), required=False)

    def fusion_key(self) -> object:
        """Modules with equal keys may become one matrix; by default the specs, the width and the activation."""
        return (self.weight_spec, self.shape[1], self.activation)


@dataclass(frozen=True, slots=True)
class DenseScheme(Scheme):
    """An unquantized matrix: `weight` [N, K] in a 16- or 32-bit float."""

    shape: tuple[int, int]
    dtype: str
    activation: ActivationSpec = NO_ACTIVATION

    @property
    def weight_spec(self) -> WeightSpec:
        dtype = TORCH_DTYPES[self.dtype]
        return WeightSpec("dense", str(dtype).removeprefix("torch."), 8 * dtype.itemsize)

    def tensors(self) -> tuple[TensorRule, ...]:
        return (TensorRule("weight", (self.dtype,), (self.shape,)),)

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        return DenseWeight(require_finite("weight", tensors["weight"]))

    @property
    def label(self) -> str:
        return f"dense {self.weight_spec.element}"


@dataclass(frozen=True, slots=True)
class Choice:
    """A scheme and the rule or evidence that chose it."""

    scheme: Scheme
    why: str


@dataclass(slots=True)
class QuantConfig(ABC):
    """The first noun: one producer's parsed and validated configuration.

    Class attributes:
        name:    the format's canonical name.
        aliases: other names under which users of other engines ask for it.
        hints:   words of a user that agree with a checkpoint of this format, though they mean something else elsewhere.
        informational: configuration keys that may differ between files without a conflict.
        quantizes_embeddings: the format can hold a quantized token embedding.
        norm_biases: the producer may give norms a bias that the architecture does not have; it is added.
        holds_plain_weights: a checkpoint of the format is not quantized, so that a run may quantize it while it loads.
        unties_head: a stored output head counts even where config.json ties it to the embedding.
    Attributes:
        trust_tensors: the user's explicit override, set by the resolver: where a rule excludes a module that has quantized
                       tensors, believe the tensors.
        matched_rules: rules that have matched a module so far.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    hints: ClassVar[tuple[str, ...]] = ()
    informational: ClassVar[frozenset[str]] = frozenset()
    quantizes_embeddings: ClassVar[bool] = False
    norm_biases: ClassVar[bool] = False
    unties_head: ClassVar[bool] = False
    holds_plain_weights: ClassVar[bool] = False

    trust_tensors: bool = field(default=False, init=False)
    matched_rules: set[str] = field(default_factory=set, init=False)

    @classmethod
    def examples(cls) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
        """(label, weight, activation) of schemes that the format can hold; the support matrix shows them."""
        return ()

    @classmethod
    @abstractmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        """How strongly the evidence says that this format wrote the checkpoint; None if not at all."""

    @classmethod
    def model_config(cls, evidence: Evidence) -> Mapping[str, Any]:
        """What config.json would say, from a container that describes its model itself (`evidence.properties`).

        Raises:
            ConfigError, UnsupportedArchitectureError: the description lacks something or means something unknown.
        """
        return evidence.config

    @classmethod
    def tokenizer(cls, evidence: Evidence, beside: bool) -> TokenizerDescription | None:
        """The tokenizer, from a container that holds it itself; None: it stands in the files beside the checkpoint.

        Args:
            beside: there is such a file, which serves where the container holds no tokenizer, or one of an unknown kind.
        Raises:
            ConfigError, DamagedFileError: there is none, or it is of an unknown kind; or its parts contradict each other.
        """
        return None

    def split_name(self, name: str) -> tuple[str, str]:
        """(module, local name) of a full tensor name; formats whose local names hold dots override it."""
        module, _, local = name.rpartition(".")
        return module, local

    def attention_of(self, name: str) -> str | None:
        """The attention module that a tensor belongs to, for tensors other than the KV cache's scales; None for any other tensor."""
        return None

    def is_own_scale(self, name: str) -> bool:
        """Whether a tensor belongs to its module though its full name is one of those of the KV cache's scales."""
        return False

    def parts(self, tensors: Mapping[str, TensorHeader], experts: ExpertStack | None) -> dict[str, StoredPart]:
        """Every tensor as modules see it, by full name: stacked experts divided, everything else whole.

        Args:
            tensors: the stored ones, those of `left_out()` excepted.
            experts: how the architecture stacks experts where they are stored together; None if it has none, or is unknown.
        """
        return divide_experts(tensors, experts)

    def joint_module(self, modules: Sequence[str]) -> tuple[str, tuple[int, ...]] | None:
        """(name, places) of the one module in which the writer may store several that share an input; None if it never does.

        Args:
            modules: names, in the architecture's order.
        Returns:
            places: where each of them stands in the stored one.
        """
        return None

    def left_out(self, tensors: Mapping[str, TensorHeader]) -> dict[str, str]:
        """Stored tensors that mean nothing for running the model: full name to the rule."""
        return {}

    @classmethod
    @abstractmethod
    def parse(cls, evidence: Evidence) -> Self:
        """The validated configuration.

        Raises:
            ConfigError: keys that are missing, unknown or impossible; all of them at once.
        """

    def get_linear_scheme(self, module: ModuleView) -> Choice:
        """Scheme of a linear module."""
        return self.decide(module)

    def get_moe_scheme(self, module: ModuleView) -> Choice:
        """Scheme of one projection of one expert."""
        return self.decide(module)

    def get_lm_head_scheme(self, module: ModuleView) -> Choice:
        """Scheme of the output head, whether its storage is tied to the embedding or not."""
        return self.decide(module)

    def get_embedding_scheme(self, module: ModuleView) -> Choice:
        """Scheme of a token embedding."""
        return self.decide(module)

    def get_kv_cache_scheme(self, module: ModuleView) -> KVCacheScheme:
        """What the checkpoint says about the cache of one attention module; `module` holds only scale tensors."""
        return KVCacheScheme()

    @abstractmethod
    def is_quantized(self, module: ModuleView) -> bool:
        """Whether the tensors present are quantized ones of this format."""

    @abstractmethod
    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        """(quantized, why) as the configuration alone says; records the rule in `matched_rules`."""

    @abstractmethod
    def quantized_scheme(self, module: ModuleView) -> Scheme:
        """The scheme of a module that has quantized tensors; raises if the settings cannot fit them."""

    def rules(self) -> Sequence[str]:
        """Every rule of the configuration that should match some module (ignore lists, targets, overrides)."""
        return ()

    def decide(self, module: ModuleView) -> Choice:
        """Weigh the rule against the tensors; tensors decide presence, the configuration decides meaning.

        Raises:
            RuleMismatchError: the configuration excludes a module that has quantized tensors.
        """
        wanted, why = self.rule_for(module)
        present = self.is_quantized(module)
        if present and not wanted:
            if not self.trust_tensors:
                raise RuleMismatchError(
                    module.name,
                    f"{why}, but the module has quantized tensors: {', '.join(sorted(module.tensors))}",
                    "a rule and tensors that agree",
                    "correct the configuration, or believe the tensors with trust_tensors=True (--trust-tensors)",
                )
            return Choice(self.quantized_scheme(module), f"{why}; overridden: the tensors are quantized and were trusted")
        if present:
            return Choice(self.quantized_scheme(module), why)
        scheme = dense_scheme(module)
        return Choice(scheme, f"{why}, but its tensors are dense" if wanted else why)


def dense_scheme(module: ModuleView) -> DenseScheme:
    """DenseScheme of a module's `weight`.  The plan reports other or missing tensors against it."""
    header = module.tensors.get("weight")
    shape = module.shape or (0, 0)
    dtype = "BF16"
    if header is not None:
        if len(header.shape) == 2 and module.shape is None:
            shape = (header.shape[0], header.shape[1])
        if header.dtype in FLOAT_CODES:
            dtype = header.dtype
    return DenseScheme(shape, dtype)
