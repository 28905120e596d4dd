"""Configuration of ModelOpt checkpoints: hf_quant_config.json, and the quantization_config of newer config.json files.

`quant_algo` decides what tensors mean (see algorithms); a checkpoint of MIXED_PRECISION has one per module.  A checkpoint may
quantize nothing but the KV cache.  Source: formats specification, section 6; ModelOpt 0.47.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from bitgrain.checkpoint.headers import FLOAT_CODES, TensorHeader
from bitgrain.checkpoint.parts import StoredPart
from bitgrain.errors import BitgrainError, DtypeMismatchError, MissingTensorError, RuleMismatchError, ShapeMismatchError, raise_all
from bitgrain.formats.attention_schemes import KVCacheScheme
from bitgrain.formats.base import ModuleKind, ModuleView, QuantConfig, Scheme
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.examples import SHAPE, examples_of
from bitgrain.formats.expert_stacks import ExpertStack
from bitgrain.formats.kv_scales import kv_scale_of, kv_scales_in
from bitgrain.formats.modelopt.algorithms import ALGORITHMS, CACHES, MIXED
from bitgrain.formats.modelopt.experts import divide_stacks
from bitgrain.formats.modelopt.module_schemes import QUANTIZED_NAMES, QUANTIZED_WEIGHTS, SUBMODULE, common_group, make_scheme, matrix_of
from bitgrain.formats.modelopt.rules import Exclusions, LayerRecipes
from bitgrain.formats.modelopt.settings import NONE, SECTION, SIDECAR, Recipe, read_settings
from bitgrain.weights import ActivationSpec, WeightSpec

if TYPE_CHECKING:
    from typing_extensions import Self

METHOD = "modelopt"
# Architectures whose fused gate and up rows alternate.
_INTERLEAVED = ("gpt_oss",)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(slots=True)
class ModelOptConfig(QuantConfig):
    """Parsed configuration of a ModelOpt checkpoint.

    Args:
        recipe:      of every module that is not excluded; its algorithm is "" where nothing is quantized but the cache.
        layers:      recipes by module, of mixed checkpoints; None: `recipe` is for all.
        excluded:    modules that stay dense.
        cache:       element type of the KV cache; "none" if the configuration does not speak of one.
        affine:      the cache has biases.
        cast:        no module stores cache scales although there is a quantized cache: the producer fixed them at 1.
        scaled:      kinds of modules (their names without numbers) of which some store a pre_quant_scale.
        interleaved: rows of gate and up alternate where they are fused.
        bias_sizes:  full name of a stored bias of the KV cache to the size that its projection's weight gives it.
    """

    name: ClassVar[str] = METHOD
    aliases: ClassVar[tuple[str, ...]] = ("modelopt_fp8", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed", "petit_nvfp4")
    informational: ClassVar[frozenset[str]] = frozenset({"producer", "lora_rank", "config_groups"})
    quantizes_embeddings: ClassVar[bool] = True

    recipe: Recipe
    layers: LayerRecipes | None
    excluded: Exclusions
    cache: str
    affine: bool
    cast: bool
    scaled: frozenset[str]
    interleaved: bool
    bias_sizes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def examples(cls) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
        view = ModuleView("example", ModuleKind.LINEAR, {}, SHAPE)
        return examples_of(*(make_scheme(view, name, Recipe(name), False) for name in ALGORITHMS if name != "FP8_PB_REAL"))

    @classmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        method, section = evidence.method, evidence.quantization or {}
        if method is not None:
            named = method == METHOD or method.startswith(f"{METHOD}-")
            return Detection(100, (f"quant_method is {method!r}",)) if named else None
        for score, where, place in ((90, SECTION, section), (80, SIDECAR, evidence.sidecars.get(SIDECAR, {}))):
            producer, nested = place.get("producer"), place.get("quantization")
            inner = nested if isinstance(nested, Mapping) else place
            if isinstance(producer, Mapping) and str(producer.get("name")).lower() == METHOD:
                return Detection(score, (f"the producer in {where} is 'modelopt'",))
            if "quant_algo" in inner or "kv_cache_quant_algo" in inner:
                return Detection(score, (f"{where} has quant_algo",))
        return None

    @classmethod
    def parse(cls, evidence: Evidence) -> Self:
        settings = read_settings(evidence)
        cache = settings.cache if settings.cache not in (None, NONE) else ""
        word = settings.word if settings.word not in (None, NONE) else ""
        mixed = word == MIXED
        stored = {place[1] for name in evidence.tensors if (place := kv_scale_of(name)) is not None}
        parsed = cls(
            recipe=Recipe() if mixed or not word else Recipe(word, settings.group or common_group(word, evidence.tensors)),
            layers=LayerRecipes(settings.layers or {}) if mixed else None,
            excluded=Exclusions(settings.excluded or ()),
            cache=CACHES[cache] if cache else "none",
            affine=cache == "NVFP4_AFFINE",
            cast=not stored,
            scaled=frozenset(
                _kind_of(name.removesuffix(".pre_quant_scale")) for name in evidence.tensors if name.endswith(".pre_quant_scale")
            ),
            interleaved=evidence.config.get("model_type") in _INTERLEAVED,
        )
        parsed.bias_sizes = parsed._sizes_of_biases(evidence.tensors)
        return parsed

    def split_name(self, name: str) -> tuple[str, str]:
        module, _, local = name.rpartition(".")
        parent, _, child = module.rpartition(".")
        return (parent, f"{child}.{local}") if child == SUBMODULE and parent else (module, local)

    def parts(self, tensors: Mapping[str, TensorHeader], experts: ExpertStack | None) -> dict[str, StoredPart]:
        return divide_stacks(tensors, experts, self.interleaved)

    def is_quantized(self, module: ModuleView) -> bool:
        weight = module.tensors.get("weight")
        return (weight is not None and weight.dtype in QUANTIZED_WEIGHTS) or not QUANTIZED_NAMES.isdisjoint(module.tensors)

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        rule = self.excluded.find(module.name)
        if rule is not None:
            self.matched_rules.add(rule)
            return False, f"excluded by {rule!r}"
        if self.layers is None:
            name = self.recipe.algorithm
            return bool(name), f"quant_algo is {name}" if name else "no quant_algo is given"
        found = self.layers.find(module.name)
        if found is None:
            return False, "quantized_layers does not name it"
        self.matched_rules.add(found[0])
        return bool(found[1].algorithm), f"quantized_layers[{found[0]!r}] is {found[1].algorithm or 'null'}"

    def rules(self) -> Sequence[str]:
        return (*self.excluded.patterns, *(self.layers.recipes if self.layers is not None else ()))

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        recipe = self._recipe_of(module.name)
        if not recipe.algorithm:
            raise RuleMismatchError(
                module.name,
                f"quantized tensors ({', '.join(sorted(module.tensors))}), but no algorithm for them",
                "a quant_algo, or an entry in quantized_layers",
                "fetch the checkpoint's complete configuration",
            )
        must_scale = module.kind is not ModuleKind.EXPERT and _kind_of(module.name) in self.scaled
        return make_scheme(module, recipe.algorithm, recipe, must_scale)

    def get_kv_cache_scheme(self, module: ModuleView) -> KVCacheScheme:
        """See QuantConfig.  A module without scales beside others that have them keeps a 16-bit cache: it was left out."""
        scales = kv_scales_in(module)
        if self.cache == "none":
            return KVCacheScheme(scales=scales)
        if not scales:
            return KVCacheScheme(self.cache, fixed_scale=1.0) if self.cast else KVCacheScheme()
        present = {which for _, which in scales}
        needed = ["k", "v"]
        if self.affine or present & {"k_bias", "v_bias"}:
            needed += ["k_bias", "v_bias"]
        missing = [which for which in needed if which not in present]
        if missing:
            raise MissingTensorError(
                ", ".join(f"{module.name}.{_STORED_AS[which]}" for which in missing),
                f"absent, but {', '.join(name for name, _ in scales)} of the same KV cache are there",
                f"{' and '.join(_STORED_AS[which] for which in needed)}, because the KV cache is {self.cache}",
                "fetch or write the checkpoint again",
            )
        raise_all(module.name, [problem for name, which in scales if (problem := self._cache_problem(module.tensors[name], which))])
        return KVCacheScheme(self.cache, scales=scales)

    def _cache_problem(self, header: TensorHeader, which: str) -> BitgrainError | None:
        """What is wrong with a tensor of the cache: a scale is one number, a bias one per head and column, [1, heads, 1, D]."""
        where = f"{header.file}: {header.name}"
        if header.dtype not in FLOAT_CODES:
            return DtypeMismatchError(where, header.dtype, " or ".join(FLOAT_CODES), "fetch the right checkpoint")
        needed = 1 if which in ("k", "v") else self.bias_sizes.get(header.name, header.numel)
        if header.numel != needed:
            return ShapeMismatchError(where, f"shape {list(header.shape)}", f"{needed} numbers in all", "fetch the right checkpoint")
        return None

    def _sizes_of_biases(self, tensors: Mapping[str, TensorHeader]) -> dict[str, int]:
        """See `bias_sizes`."""
        sizes = {}
        for name in tensors:
            module, _, local = name.rpartition(".")
            weight = tensors.get(f"{module}.weight")
            if local in ("k_bias", "v_bias") and weight is not None and len(weight.shape) == 2:
                algorithm = ALGORITHMS.get(self._recipe_of(module).algorithm)
                coded = algorithm is not None and weight.dtype in QUANTIZED_WEIGHTS
                sizes[name] = matrix_of(weight, algorithm)[0] if coded and algorithm is not None else weight.shape[0]
        return sizes

    def _recipe_of(self, name: str) -> Recipe:
        """The recipe of a module that has quantized tensors."""
        if self.layers is None:
            return self.recipe
        found = self.layers.find(name)
        return found[1] if found is not None else Recipe()


_STORED_AS = {"k": "k_proj.k_scale", "v": "v_proj.v_scale", "k_bias": "k_proj.k_bias", "v_bias": "v_proj.v_bias"}


def _kind_of(module: str) -> str:
    """The module's name without the numbers of layers and experts."""
    return _NUMBER.sub("*", module)
