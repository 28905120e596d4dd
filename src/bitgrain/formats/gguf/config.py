"""GGUF: the container says of every tensor what it is, and of the model what config.json says elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from bitgrain.checkpoint.described_tokenizer import TokenizerDescription
from bitgrain.checkpoint.headers import TensorHeader
from bitgrain.checkpoint.parts import StoredPart, whole
from bitgrain.errors import (
    BitgrainError,
    ConfigError,
    DamagedFileError,
    MissingTensorError,
    ShapeMismatchError,
    UnexpectedTensorError,
    raise_all,
)
from bitgrain.formats.base import Choice, DenseScheme, ModuleView, QuantConfig, Scheme, dense_scheme
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.examples import SHAPE, examples_of
from bitgrain.formats.expert_stacks import ExpertStack
from bitgrain.formats.gguf.metadata import Description, model_config
from bitgrain.formats.gguf.names import LLAMA, LOCALS, Architecture, Place, place_of
from bitgrain.formats.gguf.parts import Heads, parts_of
from bitgrain.formats.gguf.rope import ROPE_TENSORS
from bitgrain.formats.gguf.schemes import FLOAT_BLOCKS, BlockScheme, LatentScheme, RouterScheme
from bitgrain.formats.gguf.tokenizer import describe_tokenizer
from bitgrain.formats.matching import nearest_names
from bitgrain.numerics.block_types import BLOCK_TYPES
from bitgrain.weights import ActivationSpec, WeightSpec

if TYPE_CHECKING:
    from typing_extensions import Self

CORRECTION = "e_score_correction_bias"
LATENT = ("k_b", "v_b")
KNOWN_VERSION = 2
# llama.cpp (llama-cpp-python 0.3.36) loads these tensors with the model, and no graph of its reads one
INPUT_SCALE_RULE = "input_scale is checked and not applied: it belongs to four-bit inputs, which the format's own runtime does not compute with either"


@dataclass(slots=True)
class GGUFConfig(QuantConfig):
    """One model's architecture and where each of its tensors belongs.

    Args:
        places: stored name to its place.
        heads:  of every layer.
    """

    name: ClassVar[str] = "gguf"
    quantizes_embeddings: ClassVar[bool] = True

    architecture: Architecture = LLAMA
    places: Mapping[str, Place] = field(default_factory=dict)
    heads: Heads = field(default_factory=lambda: Heads((), ()))

    @classmethod
    def examples(cls) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
        return examples_of(*(BlockScheme(SHAPE, kind) for kind in BLOCK_TYPES), BlockScheme(SHAPE, "NVFP4", scaled=True), DenseScheme(SHAPE, "BF16"))

    @classmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        if not evidence.properties:
            return None
        types = Counter(header.dtype for header in evidence.tensors.values())
        shown = ", ".join(f"{kind} {count}" for kind, count in types.most_common())
        return Detection(100, (f"the container describes its model: {evidence.properties.get('general.architecture')}", f"types of tensors: {shown}"))

    @classmethod
    def model_config(cls, evidence: Evidence) -> Mapping[str, Any]:
        return model_config(evidence)

    @classmethod
    def tokenizer(cls, evidence: Evidence, beside: bool) -> TokenizerDescription | None:
        return describe_tokenizer(evidence, beside)

    @classmethod
    def parse(cls, evidence: Evidence) -> Self:
        keys = Description(evidence)
        architecture, layers, heads = keys.architecture, keys.layers(), keys.heads()
        raise_all(keys.where, keys.problems)
        places: dict[str, Place] = {}
        problems: list[BitgrainError] = []
        for name, header in evidence.tensors.items():
            place = None if name in ROPE_TENSORS else place_of(name, architecture)
            if place is not None and (place.layer is None or place.layer < layers):
                places[name] = place
            elif name not in ROPE_TENSORS:
                problems.append(_unknown(header, architecture, layers, evidence.tensors))
        problems += _uneven_biases(places, evidence.tensors)
        _check_version(keys, problems)
        raise_all(keys.file, problems)
        return cls(architecture, places, heads)

    def left_out(self, tensors: Mapping[str, TensorHeader]) -> dict[str, str]:
        return {name: rule for name, rule in ROPE_TENSORS.items() if name in tensors}

    def parts(self, tensors: Mapping[str, TensorHeader], experts: ExpertStack | None) -> dict[str, StoredPart]:
        """Every tensor under Hugging Face's name.

        Raises:
            DamagedFileError: two stored tensors are the same one by name.
            ShapeMismatchError: sizes that contradict the name, or the number of experts.
        """
        found: dict[str, StoredPart] = {}
        problems: list[BitgrainError] = []
        for name, header in tensors.items():
            place = self.places.get(name)
            try:
                made = [whole(header)] if place is None else list(parts_of(header, place, self.architecture, self.heads))
                if place is not None and place.stacked and experts is not None and header.shape[0] != experts.count:
                    raise ShapeMismatchError(f"{header.file}: {name}", f"{header.shape[0]} experts", f"expert_count ({experts.count})", "fetch or write the file again")
            except BitgrainError as problem:
                problems.append(problem)
                continue
            for part in made:
                if part.header.name in found:
                    twin = found[part.header.name].source
                    problems.append(DamagedFileError(f"{header.file}: {name}", f"{part.header.name}, which {twin} is too", "each tensor once", "fetch or write the file again"))
                found[part.header.name] = part
        raise_all("tensors", problems)
        return found

    def is_quantized(self, module: ModuleView) -> bool:
        return any(header.dtype in BLOCK_TYPES for header in module.tensors.values())

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        types = sorted({h.dtype for local, h in module.tensors.items() if local in ("weight", *LATENT)})
        return self.is_quantized(module), f"the file stores it as {' and '.join(types) or 'nothing'}"

    def decide(self, module: ModuleView) -> Choice:
        why = self.rule_for(module)[1]
        if "input_scale" in module.tensors:
            why = f"{why}; {INPUT_SCALE_RULE}"
        if any(local in module.tensors for local in LATENT):
            return Choice(_latent_scheme(module), why)
        if self.is_quantized(module):
            return Choice(self.quantized_scheme(module), why)
        plain = dense_scheme(module)
        if CORRECTION in module.tensors:
            return Choice(RouterScheme(plain.shape, plain.dtype), why)
        return Choice(plain, why)

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        header = module.tensors.get("weight")
        if header is None or header.dtype not in BLOCK_TYPES or len(header.shape) != 2:
            found = next(h for h in module.tensors.values() if h.dtype in BLOCK_TYPES)
            where = f"{found.file}: {found.name}"
            if header is None:
                raise MissingTensorError(f"{module.name}.weight", f"absent, beside {found.name}", "the module's weight", "fetch or write the file again")
            raise ShapeMismatchError(where, found.describe(), "packed blocks only as a matrix [N, K]", "fetch or write the file again")
        layout = BLOCK_TYPES[header.dtype]
        if header.shape[1] % layout.elements:
            raise ShapeMismatchError(f"{header.file}: {header.name}", header.describe(), f"rows of whole blocks of {layout.elements}", "fetch or write the file again")
        return BlockScheme((header.shape[0], header.shape[1]), header.dtype, header.dtype in FLOAT_BLOCKS and "scale" in module.tensors)


def _latent_scheme(module: ModuleView) -> LatentScheme:
    """The scheme of kv_b in two tensors.

    Raises:
        MissingTensorError, ShapeMismatchError: only one of them is there, or they do not fit each other.
    """
    missing = [f"{module.name}.{local}" for local in LATENT if local not in module.tensors]
    if missing:
        raise MissingTensorError(missing[0], f"absent, beside {', '.join(sorted(module.tensors))}", "both k_b and v_b", "fetch or write the file again")
    keys, values = (module.tensors[local] for local in LATENT)
    if len(keys.shape) != 3 or len(values.shape) != 3 or (keys.shape[0], keys.shape[1]) != (values.shape[0], values.shape[2]):
        found = f"{keys.describe()} and {values.describe()}"
        raise ShapeMismatchError(module.name, found, "[heads, rank, key size] and [heads, value size, rank]", "fetch or write the file again")
    return LatentScheme(_triple(keys.shape), _triple(values.shape), keys.dtype, values.dtype)


def _triple(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return shape[0], shape[1], shape[2]


def _unknown(header: TensorHeader, architecture: Architecture, layers: int, tensors: Mapping[str, TensorHeader]) -> BitgrainError:
    near = nearest_names(header.name, (n for n in tensors if n != header.name), 1)
    hint = f" (nearest: {near[0]})" if near else ""
    return UnexpectedTensorError(
        f"{header.file}: {header.name}", f"{header.describe()}, which {architecture.name} of {layers} layers does not have{hint}",
        f"tensors of that architecture only, each ending in {', '.join(LOCALS)}", "the model would run without it: fetch or write the file again",
    )  # fmt: skip


def _uneven_biases(places: Mapping[str, Place], tensors: Mapping[str, TensorHeader]) -> list[BitgrainError]:
    """Biases that some layers have and others lack, although they have the matrix."""
    layers: dict[tuple[str, str], set[int]] = {}
    for place in places.values():
        if place.layer is not None and place.local in ("weight", "bias"):
            layers.setdefault((place.stem, place.local), set()).add(place.layer)
    problems: list[BitgrainError] = []
    for (stem, local), found in layers.items():
        lacking = sorted(layers.get((stem, "weight"), set()) - found) if local == "bias" else []
        for layer in lacking:
            problems.append(MissingTensorError(f"blk.{layer}.{stem}.bias", f"absent, though {len(found)} other layers have one", "a bias in every layer, or in none", "fetch or write the file again"))
    return problems


def _check_version(keys: Description, problems: list[BitgrainError]) -> None:
    version = keys.evidence.properties.get("general.quantization_version", KNOWN_VERSION)
    quantized = any(header.dtype in BLOCK_TYPES for header in keys.evidence.tensors.values())
    if quantized and version != KNOWN_VERSION:
        problems.append(ConfigError(f"{keys.file}: general.quantization_version", repr(version), str(KNOWN_VERSION), "quantize the model again with a current program"))
