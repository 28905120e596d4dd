"""Configuration of FP8 checkpoints: `quant_method` fp8 (block, channel or tensor scales) and fbgemm_fp8.

    fp8        weight float8 [N, K], weight_scale_inv or weight_scale; both multiply, W = weight * scale, unless
               weight_scale_semantics is "inverse" (GPTQModel), then W = weight / scale
    fbgemm_fp8 weight e4m3 [N, K], weight_scale float32 [N, 1]; activations per token, amax cut at activation_scale_ub

Activations: static per tensor; dynamic per token and block column for block weights; dynamic per token otherwise (what
transformers documents and vLLM does where the machine can); none where the writer quantizes weights only.
Source: formats specification, section 5; transformers 5.19 FineGrainedFP8Config and FbgemmFp8Config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bitgrain.checkpoint.headers import FLOAT_CODES, TensorHeader
from bitgrain.checkpoint.parts import StoredPart
from bitgrain.formats.attention_schemes import KVCacheScheme
from bitgrain.formats.base import ModuleKind, ModuleView, QuantConfig, Scheme
from bitgrain.formats.config_reader import AUTO_ROUND_KEYS, ConfigReader, words
from bitgrain.formats.dynamic_rules import DynamicRule, find_dynamic_rule, read_dynamic_rules
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.examples import SHAPE, examples_of
from bitgrain.formats.expert_stacks import ExpertStack
from bitgrain.formats.fp8.fused_experts import divide_fused
from bitgrain.formats.fp8.schemes import FLOAT8_CODES, Float8Scheme
from bitgrain.formats.kv_scales import kv_scales_in, read_static_cache
from bitgrain.formats.matching import SegmentRules
from bitgrain.formats.stored_scales import E8M0_CODES, cell_of
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, WeightSpec

if TYPE_CHECKING:
    from typing_extensions import Self

METHODS = ("fp8", "fbgemm-fp8")
SCALE_NAMES = ("weight_scale_inv", "weight_scale")
INPUT_NAMES = ("input_scale", "activation_scale")
ELEMENTS = {
    "e4m3": "F8_E4M3", "e4m3fn": "F8_E4M3", "float8_e4m3": "F8_E4M3", "float8_e4m3fn": "F8_E4M3",
    "e5m2": "F8_E5M2", "float8_e5m2": "F8_E5M2",
    "e4m3fnuz": "F8_E4M3FNUZ", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "fp8": "", "": "",
}  # fmt: skip
STRATEGIES = {"row": "channel", "block": "block", "tensor": "tensor", "": ""}
FP8 = "fp8_e4m3fn"
FBGEMM_UPPER_BOUND = 1200.0

FP8_KEYS = words(
    "quant_method activation_scheme weight_block_size fmt scale_fmt modules_to_not_convert ignored_layers modules_to_convert"
    " dequantize kv_cache_scheme extra_config activation_scale_ub export"
)
# What GPTQModel writes beside the marker; only those that the parser reads change the meaning.
GPTQMODEL_KEYS = words(
    "adapter bits checkpoint_format compute_dtype desc_act device dynamic format group_size lm_head meta method"
    " offload_to_disk pack_dtype pre_filters preprocessors quantizer smooth smoother sym uri weight_scale_method"
    " weight_scale_semantics"
)


@dataclass(slots=True)
class FP8Config(QuantConfig):
    """Parsed configuration of an FP8 checkpoint.

    Args:
        strategy:    "block", "channel", "tensor", or "" where the stored scale's size decides.
        block:       (rows, columns) per scale for "block".
        element:     element type of the weights as safetensors spells it, "" where the tensors decide.
        inverse:     scales are divisors.
        activation:  "static", "dynamic", "bounded" (dynamic per token, cut at `upper_bound`) or "none".
        power_of_two: scales are powers of two (E8M0), of dynamic activations too.
        ignored:     rules that leave modules dense, whole dotted segments.
        dynamic:     rules that exclude modules or change their scales.
        cache:       element type of the KV cache, "none" if the configuration does not speak of it.
    """

    name: ClassVar[str] = "fp8"
    aliases: ClassVar[tuple[str, ...]] = ("fbgemm_fp8", "fbgemm-fp8", "fp8_block", "finegrained_fp8")
    informational: ClassVar[frozenset[str]] = frozenset({"meta", "autoround_version", "provider"})
    quantizes_embeddings: ClassVar[bool] = True

    strategy: str
    block: tuple[int, int] | None
    element: str
    inverse: bool
    activation: str
    upper_bound: float | None
    power_of_two: bool
    ignored: SegmentRules
    dynamic: tuple[DynamicRule, ...]
    cache: str

    @classmethod
    def examples(cls) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
        schemes = (
            ("block", ActivationSpec(FP8, "group", 128)),
            ("channel", ActivationSpec(FP8, "token")),
            ("tensor", ActivationSpec(FP8, "tensor", dynamic=False)),
        )
        return examples_of(
            *(Float8Scheme(SHAPE, activation, "F8_E4M3", cell_of(strategy, SHAPE, block=(128, 128))) for strategy, activation in schemes)
        )

    @classmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        if evidence.method in METHODS:
            named = (evidence.quantization or {}).get("quant_method")
            return Detection(
                100 if named else 80, (f"quant_method is {evidence.method!r}" + ("" if named else " in a file beside config.json"),)
            )
        if evidence.method is not None or evidence.quantization is not None or "weight_scale_inv" not in evidence.suffixes:
            return None
        example = evidence.suffixes["weight_scale_inv"]
        weight = evidence.tensors.get(example.removesuffix("_scale_inv"))
        if weight is None or weight.dtype not in FLOAT8_CODES:
            return None
        return Detection(50, (f"{weight.name} is {weight.dtype} and {example} stands beside it",))

    @classmethod
    def parse(cls, evidence: Evidence) -> Self:
        # names alone: the only writers without a configuration use 128 x 128 blocks; shapes are checked against it
        unstated = {"weight_block_size": [128, 128], "activation_scheme": "dynamic"} if evidence.method is None else {}
        reader = ConfigReader(unstated | evidence.settings())
        reader.skip(FP8_KEYS | AUTO_ROUND_KEYS | GPTQMODEL_KEYS)
        dynamic = read_dynamic_rules(reader, _scale_overrides)
        _check_extra(reader)
        bounded = evidence.method == "fbgemm-fp8"
        block = reader.block("weight_block_size")
        parsed = cls(
            strategy=_strategy(reader, block),
            block=block,
            element=reader.choice("fmt" if reader.values.get("fmt") is not None else "format", ELEMENTS, ""),
            inverse=reader.choice("weight_scale_semantics", {"inverse": True, "": False}, ""),
            activation=_activation(reader, bounded),
            upper_bound=_upper_bound(reader) if bounded else None,
            power_of_two=reader.choice("scale_fmt", {"float": False, "ue8m0": True, "": False}, ""),
            ignored=SegmentRules(dict.fromkeys(reader.names("modules_to_not_convert") + reader.names("ignored_layers"))),
            dynamic=dynamic,
            cache=_cache(reader),
        )
        reader.finish()
        return parsed

    def parts(self, tensors: Mapping[str, TensorHeader], experts: ExpertStack | None) -> dict[str, StoredPart]:
        return divide_fused(tensors, experts, self.strategy, self.block)

    def is_quantized(self, module: ModuleView) -> bool:
        weight = module.tensors.get("weight")
        return (weight is not None and weight.dtype in FLOAT8_CODES) or any(n in module.tensors for n in (*SCALE_NAMES, *INPUT_NAMES))

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        rule = self.ignored.find(module.name)
        if rule is not None:
            self.matched_rules.add(rule)
            return False, f"excluded by the rule {rule!r}"
        override = find_dynamic_rule(self.dynamic, module.name)
        if override is None:
            return True, "quant_method is fp8"
        self.matched_rules.add(override.key)
        return not override.exclude, f"dynamic has {override.key!r}"

    def rules(self) -> Sequence[str]:
        return (*self.ignored.patterns, *(rule.key for rule in self.dynamic))

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        weight = module.tensors.get("weight")
        shape = module.shape or ((weight.shape[0], weight.shape[1]) if weight is not None and len(weight.shape) == 2 else (0, 0))
        override = find_dynamic_rule(self.dynamic, module.name)
        changed = override.overrides if override is not None else {}
        strategy, block = changed.get("strategy", self.strategy), changed.get("block", self.block)
        scale_name = next((n for n in SCALE_NAMES if n in module.tensors), SCALE_NAMES[0] if strategy == "block" else SCALE_NAMES[1])
        stored = module.tensors.get(scale_name)
        if not strategy or module.kind is ModuleKind.EMBEDDING:
            # a single number is per tensor; else it must be one per row, and the header comparison says if it is not
            strategy = "tensor" if stored is None or stored.numel == 1 else "channel"
        powers = self.power_of_two or (stored is not None and stored.dtype == "F8_E8M0")
        found = weight.dtype if weight is not None and weight.dtype in FLOAT8_CODES else "F8_E4M3"
        return Float8Scheme(
            shape,
            self._activation_of(module, strategy, block),
            self.element or found,
            cell_of(strategy, shape, block=block),
            scale_name,
            (*FLOAT_CODES, *E8M0_CODES) if powers else FLOAT_CODES,
            self.inverse,
            not self.inverse,
            next((n for n in INPUT_NAMES if n in module.tensors), INPUT_NAMES[0]),
        )

    def _activation_of(self, module: ModuleView, strategy: str, block: tuple[int, int] | None) -> ActivationSpec:
        if self.activation == "none" or module.kind is ModuleKind.EMBEDDING:
            return NO_ACTIVATION
        if self.activation == "static":
            return ActivationSpec(FP8, "tensor", dynamic=False)
        scale_type = "e8m0" if self.power_of_two else "float"
        if strategy == "block" and block is not None:
            return ActivationSpec(FP8, "group", block[1], scale_type=scale_type)
        return ActivationSpec(FP8, "token", scale_type=scale_type, upper_bound=self.upper_bound)

    def get_kv_cache_scheme(self, module: ModuleView) -> KVCacheScheme:
        return KVCacheScheme(self.cache, scales=kv_scales_in(module))


def _strategy(reader: ConfigReader, block: tuple[int, int] | None) -> str:
    """The scales' granularity: as weight_scale_method says, else "block" where there is one, else ""."""
    named = reader.choice("weight_scale_method", STRATEGIES, "")
    if named and (named == "block") != (block is not None):
        method, size = reader.values["weight_scale_method"], reader.values.get("weight_block_size")
        needed = f"{'a block' if named == 'block' else 'null'}, because weight_scale_method is {method!r}"
        reader.problem("weight_block_size", repr(size), needed, "correct one of the two")
    return named or ("block" if block is not None else "")


def _activation(reader: ConfigReader, bounded: bool) -> str:
    """See FP8Config.activation."""
    if bounded:
        return "bounded"
    bits = reader.values.get("act_bits")
    if isinstance(bits, int) and bits > 8:
        return "none"
    # GPTQModel quantizes weights only, and Quark (`export`) when it says null; everybody else who leaves the key out means dynamic
    weights_only = reader.values.get("weight_scale_semantics") is not None or reader.values.get("export") is not None
    default = "none" if weights_only else "dynamic"
    return reader.choice("activation_scheme", {"static": "static", "dynamic": "dynamic", "none": "none"}, default)


def _upper_bound(reader: ConfigReader) -> float:
    if "activation_scale_ub" in reader.values and reader.values["activation_scale_ub"] is None:
        # absence means the usual bound; null may mean none
        reader.problem("activation_scale_ub", "null", "a number above zero, or no such key")
    return reader.number("activation_scale_ub", default=FBGEMM_UPPER_BOUND)


def _cache(reader: ConfigReader) -> str:
    value = reader.values.get("kv_cache_scheme")
    if isinstance(value, dict) and value.get("num_bits") == 8 and value.get("type") == "float":
        return FP8
    static = read_static_cache(reader).element
    if static != "none":
        return static
    return reader.choice("kv_cache_scheme", {"static": FP8, "dynamic": FP8, "fp8": FP8, "": "none"}, "")


def _scale_overrides(reader: ConfigReader, where: str, change: object) -> dict[str, Any]:
    """strategy and block of one override; a problem if it changes something else than scales."""
    known = change if isinstance(change, Mapping) and change.keys() <= {"weight_scale_method", "weight_block_size"} else {}
    named, size = STRATEGIES.get(str(known.get("weight_scale_method")), ""), known.get("weight_block_size")
    sized = isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
    if not named or (named == "block") != sized:
        needed = "weight_scale_method row, block or tensor, and weight_block_size [rows, columns] for a block"
        reader.problem(where, repr(change), needed, "this override is not supported by this version")
        return {}
    return {"strategy": named, "block": tuple(size) if size is not None and sized else None}


def _check_extra(reader: ConfigReader) -> None:
    """A problem for each rule of AutoRound's extra_config that mixes in another width."""
    for rule, change in reader.section("extra_config", "an object of rules").items():
        bits = change.get("bits", 8) if isinstance(change, Mapping) else None
        if not isinstance(bits, int) or (bits != 8 and bits < 16):
            needed = "bits 8, or 16 for a dense module"
            reader.problem(f"extra_config[{rule!r}]", repr(change), needed, "this mixture is not supported by this version")
