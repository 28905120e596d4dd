"""Configuration of AMD Quark checkpoints: detection, parsing, and the scheme of each module.

Which specification a module gets: none if `exclude` names it; else the first matching entry of `layer_quant_config`, else
that of its class, else the global one.  Patterns of `kv_cache_quant_config` are repeated in `layer_quant_config` with
`output_tensors`, which speak of the cache; likewise those of queries where attention itself is quantized.
Source: formats specification, part 2, section 3; amd-quark 0.13 export/main_export/quant_config_parser.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from bitgrain.checkpoint.headers import FLOAT_CODES, TensorHeader
from bitgrain.errors import ConflictingConfigError, LabelMismatchError
from bitgrain.formats.attention_schemes import KVCacheScheme
from bitgrain.formats.base import Choice, ModuleKind, ModuleView, QuantConfig, Scheme
from bitgrain.formats.block_float import BlockFloatScheme
from bitgrain.formats.config_reader import ConfigReader
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.examples import SHAPE, examples_of
from bitgrain.formats.fp8.schemes import Float8Scheme
from bitgrain.formats.kv_scales import kv_scales_in
from bitgrain.formats.quark.activations import check_input
from bitgrain.formats.quark.rotation import OnlineRotation, read_rotation
from bitgrain.formats.quark.rules import NameRules
from bitgrain.formats.quark.schemes.integers import QuarkIntScheme
from bitgrain.formats.quark.schemes.packing import IntPacking
from bitgrain.formats.quark.schemes.rotated import TRANSFORM_NAMES, RotatedScheme
from bitgrain.formats.quark.select import check_weight, scheme_of
from bitgrain.formats.quark.specs import FLOAT8, LayerSpec, Stages, read_layer, read_stages
from bitgrain.formats.stored_scales import cell_of
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, WeightSpec

if TYPE_CHECKING:
    from typing_extensions import Self

METHODS = ("quark", "amd-quark")
# What a file of the oldest writers has instead of quant_method.
LEGACY_KEYS = frozenset({"export", "global_quant_config"})
LINEAR = "Linear"
# How the numbers were found or are to be run by the producer's own code.
METADATA = ("quant_method", "quant_mode", "kv_cache_post_rope", "version", "pre_quant_opt_config", "pre_optimization_config", "log_severity_level")
EXPORT_METADATA = ("weight_merge_groups", "min_kv_scale")
PLAIN_NAMES = frozenset({"weight", "bias"}) | TRANSFORM_NAMES
CACHE_NAMES = ("k_proj", "v_proj")
CACHE_ELEMENTS = {**FLOAT8, "int8": "int8"}
# Beside plain weights, a fake_quantized checkpoint keeps the values that would quantize them.
FAKE_NAMES = tuple(f".{tensor}_{value}{stage}" for tensor in ("weight", "bias", "input", "output") for value in ("scale", "zero_point") for stage in ("", "_2"))
PROBABILITY_SCALE = ".prob_output_scale"
FAKE_RULE = "weight_format is 'fake_quantized': the weights are plain floats"
PROBABILITY_RULE = "softmax_quant_spec: attention probabilities are not quantized here"


@dataclass(slots=True)
class QuarkConfig(QuantConfig):
    """Parsed configuration.

    Args:
        everywhere: specification of modules that no rule names.
        layers:     specifications by rule, in order.
        layer_rules, exclude: the rules.
        cache:      what the outputs of keys and values become, by rule.
        cache_rules: the rules of `cache`.
        fake:       weights are stored as plain floats.
        reorder:    four-bit codes are in even-odd order.
        legacy:     the configuration has no version: a writer that may not transpose scales per group.
        rotation:   modules whose input is rotated.
        probabilities: attention probabilities are quantized, so that their scales are stored.
    """

    name: ClassVar[str] = "quark"
    aliases: ClassVar[tuple[str, ...]] = ("amd-quark", "amd_quark")
    informational: ClassVar[frozenset[str]] = frozenset({"version", "quant_mode"})

    everywhere: LayerSpec
    layers: Mapping[str, LayerSpec]
    layer_rules: NameRules
    exclude: NameRules
    cache: Mapping[str, Stages]
    cache_rules: NameRules
    fake: bool
    reorder: bool
    legacy: bool
    rotation: OnlineRotation
    probabilities: bool

    @classmethod
    def examples(cls) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
        n, k = SHAPE
        fp8 = ActivationSpec("fp8_e4m3fn", "tensor", dynamic=False)
        token, even = ActivationSpec("fp8_e4m3fn", "token"), {"scale_type": "e8m0", "exponent_rule": "even"}
        mx = {e: ActivationSpec(e, "group", 32, **even) for e in ("fp4_e2m1", "fp6_e2m3", "fp6_e3m2")}  # type: ignore[arg-type]
        four, channel = IntPacking("int4"), cell_of("channel", SHAPE)
        return examples_of(
            Float8Scheme(SHAPE, fp8, "F8_E4M3", (n, k)),
            Float8Scheme(SHAPE, token, "F8_E4M3", channel),
            QuarkIntScheme(SHAPE, ActivationSpec("int8", "tensor", dynamic=False), IntPacking("int8"), (n, k)),
            QuarkIntScheme(SHAPE, NO_ACTIVATION, four, (1, 32), grouped=True),
            QuarkIntScheme(SHAPE, ActivationSpec("int4", "group", 64), four, (1, 64), grouped=True),
            QuarkIntScheme(SHAPE, NO_ACTIVATION, IntPacking("uint4"), (1, 32), symmetric=False, grouped=True),
            QuarkIntScheme(SHAPE, ActivationSpec("fp8_e4m3fn", "tensor"), four, channel, first="tensor"),
            *(BlockFloatScheme(SHAPE, element, 32, "e8m0", spec) for element, spec in mx.items()),
            BlockFloatScheme(SHAPE, "fp4_e2m1", 32, "e8m0", fp8),
            BlockFloatScheme(SHAPE, "fp4_e2m1", 16, "e4m3", ActivationSpec("fp4_e2m1", "group", 16, scale_type="e4m3", second_scale="static"), second_name="weight_scale_2"),
            BlockFloatScheme(SHAPE, "fp4_e2m1", 16, "e5m3", ActivationSpec("fp4_e2m1", "group", 16, scale_type="e5m3")),
        )

    @classmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        if evidence.method in METHODS:
            named = (evidence.quantization or {}).get("quant_method")
            return Detection(100 if named else 80, (f"quant_method is {evidence.method!r}" + ("" if named else " in a file beside config.json"),))
        if evidence.method is None and (evidence.quantization or {}).keys() >= LEGACY_KEYS:
            return Detection(90, ("quantization_config has export and global_quant_config, though no quant_method",))
        return None

    @classmethod
    def parse(cls, evidence: Evidence) -> Self:
        reader = ConfigReader(evidence.settings())
        reader.skip(METADATA)
        fake, reorder, group = _read_export(reader)
        everywhere = read_layer(reader, "global_quant_config", reader.section("global_quant_config", "an object"))
        by_class = _read_layers(reader, "layer_type_quant_config")
        layers = _read_layers(reader, "layer_quant_config")
        cache = {rule: spec.outputs for rule, spec in _read_layers(reader, "kv_cache_quant_config").items()}
        probabilities = bool(read_stages(reader, "softmax_quant_spec"))
        # older writers have no section of the cache: `export` names its modules, or the rule itself does
        cache |= {r: spec.outputs for r, spec in layers.items() if r not in cache and spec.outputs and (r in group or r.endswith(CACHE_NAMES))}
        _check_outputs(reader, everywhere, layers, by_class, cache, probabilities)
        named = {"global_quant_config": everywhere, **{f"layer_quant_config[{r!r}]": s for r, s in layers.items()}}
        named |= {f"layer_type_quant_config[{c!r}]": s for c, s in by_class.items() if c == LINEAR}
        for place, spec in () if fake else named.items():
            _check_layer(reader, place, spec)
        exclude = reader.collect(lambda: NameRules(reader.names("exclude"), reader.place("exclude")))
        layer_rules = reader.collect(lambda: NameRules(layers, reader.place("layer_quant_config")))
        cache_rules = reader.collect(lambda: NameRules(cache, reader.place("kv_cache_quant_config")))
        rotation = read_rotation(reader, any(cache.values()))
        legacy = reader.values.get("version") is None
        reader.finish()
        assert exclude is not None and layer_rules is not None and cache_rules is not None  # else finish() raised
        return cls(
            by_class.get(LINEAR, everywhere), layers, layer_rules, exclude, cache, cache_rules, fake, reorder, legacy, rotation, probabilities
        )

    def left_out(self, tensors: Mapping[str, TensorHeader]) -> dict[str, str]:
        left = {name: FAKE_RULE for name in tensors if self.fake and name.endswith(FAKE_NAMES)}
        return left | {name: PROBABILITY_RULE for name in tensors if self.probabilities and name.endswith(PROBABILITY_SCALE)}

    def is_quantized(self, module: ModuleView) -> bool:
        weight = module.tensors.get("weight")
        return (weight is not None and weight.dtype not in FLOAT_CODES) or not module.tensors.keys() <= PLAIN_NAMES

    def spec_for(self, name: str) -> tuple[LayerSpec, str]:
        """(specification, why) of a module, `exclude` left out of account."""
        found = self.layer_rules.find_all(name)
        self.matched_rules.update(found)
        if found:
            return self.layers[found[0]], f"layer_quant_config has {found[0]!r}"
        return self.everywhere, "global_quant_config"

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        spec, why = self.spec_for(module.name)
        excluded = self.exclude.find_all(module.name)
        self.matched_rules.update(excluded)
        if excluded:
            return False, f"excluded by the rule {excluded[0]!r}"
        if module.kind is ModuleKind.EMBEDDING:
            return False, "this format leaves embeddings alone"
        if self.fake:
            return False, FAKE_RULE
        if not spec.quantizes_weight:
            return False, f"{why}, which does not quantize weights"
        return True, why

    def rules(self) -> Sequence[str]:
        return (*self.exclude.patterns, *self.layer_rules.patterns)

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        spec, why = self.spec_for(module.name)
        if not spec.quantizes_weight:
            spec = self.everywhere
        if not spec.quantizes_weight:
            raise LabelMismatchError(
                module.name, f"quantized tensors, but {why} does not quantize weights", "a specification of the weight", "correct the configuration"
            )
        return scheme_of(module, spec, self.reorder, self.legacy)

    def decide(self, module: ModuleView) -> Choice:
        # the base class is named, because a dataclass with slots is not the class that super() would look for
        choice = QuantConfig.decide(self, module)
        if not self.rotation.covers(module.name):
            return choice
        size = self.rotation.size or choice.scheme.shape[1]
        return Choice(RotatedScheme(choice.scheme, size, self.rotation.prescale), f"{choice.why}; algo_config rotates its input")

    def get_kv_cache_scheme(self, module: ModuleView) -> KVCacheScheme:
        stages = {which: self._output_of(f"{module.name}.{which}_proj") for which in "qkv"}
        stored = tuple((name, which) for name, which in kv_scales_in(module) if stages.get(which))
        k, v = stages["k"], stages["v"]
        if k != v:
            raise ConflictingConfigError(
                f"{module.name}: KV cache", f"keys {_shown(k)}, values {_shown(v)}", "one quantization for both", "correct kv_cache_quant_config"
            )
        if not k:
            return KVCacheScheme(scales=stored)
        return KVCacheScheme(CACHE_ELEMENTS[k[0].dtype], scales=stored, dynamic=k[0].dynamic)

    def _output_of(self, name: str) -> Stages:
        """Quantization of a projection's output: of the cache, or of queries."""
        if self.fake:
            return ()
        found = self.cache_rules.find_all(name)
        if found:
            return self.cache[found[0]]
        return self.spec_for(name)[0].outputs


def _shown(stages: Stages) -> str:
    return " then ".join(stage.describe() for stage in stages) or "none"


def _read_export(reader: ConfigReader) -> tuple[bool, bool, tuple[str, ...]]:
    """(weights are plain floats, four-bit codes are in even-odd order, modules of the cache) as `export` says."""
    export = ConfigReader(reader.section("export", "an object"), reader.place("export"))
    export.skip(EXPORT_METADATA)
    fake = export.choice("weight_format", {"real_quantized": False, "fake_quantized": True}, "real_quantized")
    reorder = export.choice("pack_method", {"reorder": True, "order": False}, "reorder")
    group = export.names("kv_cache_group")
    reader.collect(export.finish)
    return fake, reorder, group


def _read_layers(reader: ConfigReader, key: str) -> dict[str, LayerSpec]:
    rules = reader.section(key, "an object of specifications by name")
    return {rule: read_layer(reader, f"{key}[{rule!r}]", value) for rule, value in rules.items()}


def _check_layer(reader: ConfigReader, place: str, spec: LayerSpec) -> None:
    check_weight(reader, place, spec.weight)
    check_input(reader, place, spec.inputs)
    if any(not stage.is_plain for stage in spec.inputs) and not spec.quantizes_weight:
        reader.problem(f"{place}.weight", "null, with quantized input_tensors", "a quantized weight too", "plain weights behind a quantized input are not supported by this version")


def _check_outputs(
    reader: ConfigReader,
    everywhere: LayerSpec,
    layers: Mapping[str, LayerSpec],
    by_class: Mapping[str, LayerSpec],
    cache: Mapping[str, Stages],
    probabilities: bool,
) -> None:
    """A problem for each quantized output that is neither the cache's nor, where attention is quantized, a query's."""
    action = "quantized outputs are supported for the KV cache alone"
    named = {"global_quant_config": everywhere, **{f"layer_type_quant_config[{c!r}]": s for c, s in by_class.items()}}
    if not probabilities:
        named |= {f"layer_quant_config[{r!r}]": s for r, s in layers.items() if r not in cache}
    for place, spec in named.items():
        if spec.outputs:
            reader.problem(f"{place}.output_tensors", _shown(spec.outputs), "null", action)
    for rule, stages in cache.items():
        known = len(stages) == 1 and stages[0].dtype in CACHE_ELEMENTS and stages[0].granularity == "tensor" and stages[0].symmetric
        if stages and not known:
            reader.problem(f"kv_cache_quant_config[{rule!r}].output_tensors", _shown(stages), f"symmetric per_tensor {' or '.join(CACHE_ELEMENTS)}", "quantize the cache so, or not at all")
