"""Configuration of ModelSlim checkpoints: `quant_model_description.json` beside the weights, nothing in config.json.

Every tensor has a type string of its own, so modules of one checkpoint may differ in everything.  Found by the description
file alone; `quant_model_description_<type>.json` is the older tool's name of it.
Source: formats specification, part 2, section 2; msmodelslim 26.1.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES, TensorHeader
from bitgrain.errors import BitgrainError, ConfigError, MissingTensorError, raise_all
from bitgrain.formats.attention_schemes import KVCacheScheme
from bitgrain.formats.base import ModuleView, QuantConfig, Scheme
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.examples import SHAPE, examples_of
from bitgrain.formats.matching import SegmentRules
from bitgrain.formats.modelslim.cache import C8_TENSORS, cache_scheme
from bitgrain.formats.modelslim.choice import MX_BLOCK, Chooser
from bitgrain.formats.modelslim.description import Description, read_description
from bitgrain.formats.modelslim.schemes.floats import ChannelFloat8Scheme, MicroscalingScheme
from bitgrain.formats.modelslim.schemes.integers import IntScheme
from bitgrain.formats.modelslim.schemes.static import StaticScheme
from bitgrain.formats.modelslim.schemes.transforms import LINEAR, MUL_SCALE, Rotation, TransformedScheme
from bitgrain.formats.modelslim.types import TYPES, split_type
from bitgrain.weights import ActivationSpec, WeightSpec

if TYPE_CHECKING:
    from typing_extensions import Self

FILE_STEM = "quant_model_description"
METHODS = ("modelslim", "msmodelslim")
# Endings of duplicates that the older tool writes beside the tensors that it adds to norms.
DUPLICATES = (".module.weight", ".module.bias")


@dataclass(slots=True)
class ModelSlimConfig(QuantConfig):
    """Parsed description of a ModelSlim checkpoint.

    Args:
        description: of every tensor.
        smoothed:    modules whose weight stands under `linear.`, beside the scale of their input.
        ignored:     rules that leave modules dense, whole dotted segments.
        read_small:  see Evidence.
    """

    name: ClassVar[str] = "modelslim"
    aliases: ClassVar[tuple[str, ...]] = ("msmodelslim",)
    informational: ClassVar[frozenset[str]] = frozenset({"model_quant_type", "optional", "reduce_quant_type"})
    quantizes_embeddings: ClassVar[bool] = True
    norm_biases: ClassVar[bool] = True
    unties_head: ClassVar[bool] = True

    description: Description
    smoothed: frozenset[str]
    ignored: SegmentRules
    read_small: Callable[[str], Tensor]

    @classmethod
    def examples(cls) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
        k = SHAPE[1]
        kinds = {name: kind.activation for name, kind in TYPES.items()}
        dynamic = IntScheme(SHAPE, kinds["W4A4_DYNAMIC"], 4, "plain", k)
        return examples_of(
            StaticScheme(SHAPE, kinds["W8A8"]),
            IntScheme(SHAPE, kinds["W8A8_DYNAMIC"], 8, "plain", k),
            IntScheme(SHAPE, kinds["W8A16"], 8, "plain", k, "integer"),
            IntScheme(SHAPE, kinds["W4A16"], 4, "rows", 64, "integer"),
            IntScheme(SHAPE, kinds["W4A8_DYNAMIC"], 4, "rows", k),
            dynamic,
            TransformedScheme(dynamic, rotations=(Rotation("left_trans", "right_trans", (16, k // 16)),)),
            ChannelFloat8Scheme(SHAPE, kinds["WFP8AFP8_DYNAMIC"]),
            MicroscalingScheme(SHAPE, "fp8_e4m3fn", MX_BLOCK, "e8m0", kinds["W8A8_MXFP8"]),
            MicroscalingScheme(SHAPE, "fp4_e2m1", MX_BLOCK, "e8m0", kinds["W4A8_MXFP"]),
            MicroscalingScheme(SHAPE, "fp4_e2m1", MX_BLOCK, "e8m0", kinds["W4A4_MXFP4"]),
            MicroscalingScheme(SHAPE, "fp4_e2m1", MX_BLOCK, "e8m0", kinds["W4A4_MXFP4_DUALSCALE"], second_group=256),
        )

    @classmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        files = _description_files(evidence)
        if not files:
            return None
        return Detection(100 if evidence.method in METHODS else 80, (f"{files[0]} lies beside the weights",))

    @classmethod
    def parse(cls, evidence: Evidence) -> Self:
        files = _description_files(evidence)
        description = read_description(evidence.settings(), " and ".join(files))
        names = (*evidence.tensors, *description.types)
        if description.cache and not any(name.endswith(C8_TENSORS) for name in names):
            found, needed = "a cache of int8 is announced, but no scale of it is described or stored", f"tensors named {', '.join(C8_TENSORS)}"
            raise ConfigError(f"{files[0]}: kv_cache_type", found, needed, "fetch or write the checkpoint again")
        raise_all(files[0], _lost_biases(evidence, description))
        smoothed = frozenset(name.removesuffix(f".{MUL_SCALE}") for name in names if name.endswith(f".{MUL_SCALE}"))
        return cls(description, smoothed, SegmentRules(dict.fromkeys(description.ignored)), evidence.read_small)

    def split_name(self, name: str) -> tuple[str, str]:
        module, _, local = name.rpartition(".")
        outer, _, last = module.rpartition(".")
        if outer in self.smoothed and f"{last}." in (LINEAR, f"{MUL_SCALE.partition('.')[0]}."):
            return outer, f"{last}.{local}"
        return module, local

    def left_out(self, tensors: Mapping[str, TensorHeader]) -> dict[str, str]:
        found = {}
        for name, header in tensors.items():
            if not name.endswith(DUPLICATES):
                continue
            module, _, local = name.rpartition(".")
            twin = tensors.get(f"{module.removesuffix('.module')}.{local}")
            if twin is not None and (twin.dtype, twin.shape) == (header.dtype, header.shape):
                found[name] = f"the older tool stores {twin.name} twice"
        return found

    def type_of(self, module: ModuleView) -> tuple[str, str]:
        """(type string of the module's weight, the name that it is described under, "" if it is not)."""
        return self.description.type_of(self._weight_name(module))

    def _weight_name(self, module: ModuleView) -> str:
        return module.full_name(f"{LINEAR if module.name in self.smoothed else ''}weight")

    def is_quantized(self, module: ModuleView) -> bool:
        kind, _ = self.type_of(module)
        if TYPES[split_type(kind)[0]].storage != "dense":
            return True
        return _needs_more(module)

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        rule = self.ignored.find(module.name)
        if rule is not None:
            self.matched_rules.add(rule)
            return False, f"excluded by the rule {rule!r}"
        kind, name = self.type_of(module)
        why = f"described as {kind}" if name else f"{self._weight_name(module)} is not in the description, so not quantized"
        if TYPES[split_type(kind)[0]].storage != "dense":
            return True, why
        # a dense weight may still have its input transformed
        weight = module.tensors.get("weight") or module.tensors.get(f"{LINEAR}weight")
        extra = _needs_more(module) and weight is not None and weight.dtype in FLOAT_CODES
        return extra and bool(name), why

    def rules(self) -> Sequence[str]:
        return self.ignored.patterns

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        return Chooser(module, self.type_of(module)[0], self.description, self.read_small).scheme()

    def get_kv_cache_scheme(self, module: ModuleView) -> KVCacheScheme:
        return cache_scheme(module, self.description)


def _description_files(evidence: Evidence) -> list[str]:
    return sorted(name for name in evidence.sidecars if name.startswith(FILE_STEM))


def _lost_biases(evidence: Evidence, description: Description) -> list[BitgrainError]:
    """Biases that are described and not stored beside their weights; a static type holds them in another tensor as well."""
    lost: list[BitgrainError] = []
    for name in description.types:
        module, _, local = name.rpartition(".")
        weight = f"{module}.weight"
        if local != "bias" or name in evidence.tensors or weight not in evidence.tensors:
            continue
        if TYPES[split_type(description.type_of(weight)[0])[0]].storage != "static":
            lost.append(MissingTensorError(name, "described, but not stored", f"the bias beside {weight}", "fetch or write the checkpoint again"))
    return lost


def _needs_more(module: ModuleView) -> bool:
    """Whether the module has tensors that no dense module has, or a weight of another type."""
    weight = module.tensors.get("weight")
    return not set(module.tensors) <= {"weight", "bias"} or (weight is not None and weight.dtype not in FLOAT_CODES)
