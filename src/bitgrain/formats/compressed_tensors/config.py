"""Configuration of compressed-tensors checkpoints: detection, parsing, and the scheme of each module.

Source: formats specification, section 4; compressed-tensors 0.17 quantization/quant_config.py for keys and defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from bitgrain.errors import ConfigError, ConflictingConfigError, MissingTensorError, RuleMismatchError
from bitgrain.formats.attention_schemes import KVCacheScheme
from bitgrain.formats.base import MATRIX_KINDS, Choice, ModuleView, QuantConfig, Scheme
from bitgrain.formats.compressed_tensors.arguments import QuantizationArgs, parse_arguments
from bitgrain.formats.compressed_tensors.choice import example_schemes, scheme_of
from bitgrain.formats.compressed_tensors.groups import Group, parse_groups
from bitgrain.formats.compressed_tensors.names import QUANTIZED_NAMES, WHERE
from bitgrain.formats.compressed_tensors.refusals import status_problems
from bitgrain.formats.compressed_tensors.rotations import Transforms, check_tied_head, parse_transforms
from bitgrain.formats.compressed_tensors.schemes import RotatedHeads, SparseScheme, TransformedScheme, without_zeros_left_out
from bitgrain.formats.compressed_tensors.sparsity import STRUCTURED, parse_sparsity, stored_shapes
from bitgrain.formats.compressed_tensors.storage import parse_format
from bitgrain.formats.compressed_tensors.targets import TargetRules, specificity
from bitgrain.formats.config_reader import AUTO_ROUND_KEYS, ConfigReader, words
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.examples import examples_of
from bitgrain.formats.kv_scales import kv_scales_in
from bitgrain.weights import ActivationSpec, WeightSpec

if TYPE_CHECKING:
    from typing_extensions import Self

METHOD = "compressed-tensors"
KEYS = words(
    "quant_method config_groups format ignore kv_cache_scheme quantization_status sparsity_config transform_config version"
    " global_compression_ratio run_compressed"
)
_PRUNED_EXPERTS = "layers with different numbers of experts are not supported by this version"
QUANTIZED_WEIGHTS = ("I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ")


@dataclass(slots=True)
class CompressedTensorsConfig(QuantConfig):
    """Parsed configuration.

    Args:
        groups:  in the configuration's order.
        version: (major, minor) of the library that wrote the file; None if it does not say.
        ignore:  rules that leave modules dense.
        cache:   arguments of the KV cache, None if the configuration does not speak of it.
        sparse:  the sparse storage of weights, one of storage.SPARSE_FORMATS; "" if there is none.
        shapes:  (N, K) of modules whose sparse weight leaves K open.
        transforms: of inputs, outputs, queries and keys.
    """

    name: ClassVar[str] = METHOD
    aliases: ClassVar[tuple[str, ...]] = ("compressed_tensors", "llmcompressor", "llm-compressor")
    informational: ClassVar[frozenset[str]] = frozenset({"version", "global_compression_ratio", "run_compressed", "provider"})
    quantizes_embeddings: ClassVar[bool] = True

    groups: tuple[Group, ...]
    version: tuple[int, int] | None
    ignore: TargetRules
    cache: QuantizationArgs | None
    sparse: str = ""
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    transforms: Transforms = field(default_factory=Transforms)
    targets: TargetRules = field(init=False)

    def __post_init__(self) -> None:
        self.targets = TargetRules((t for g in self.groups for t in g.targets), f"{WHERE}.config_groups")

    @classmethod
    def examples(cls) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
        return examples_of(*example_schemes())

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
        if "sparsity_config" in section:
            return Detection(90, ("the quantization section has sparsity_config and no quant_method",))
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
        reader.need("moe_sparsity_config", lambda v: not v, "null: experts in the number that config.json gives every layer", _PRUNED_EXPERTS)
        reader.problems += status_problems(settings, evidence)
        transforms = reader.collect(lambda: parse_transforms(settings.get("transform_config"), evidence.tensors)) or Transforms()
        reader.collect(lambda: check_tied_head(transforms, evidence.config, evidence.tensors))
        sparse = reader.collect(lambda: parse_sparsity(settings.get("sparsity_config"))) or ""
        storage = reader.collect(lambda: parse_format(f"{WHERE}.format", settings.get("format"))) or ""
        written = settings.get("config_groups")
        if written is None and (sparse or transforms.applications):
            written = {}  # sparse or rotated only: nothing is quantized
        groups = reader.collect(lambda: parse_groups(f"{WHERE}.config_groups", written, storage)) or ()
        ignore = reader.names("ignore")
        scheme = settings.get("kv_cache_scheme")
        cache = reader.collect(lambda: None if scheme is None else parse_arguments(f"{WHERE}.kv_cache_scheme", scheme))
        cache = cache or next((g.cache for g in groups if g.cache is not None), None)
        reader.collect(lambda: _cache_element(cache))
        reader.finish()
        shapes = stored_shapes(evidence) if sparse else {}
        rules = TargetRules(ignore, f"{WHERE}.ignore")
        return cls(groups, _version(settings.get("version")), rules, cache, sparse, shapes, transforms)

    def rules(self) -> Sequence[str]:
        return tuple(dict.fromkeys((*self.ignore.rules, *self.targets.rules, *self.transforms.rules)))

    def split_name(self, name: str) -> tuple[str, str]:
        return self.transforms.split_name(name) or QuantConfig.split_name(self, name)

    def attention_of(self, name: str) -> str | None:
        return self.transforms.attention_of(name)

    def is_quantized(self, module: ModuleView) -> bool:
        weight = module.tensors.get("weight") or module.tensors.get("compressed")
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

    def decide(self, module: ModuleView) -> Choice:
        """See QuantConfig; a module with online transforms means what it would mean without, in another basis."""
        choice = self._decide_stored(module)
        online = self.transforms.of(module, self.matched_rules)
        if not online:
            return choice
        n, k = choice.scheme.shape
        # hooks of inputs are put before earlier ones, those of outputs behind: the last that was added to an input runs first
        inputs = tuple(self.transforms.resolved(module.name, a, k) for a in reversed(online) if a.location == "input")
        outputs = tuple(self.transforms.resolved(module.name, a, n) for a in online if a.location == "output")
        scheme = TransformedScheme(choice.scheme, inputs, outputs)
        return Choice(scheme, f"{choice.why}; transforms: {', '.join(a.name for a in online)}")

    def _decide_stored(self, module: ModuleView) -> Choice:
        """The scheme of the stored weight; one that is stored sparse means what it would mean whole."""
        if not self.sparse or {"compressed", "bitmask"}.isdisjoint(module.tensors):
            return QuantConfig.decide(self, module)
        choice = QuantConfig.decide(self, without_zeros_left_out(module, self.shapes.get(module.name)))
        inner = choice.scheme
        scheme = SparseScheme(inner.shape, inner.activation, inner, self.sparse == STRUCTURED)
        return Choice(scheme, f"{choice.why}; its weight is stored as {self.sparse}")

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        found = self._group_of(module)
        if found is None or found[0].weights is None:
            raise RuleMismatchError(
                module.name,
                f"quantized tensors ({', '.join(sorted(module.tensors))}), but no group says how",
                "a group with weights whose targets name it",
                f"correct {WHERE}.config_groups",
            )
        return scheme_of(module, found[0], found[0].weights, self.version)

    def get_kv_cache_scheme(self, module: ModuleView) -> KVCacheScheme:
        """See QuantConfig; transforms of queries and keys say in which basis keys are cached."""
        cache = self._stored_cache(module)
        online = self.transforms.of(module, self.matched_rules)
        if not online:
            return cache
        queries, keys = (tuple(self.transforms.resolved(module.name, a, a.head_dim) for a in online if a.location == place) for place in ("q_attn", "k_cache"))
        return replace(cache, heads=RotatedHeads(queries, keys))

    def _stored_cache(self, module: ModuleView) -> KVCacheScheme:
        """What is said of the cache itself; a static scheme whose scales are absent is an error, unless the module is ignored."""
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


def _cache_element(args: QuantizationArgs | None) -> tuple[str, str]:
    """(element type, granularity) of the KV cache.

    Raises:
        ConfigError: a cache that cannot be stored so.
    """
    if args is None:
        return "none", "tensor"
    granularity = {"tensor": "tensor", "attn_head": "head", "token": "token"}.get(args.strategy)
    if granularity is None or args.num_bits not in ((4, 8) if args.type == "int" else (8,)):
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
