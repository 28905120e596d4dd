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

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import BitgrainError, ConfigError, UnknownFormatError, raise_all
from bitgrain.formats.base import Detection, Evidence, KVCacheScheme, ModuleKind, ModuleView, QuantConfig, Scheme
from bitgrain.formats.config_keys import AUTO_ROUND_KEYS, block_of, string_list, unknown_keys, words
from bitgrain.formats.fp8.schemes import FLOAT8_CODES, Float8Scheme
from bitgrain.formats.kv_scales import kv_scales_in
from bitgrain.formats.matching import SegmentRules, matches_regex
from bitgrain.formats.stored_scales import E8M0_CODES, cell_of
from bitgrain.weights import NO_ACTIVATION, ActivationSpec

if TYPE_CHECKING:
    from typing_extensions import Self

METHODS = ("fp8", "fbgemm-fp8")
SCALE_NAMES = ("weight_scale_inv", "weight_scale")
INPUT_NAMES = ("input_scale", "activation_scale")
ELEMENTS = {
    "e4m3": "F8_E4M3", "e4m3fn": "F8_E4M3", "float8_e4m3": "F8_E4M3", "float8_e4m3fn": "F8_E4M3",
    "e5m2": "F8_E5M2", "float8_e5m2": "F8_E5M2",
    "e4m3fnuz": "F8_E4M3FNUZ", "float8_e4m3fnuz": "F8_E4M3FNUZ",
}  # fmt: skip
STRATEGIES = {"row": "channel", "block": "block", "tensor": "tensor"}
FBGEMM_UPPER_BOUND = 1200.0

FP8_KEYS = words(
    "quant_method activation_scheme weight_block_size fmt scale_fmt modules_to_not_convert ignored_layers modules_to_convert"
    " dequantize kv_cache_scheme extra_config activation_scale_ub"
)
# What GPTQModel writes beside the marker; only those that the parser reads change the meaning.
GPTQMODEL_KEYS = words(
    "adapter bits checkpoint_format compute_dtype desc_act device dynamic format group_size lm_head meta method"
    " offload_to_disk pack_dtype pre_filters preprocessors quantizer smooth smoother sym uri weight_scale_method"
    " weight_scale_semantics"
)
# A tensor that ends like this holds all experts of a layer in three dimensions.
FUSED_EXPERTS = tuple(f"experts.{part}_proj{end}" for part in ("gate_up", "down") for end in ("_scale_inv", "_scale", "_activation_scale"))


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
        excluded:    the same as "-:" and a regex, anchored at the start (GPTQModel's `dynamic`).
        cache:       element type of the KV cache, "none" if the configuration does not speak of it.
    """

    name: ClassVar[str] = "fp8"
    aliases: ClassVar[tuple[str, ...]] = ("fbgemm_fp8", "fbgemm-fp8", "fp8_block", "finegrained_fp8")
    informational: ClassVar[frozenset[str]] = frozenset({"meta", "autoround_version", "provider"})

    strategy: str
    block: tuple[int, int] | None
    element: str
    inverse: bool
    activation: str
    upper_bound: float | None
    power_of_two: bool
    ignored: SegmentRules
    excluded: tuple[str, ...]
    cache: str

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
        settings = evidence.settings()
        where = "quantization_config"
        problems = unknown_keys(where, settings, FP8_KEYS | AUTO_ROUND_KEYS | GPTQMODEL_KEYS)
        problems += _unsupported(where, settings) + _no_float8(where, evidence)
        _refuse_fused_experts(evidence)
        if evidence.method is None:
            # names alone: the only writers without a configuration use 128 x 128 blocks; shapes are checked against it
            settings = {"weight_block_size": [128, 128], "activation_scheme": "dynamic"}
        block = _collect(problems, lambda: block_of(f"{where}.weight_block_size", settings.get("weight_block_size")))
        words = _Words(where, settings, problems)
        bounded = evidence.method == "fbgemm-fp8"
        parsed = cls(
            strategy=words.strategy(block),
            block=block,
            element=words.element(),
            inverse=words.inverse(),
            activation=words.activation(bounded),
            upper_bound=words.upper_bound(bounded),
            power_of_two=words.choice("scale_fmt", {"float": False, "ue8m0": True, "": False}),
            ignored=SegmentRules(_ignored_names(where, settings, problems)),
            excluded=tuple(rule for rule in _rules_of(settings, "dynamic") if rule.startswith("-:")),
            cache=words.cache(),
            trust_tensors=evidence.trust_tensors,
        )
        raise_all("quantization_config (fp8)", problems)
        return parsed

    def is_quantized(self, module: ModuleView) -> bool:
        weight = module.tensors.get("weight")
        return (weight is not None and weight.dtype in FLOAT8_CODES) or any(n in module.tensors for n in (*SCALE_NAMES, *INPUT_NAMES))

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        rule = self.ignored.find(module.name)
        if rule is None:
            rule = next((r for r in self.excluded if matches_regex(r[2:], module.name, "quantization_config.dynamic")), None)
        if rule is None:
            return True, "quant_method is fp8"
        self.matched_rules.add(rule)
        return False, f"excluded by the rule {rule!r}"

    def rules(self) -> Sequence[str]:
        return (*self.ignored.patterns, *self.excluded)

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        weight = module.tensors.get("weight")
        shape = module.shape or ((weight.shape[0], weight.shape[1]) if weight is not None and len(weight.shape) == 2 else (0, 0))
        scale_name = next((n for n in SCALE_NAMES if n in module.tensors), SCALE_NAMES[0] if self.strategy == "block" else SCALE_NAMES[1])
        stored = module.tensors.get(scale_name)
        strategy = self.strategy
        if not strategy or module.kind is ModuleKind.EMBEDDING:
            # a single number is per tensor; else it must be one per row, and the header comparison says if it is not
            strategy = "tensor" if stored is None or stored.numel == 1 else "channel"
        powers = self.power_of_two or (stored is not None and stored.dtype == "F8_E8M0")
        found = weight.dtype if weight is not None and weight.dtype in FLOAT8_CODES else "F8_E4M3"
        return Float8Scheme(
            shape,
            self._activation_of(module, strategy),
            self.element or found,
            cell_of(strategy, shape, block=self.block),
            scale_name,
            (*FLOAT_CODES, *E8M0_CODES) if powers else FLOAT_CODES,
            self.inverse,
            not self.inverse,
            next((n for n in INPUT_NAMES if n in module.tensors), INPUT_NAMES[0]),
        )

    def _activation_of(self, module: ModuleView, strategy: str) -> ActivationSpec:
        if self.activation == "none" or module.kind is ModuleKind.EMBEDDING:
            return NO_ACTIVATION
        if self.activation == "static":
            return ActivationSpec("fp8_e4m3fn", "tensor", dynamic=False)
        scale_type = "e8m0" if self.power_of_two else "float"
        if strategy == "block" and self.block is not None:
            return ActivationSpec("fp8_e4m3fn", "group", self.block[1], scale_type=scale_type)
        return ActivationSpec("fp8_e4m3fn", "token", scale_type=scale_type, upper_bound=self.upper_bound)

    def get_kv_cache_scheme(self, module: ModuleView) -> KVCacheScheme:
        return KVCacheScheme(self.cache, scales=kv_scales_in(module))


class _Words:
    """Reads the values that are one of a few words, collecting problems."""

    def __init__(self, where: str, settings: Mapping[str, Any], problems: list[BitgrainError]) -> None:
        self.where, self.settings, self.problems = where, settings, problems

    def choice(self, key: str, meanings: Mapping[str, Any], default: str = "") -> Any:
        """What the word under `key` means; a problem and the default's meaning if it is not one of `meanings`."""
        value = self.settings.get(key)
        word = default if value is None else str(value).lower()
        if word in meanings:
            return meanings[word]
        self.problems.append(
            ConfigError(f"{self.where}.{key}", repr(value), f"one of {', '.join(w for w in meanings if w)}", "correct the configuration")
        )
        return meanings[default]

    def strategy(self, block: tuple[int, int] | None) -> str:
        named = str(self.choice("weight_scale_method", {**STRATEGIES, "": ""}))
        if named and (named == "block") != (block is not None):
            self.problems.append(
                ConfigError(
                    f"{self.where}.weight_block_size",
                    repr(self.settings.get("weight_block_size")),
                    ("a block" if named == "block" else "null")
                    + f", because weight_scale_method is {self.settings.get('weight_scale_method')!r}",
                    "correct one of the two",
                )
            )
        return named or ("block" if block is not None else "")

    def element(self) -> str:
        key = "fmt" if self.settings.get("fmt") is not None else "format"
        return str(self.choice(key, {**ELEMENTS, "": "", "fp8": ""}))

    def inverse(self) -> bool:
        return bool(self.choice("weight_scale_semantics", {"inverse": True, "": False}))

    def activation(self, bounded: bool) -> str:
        bits = self.settings.get("act_bits")
        if bounded:
            return "bounded"
        if isinstance(bits, int) and bits > 8:
            return "none"
        # GPTQModel quantizes weights only; everybody else who leaves the key out means dynamic
        default = "none" if self.settings.get("weight_scale_semantics") is not None else "dynamic"
        return str(self.choice("activation_scheme", {"static": "static", "dynamic": "dynamic", "none": "none"}, default))

    def upper_bound(self, bounded: bool) -> float | None:
        value = self.settings.get("activation_scale_ub", FBGEMM_UPPER_BOUND)
        if not bounded:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            self.problems.append(
                ConfigError(f"{self.where}.activation_scale_ub", repr(value), "a number above zero", "correct the configuration")
            )
            return FBGEMM_UPPER_BOUND
        return float(value)

    def cache(self) -> str:
        value = self.settings.get("kv_cache_scheme")
        if isinstance(value, dict) and value.get("num_bits") == 8 and value.get("type") == "float":
            return "fp8_e4m3fn"
        return str(self.choice("kv_cache_scheme", {"static": "fp8_e4m3fn", "dynamic": "fp8_e4m3fn", "fp8": "fp8_e4m3fn", "": "none"}))


def _rules_of(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object of per-module rules under a key; empty if it is absent or no object."""
    value = settings.get(key)
    return value if isinstance(value, Mapping) else {}


def _unsupported(where: str, settings: Mapping[str, Any]) -> list[BitgrainError]:
    """Settings that change the numbers in a way that this format does not implement."""
    problems: list[BitgrainError] = []
    for key in ("dynamic", "extra_config"):
        if settings.get(key) and not isinstance(settings[key], Mapping):
            problems.append(ConfigError(f"{where}.{key}", repr(settings[key]), "an object of rules", "correct the configuration"))
    for rule, change in _rules_of(settings, "dynamic").items():
        if not rule.startswith("-:"):
            needed = "only rules that exclude modules (-:) beside fp8"
            problems.append(ConfigError(f"{where}.dynamic[{rule!r}]", repr(change), needed, "write the checkpoint without overrides"))
    for rule, change in _rules_of(settings, "extra_config").items():
        bits = change.get("bits", 8) if isinstance(change, Mapping) else None
        if not isinstance(bits, int) or (bits != 8 and bits < 16):
            needed = "bits 8, or 16 for a dense module"
            problems.append(
                ConfigError(f"{where}.extra_config[{rule!r}]", repr(change), needed, "this mixture is not supported by this version")
            )
    return problems


def _no_float8(where: str, evidence: Evidence) -> list[BitgrainError]:
    """A problem if the configuration says fp8 and nothing is."""
    if any(header.dtype in FLOAT8_CODES for header in evidence.tensors.values()):
        return []
    action = "remove quantization_config; quantizing while loading is not supported by this version"
    return [ConfigError(where, "it says fp8, but no tensor is an eight-bit float", "a quantized checkpoint", action)]


def _ignored_names(where: str, settings: Mapping[str, Any], problems: list[BitgrainError]) -> list[str]:
    """The rules of both spellings of the ignore list, in order, each once."""
    names: list[str] = []
    for key in ("modules_to_not_convert", "ignored_layers"):
        try:
            names += string_list(f"{where}.{key}", settings.get(key))
        except ConfigError as problem:
            problems.append(problem)
    return list(dict.fromkeys(names))


def _refuse_fused_experts(evidence: Evidence) -> None:
    """Raise if experts are stored as one three-dimensional tensor per layer."""
    fused = sorted(name for name in evidence.tensors if name.endswith(FUSED_EXPERTS))
    if fused:
        raise UnknownFormatError(
            fused[0],
            f"experts fused into three-dimensional fp8 tensors ({len(fused)} scale tensors named so)",
            "per-expert tensors such as experts.0.gate_proj.weight and experts.0.gate_proj.weight_scale_inv",
            "fused fp8 experts are not supported by this version; use the checkpoint with per-expert names",
        )


def _collect(problems: list[BitgrainError], read: Any) -> Any:
    """read(), or None after its BitgrainError was added to `problems`."""
    try:
        return read()
    except BitgrainError as problem:
        problems.append(problem)
        return None
