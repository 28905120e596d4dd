"""Configuration of compressed-tensors checkpoints: detection, parsing, and the scheme of each module.

Source: formats specification, section 4; compressed-tensors 0.17 quantization/quant_config.py for keys and defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import (
    BitgrainError,
    ConfigError,
    ConflictingConfigError,
    LabelMismatchError,
    MissingTensorError,
    RuleMismatchError,
)
from bitgrain.formats.base import MATRIX_KINDS, KVCacheScheme, ModuleKind, ModuleView, QuantConfig, Scheme
from bitgrain.formats.compressed_tensors.arguments import PRESETS, QuantizationArgs, activation_spec, parse_arguments
from bitgrain.formats.compressed_tensors.geometry import matrix_shape, packing_of
from bitgrain.formats.compressed_tensors.groups import PLAIN_FORMATS, Group, parse_format, parse_groups
from bitgrain.formats.compressed_tensors.schemes import IntScheme
from bitgrain.formats.compressed_tensors.targets import TargetRules, specificity
from bitgrain.formats.config_reader import AUTO_ROUND_KEYS, ConfigReader, words
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.examples import SHAPE, examples_of
from bitgrain.formats.fp8.schemes import Float8Scheme
from bitgrain.formats.kv_scales import kv_scales_in
from bitgrain.formats.stored_scales import cell_of
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, WeightSpec

if TYPE_CHECKING:
    from typing_extensions import Self

WHERE = "quantization_config"
METHOD = "compressed-tensors"
KEYS = words(
    "quant_method config_groups format ignore kv_cache_scheme quantization_status sparsity_config transform_config version"
    " global_compression_ratio run_compressed"
)
STATUSES = ("initialized", "calibration", "frozen", "compressed", "decompressed")
# Local names that only a quantized module has.
QUANTIZED_NAMES = words(
    "weight_packed weight_scale weight_zero_point weight_g_idx weight_shape weight_global_scale input_scale input_zero_point"
    " input_global_scale"
)
QUANTIZED_WEIGHTS = ("I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ")
# Transforms at these places are already part of the stored weights.
OFFLINE_LOCATIONS = ("weight_input", "weight_output")


@dataclass(slots=True)
class CompressedTensorsConfig(QuantConfig):
    """Parsed configuration.

    Args:
        groups:  in the configuration's order.
        format:  the global storage format, "" if there is none.
        version: (major, minor) of the library that wrote the file; None if it does not say.
        ignore:  rules that leave modules dense.
        cache:   arguments of the KV cache, None if the configuration does not speak of it.
    """

    name: ClassVar[str] = METHOD
    aliases: ClassVar[tuple[str, ...]] = ("compressed_tensors", "llmcompressor", "llm-compressor")
    informational: ClassVar[frozenset[str]] = frozenset({"version", "global_compression_ratio", "run_compressed", "provider"})
    quantizes_embeddings: ClassVar[bool] = True

    groups: tuple[Group, ...]
    format: str
    version: tuple[int, int] | None
    ignore: TargetRules
    cache: QuantizationArgs | None
    targets: TargetRules = field(init=False)

    def __post_init__(self) -> None:
        self.targets = TargetRules((t for g in self.groups for t in g.targets), f"{WHERE}.config_groups")

    @classmethod
    def examples(cls) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
        per_row, static = QuantizationArgs(strategy="channel"), QuantizationArgs(symmetric=False)
        pairs = [(per_row, None), (per_row, static), *(pair for name, pair in PRESETS.items() if name not in ("INT8", "W8A16"))]
        return examples_of(*(_example(weights, inputs) for weights, inputs in pairs if weights is not None))

    @classmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        if evidence.method == METHOD:
            return Detection(100, ("quant_method is 'compressed-tensors'",))
        if evidence.method is not None:
            return None
        section = evidence.quantization or {}
        nested = section.get("quantization_config")
        if "config_groups" in section or (isinstance(nested, Mapping) and "config_groups" in nested):
            return Detection(90, ("the quantization section has config_groups and no quant_method",))
        if evidence.quantization is None and {"weight_packed", "weight_scale", "weight_shape"} <= evidence.suffixes.keys():
            return Detection(50, (f"{evidence.suffixes['weight_packed']} with weight_scale and weight_shape beside it",))
        return None

    @classmethod
    def parse(cls, evidence: Evidence) -> Self:
        settings = evidence.settings()
        nested = settings.pop("quantization_config", None)
        if isinstance(nested, Mapping):
            settings |= nested
        reader = ConfigReader(settings, WHERE)
        reader.skip(KEYS | AUTO_ROUND_KEYS)
        reader.problems += _unsupported(settings) + _status_problems(settings, evidence)
        groups = reader.collect(lambda: parse_groups(f"{WHERE}.config_groups", settings.get("config_groups")))
        storage = reader.collect(lambda: parse_format(f"{WHERE}.format", settings.get("format")))
        ignore = reader.names("ignore")
        scheme = settings.get("kv_cache_scheme")
        cache = reader.collect(lambda: None if scheme is None else parse_arguments(f"{WHERE}.kv_cache_scheme", scheme))
        cache = cache or next((g.cache for g in groups or () if g.cache is not None), None)
        reader.collect(lambda: _cache_element(cache))
        reader.finish()
        return cls(
            groups or (),
            storage or "",
            _version(settings.get("version")),
            TargetRules(ignore, f"{WHERE}.ignore"),
            cache,
        )

    def rules(self) -> Sequence[str]:
        return (*self.ignore.rules, *self.targets.rules)

    def is_quantized(self, module: ModuleView) -> bool:
        weight = module.tensors.get("weight")
        return (weight is not None and weight.dtype in QUANTIZED_WEIGHTS) or not QUANTIZED_NAMES.isdisjoint(module.tensors)

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        ignored = self.ignore.matches(module)
        self.matched_rules.update(ignored, self.targets.matches(module))
        if ignored:
            return False, f"excluded by {ignored[0]!r} in ignore"
        found = self._group_of(module)
        if found is None:
            return False, "no target of config_groups names it"
        group, target = found
        if group.weights is None:
            if group.inputs is not None and module.kind in MATRIX_KINDS:
                raise ConfigError(
                    f"{WHERE}.config_groups.{group.name}",
                    f"it quantizes the inputs of {module.name}, but not its weight",
                    "arguments for weights too",
                    "quantizing inputs alone is not supported by this version",
                )
            return False, f"{group.name} leaves its weight as it is (target {target!r})"
        return True, f"{group.name} (target {target!r})"

    def _group_of(self, module: ModuleView) -> tuple[Group, str] | None:
        """The group whose target names the module most specifically, and that target.

        Raises:
            ConflictingConfigError: two groups name it equally well and mean different things.
        """
        matched = self.targets.matches(module)
        candidates = [
            (specificity(rule), group, rule)
            for group in self.groups
            if not group.for_cache_only
            for rule in group.targets
            if rule in matched
        ]
        if not candidates:
            return None
        best = min(rank for rank, _, _ in candidates)
        equal = [(group, rule) for rank, group, rule in candidates if rank == best]
        # the library takes the first in the alphabet, engines the first in the file; only where both mean the same is it decided
        first = min(equal, key=lambda e: e[1])
        if not first[0].same_meaning(equal[0][0]) or any(r == first[1] and not g.same_meaning(first[0]) for g, r in equal):
            other = next(e for e in equal if not e[0].same_meaning(first[0]))
            raise ConflictingConfigError(
                module.name,
                f"target {first[1]!r} of {first[0].name} and target {other[1]!r} of {other[0].name} both name it",
                "one group for each module",
                f"narrow one of the two targets in {WHERE}.config_groups",
            )
        return first

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        found = self._group_of(module)
        if found is None or found[0].weights is None:
            raise RuleMismatchError(
                module.name,
                f"quantized tensors ({', '.join(sorted(module.tensors))}), but no group says how",
                "a group with weights whose targets name it",
                f"correct {WHERE}.config_groups",
            )
        group, args = found[0], found[0].weights
        packed = self._is_packed(module, group)
        shape = matrix_shape(module, args, packed, self.version)
        activation = NO_ACTIVATION if module.kind is ModuleKind.EMBEDDING else group.activation
        cell = cell_of(args.strategy, shape, args.group_size, args.block)
        if args.type == "float":
            return Float8Scheme(shape, activation, "F8_E4M3", cell, zero_points=True)
        scale = module.tensors.get("weight_scale")
        zero = module.tensors.get("weight_zero_point")
        return IntScheme(
            shape,
            activation,
            args.num_bits,
            cell,
            args.symmetric,
            packing_of(module, args.num_bits, shape, self.version) if packed else "plain",
            packed and args.strategy in ("group", "channel") and (zero is None or zero.dtype == "I32"),
            scale.dtype if scale is not None and scale.dtype in FLOAT_CODES else "BF16",
            args.act_order,
            "weight_g_idx" in module.tensors,
            # the library derives scales from absolute maxima and, early releases apart, states its version; AutoRound, stating
            # none, gives the value of largest magnitude the lowest code, so that symmetric scales carry a sign
            args.symmetric and args.strategy in ("channel", "group") and not args.act_order and self.version is None,
        )

    def _is_packed(self, module: ModuleView, group: Group) -> bool:
        storage = group.format or self.format
        if storage == "dense":
            raise LabelMismatchError(
                module.name,
                f"quantized tensors: {', '.join(sorted(module.tensors))}",
                f"a float weight, because the format of {group.name} is 'dense'",
                "correct `format`",
            )
        if storage in PLAIN_FORMATS or group.weights is None or group.weights.type == "float":
            return False
        return storage == "pack-quantized" or "weight_packed" in module.tensors

    def get_kv_cache_scheme(self, module: ModuleView) -> KVCacheScheme:
        """See QuantConfig; a static scheme whose scales are absent is an error, unless the module is ignored."""
        ignored = self.ignore.matches(module)
        self.matched_rules.update(ignored, self.targets.matches(module))
        scales = kv_scales_in(module)
        args = self.cache
        if args is None or (ignored and not scales):
            return KVCacheScheme(scales=scales)
        element, granularity = _cache_element(args)
        present = {which for _, which in scales}
        needed = [w for w in ("k", "v") if w not in present and "kv" not in present]
        if not args.symmetric:
            needed += [w for w in ("k_zero", "v_zero") if w not in present]
        if needed and not args.dynamic:
            names = {"k": "k_scale", "v": "v_scale", "k_zero": "k_zero_point", "v_zero": "v_zero_point"}
            raise MissingTensorError(
                module.name,
                f"no {' and no '.join(names[w] for w in needed)} of the KV cache",
                f"the static scales that {WHERE}.kv_cache_scheme promises",
                "fetch or write the checkpoint again, or set kv_cache_scheme to null",
            )
        return KVCacheScheme(element, granularity, args.symmetric, scales, bool(args.dynamic))


def _example(weights: QuantizationArgs, inputs: QuantizationArgs | None) -> Scheme:
    """The scheme that arguments give a module of the shape of examples."""
    activation, cell = activation_spec("example", inputs), cell_of(weights.strategy, SHAPE, weights.group_size, weights.block)
    if weights.type == "float":
        return Float8Scheme(SHAPE, activation, "F8_E4M3", cell)
    return IntScheme(SHAPE, activation, weights.num_bits, cell, weights.symmetric)


def _cache_element(args: QuantizationArgs | None) -> tuple[str, str]:
    """(element type, granularity) of the KV cache.

    Raises:
        ConfigError: a cache that cannot be stored so.
    """
    if args is None:
        return "none", "tensor"
    granularity = {"tensor": "tensor", "attn_head": "head", "token": "token"}.get(args.strategy)
    if granularity is None or (args.type == "int" and args.num_bits not in (4, 8)):
        raise ConfigError(
            f"{WHERE}.kv_cache_scheme",
            f"{args.type}{args.num_bits} with strategy {args.strategy!r}",
            "fp8, int8 or int4 per tensor, attn_head or token",
            "this KV cache is not supported by this version",
        )
    return ("fp8_e4m3fn" if args.type == "float" else f"int{args.num_bits}"), granularity


def _version(value: Any) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", str(value or ""))
    return (int(found[1]), int(found[2])) if found else None


def _unsupported(settings: Mapping[str, Any]) -> list[BitgrainError]:
    """Sparsity and online transforms: reading on without them would give wrong numbers."""
    problems: list[BitgrainError] = []
    sparsity = settings.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"):
        shown = sparsity.get("format") if isinstance(sparsity, Mapping) else sparsity
        problems.append(
            ConfigError(
                f"{WHERE}.sparsity_config",
                f"sparse storage {shown!r}",
                "none, or format 'dense'",
                "sparse storage is not supported by this version",
            )
        )
    transforms = settings.get("transform_config") or {}
    groups = transforms.get("config_groups") or {} if isinstance(transforms, Mapping) else None
    if not isinstance(groups, Mapping):
        return [*problems, ConfigError(f"{WHERE}.transform_config", repr(transforms), "an object of groups", "correct the configuration")]
    for name, group in groups.items():
        places = _online_places(group)
        if places:
            problems.append(
                ConfigError(
                    f"{WHERE}.transform_config.config_groups.{name}",
                    f"a transform at run time ({', '.join(places)}): {group!r}",
                    f"transforms that are part of the stored weights ({', '.join(OFFLINE_LOCATIONS)})",
                    "online transforms are not supported by this version",
                )
            )
    return problems


def _online_places(group: Any) -> list[str]:
    """Where a transform works on activations; what cannot be read counts as such a place."""
    applied = group.get("apply") if isinstance(group, Mapping) else None
    if not isinstance(applied, list) or not all(isinstance(a, Mapping) for a in applied):
        return ["unreadable"]
    return sorted({str(a.get("location")) for a in applied} - set(OFFLINE_LOCATIONS))


def _status_problems(settings: Mapping[str, Any], evidence: Evidence) -> list[BitgrainError]:
    """A checkpoint that was not compressed holds float weights; scales beside them mean rounding at run time.

    Early releases wrote "frozen" into compressed checkpoints too, so there only float weights beside scales tell.
    """
    status = settings.get("quantization_status")
    if status is not None and status not in STATUSES:
        return [ConfigError(f"{WHERE}.quantization_status", repr(status), f"one of {', '.join(STATUSES)}", "correct the configuration")]
    if status in (None, "compressed"):
        return []
    named = (name for name in evidence.tensors if name.rpartition(".")[2] in QUANTIZED_NAMES)
    if status == "frozen":
        named = (name for name in named if _weight_is_float(evidence, name))
    found = min(named, default=None)
    if found is None:
        return []
    return [
        ConfigError(
            f"{WHERE}.quantization_status",
            f"{status!r}, and quantization tensors such as {found}",
            "'compressed', or dense weights without quantization tensors",
            "save the model compressed; weights that are rounded at run time are not supported by this version",
        )
    ]


def _weight_is_float(evidence: Evidence, name: str) -> bool:
    """Whether the module of a quantization tensor stores its weight as 16- or 32-bit floats."""
    weight = evidence.tensors.get(f"{name.rpartition('.')[0]}.weight")
    return weight is not None and weight.dtype in FLOAT_CODES
