"""Configuration of VPTQ checkpoints: `quant_method` vptq.

    config_for_layers       module name to its settings
    shared_layer_config     last part of a module's name to the settings of all such modules that config_for_layers does not name
    modules_to_not_convert  modules that stay dense all the same
    enable_proxy_error      of the writer's own calibration
and the settings of a module; lists are (outliers, main), -1 stands for none:

    in_features, out_features, vector_lens, num_centroids, num_res_centroids, group_num, group_size, outlier_size
    enable_norm, enable_perm, is_indice_packed, bias   where one is absent, the tensors decide
    indices_as_float        16-bit indices are called float16
    vector_quant_dim        "out": vectors run along rows
Source: formats specification, section 4.4; vptq 0.0.5 layers/model_base.py and layers/vqlinear.py; transformers 5.19 VptqConfig.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from bitgrain.checkpoint.headers import TORCH_DTYPES
from bitgrain.errors import BitgrainError, ConfigError, ShapeMismatchError
from bitgrain.formats.base import ModuleKind, ModuleView, QuantConfig, Scheme
from bitgrain.formats.config_reader import FETCH, ConfigReader
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.examples import SHAPE, examples_of
from bitgrain.formats.matching import SegmentRules
from bitgrain.formats.vptq.schemes import MAIN, OUTLIER, RESIDUAL, Stored, VptqScheme
from bitgrain.weights import ActivationSpec, WeightSpec
from bitgrain.weights.vector_codebook import MAX_ENTRIES, VectorSizes

if TYPE_CHECKING:
    from typing_extensions import Self

PER_MODULE, PER_TAIL, EXCEPT = "config_for_layers", "shared_layer_config", "modules_to_not_convert"
CODEBOOKS = (MAIN, RESIDUAL, OUTLIER)
UNSUPPORTED = "this storage is not supported by any reader of the format"


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one module, or of all of one name.

    Args:
        where:      what messages call them.
        shape:      (N, K); 0 where the settings do not say.
        group_size: columns per group; -1 where they follow from the width.
        packed, permuted, normed: None where the tensors decide.
    """

    where: str
    shape: tuple[int, int]
    sizes: VectorSizes
    group_size: int
    outliers: int
    packed: bool | None
    permuted: bool | None
    normed: bool | None
    biased: bool


@dataclass(slots=True)
class VptqConfig(QuantConfig):
    """Parsed configuration of a VPTQ checkpoint.

    Args:
        modules: settings by module name.
        tails:   settings by the last part of a module's name.
        dense:   rules that leave modules dense.
    """

    name: ClassVar[str] = "vptq"

    modules: Mapping[str, Settings]
    tails: Mapping[str, Settings]
    dense: SegmentRules = field(default_factory=lambda: SegmentRules(()))

    @classmethod
    def examples(cls) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
        stored = Stored(0, True, True, True, False)
        sizes = (VectorSizes(8, 65536), VectorSizes(8, 65536, 256), VectorSizes(8, 4096, 4096, 1, 4, 4096))
        return examples_of(*(VptqScheme(SHAPE, size, stored) for size in sizes))

    @classmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        if evidence.method == "vptq":
            named = (evidence.quantization or {}).get("quant_method")
            return Detection(100 if named else 80, ("quant_method is 'vptq'" + ("" if named else " in a file beside config.json"),))
        if evidence.method is not None or evidence.quantization is not None:
            return None
        example = next((name for name in evidence.tensors if name.endswith(f".{MAIN}")), None)
        if example is None or example.removesuffix(MAIN) + "indices" not in evidence.tensors:
            return None
        return Detection(50, (f"{example} with indices beside it",))

    @classmethod
    def parse(cls, evidence: Evidence) -> Self:
        reader = ConfigReader(evidence.settings())
        reader.skip(("quant_method", "enable_proxy_error"))
        modules, tails = (_read_sections(reader, key) for key in (PER_MODULE, PER_TAIL))
        if not reader.values.get(PER_MODULE) and not reader.values.get(PER_TAIL):
            reader.problem(PER_MODULE, "absent or empty", "the settings of each quantized module", FETCH)
        dense = SegmentRules(rule.removesuffix(".weight") for rule in reader.names(EXCEPT))
        reader.finish()
        return cls(modules, tails, dense)

    def split_name(self, name: str) -> tuple[str, str]:
        for local in CODEBOOKS:
            if name == local or name.endswith(f".{local}"):
                return name[: -len(local)].rstrip("."), local
        module, _, local = name.rpartition(".")
        return module, local

    def is_quantized(self, module: ModuleView) -> bool:
        return any(name in module.tensors for name in (*CODEBOOKS, "indices", "res_indices", "outlier_indices", "perm"))

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        excluded = self.dense.find(module.name)
        if excluded is not None:
            self.matched_rules.add(excluded)
            return False, f"excluded by {EXCEPT} {excluded!r}"
        if module.name in self.modules:
            self.matched_rules.add(module.name)
            return True, f"named in {PER_MODULE}"
        tail = module.name.rpartition(".")[2]
        if tail in self.tails and module.kind is not ModuleKind.EMBEDDING:
            self.matched_rules.add(tail)
            return True, f"{PER_TAIL} has {tail!r}"
        return False, f"neither {PER_MODULE} nor {PER_TAIL} names it"

    def rules(self) -> Sequence[str]:
        return (*self.dense.patterns, *self.modules, *self.tails)

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        settings = self.modules.get(module.name) or self.tails.get(module.name.rpartition(".")[2])
        if settings is None:
            raise ConfigError(
                f"quantization_config.{PER_MODULE}", f"nothing about {module.name}", "the settings of each quantized module", FETCH
            )
        n, k = shape = _shape_of(module, settings)
        sizes, columns = settings.sizes, k - settings.outliers
        if columns <= 0 or columns % sizes.groups or settings.group_size not in (-1, columns // sizes.groups):
            raise _width_error(module, settings, k)
        if n < 1:
            raise ShapeMismatchError(module.name, f"a matrix [{n}, {k}]", "rows", "correct the configuration")
        here = module.tensors
        indices, scale = here.get("indices"), here.get("weight_scale")
        dtype = TORCH_DTYPES.get(scale.dtype if scale is not None else "F16")
        packed = settings.packed
        stored = Stored(
            settings.outliers,
            packed if packed is not None else indices is not None and indices.dtype == "I32",
            settings.permuted if settings.permuted is not None else "perm" in here,
            settings.normed if settings.normed is not None else "weight_scale" in here or "weight_bias" in here,
            settings.biased,
            str(dtype).removeprefix("torch."),
        )
        if stored.packed:
            _require_powers(settings)
        return VptqScheme(shape, sizes, stored)


def _shape_of(module: ModuleView, settings: Settings) -> tuple[int, int]:
    """(N, K): as the settings say, else as the architecture says, else as the tensors' lengths say."""
    known = module.shape or (0, 0)
    n, k = settings.shape[0] or known[0], settings.shape[1] or known[1]
    lengths = {name: header.shape[0] for name, header in module.tensors.items() if len(header.shape) == 1}
    n = n or lengths.get("bias", 0)
    k = k or lengths.get("perm", 0) or lengths.get("weight_scale", 0) or settings.outliers + settings.sizes.groups * settings.group_size
    if not n:
        where = f"{settings.where}.out_features"
        raise ConfigError(where, f"absent, and nothing else says how many rows {module.name} has", "the number of rows", FETCH)
    return n, k


def _width_error(module: ModuleView, settings: Settings, k: int) -> BitgrainError:
    groups = settings.sizes.groups
    found = f"in_features {k}, outlier_size {settings.outliers}, group_num {groups}, group_size {settings.group_size}"
    return ConfigError(
        f"{settings.where} ({module.name})",
        found,
        "in_features = outlier_size + group_num * group_size",
        "correct the configuration, or fetch the right checkpoint",
    )


def _require_powers(settings: Settings) -> None:
    for key, entries in (("num_centroids", settings.sizes.entries), ("num_res_centroids", settings.sizes.residual)):
        if entries and entries & (entries - 1):
            raise ConfigError(
                f"{settings.where}.{key}", str(entries), "a power of two, because is_indice_packed", "correct one of the two settings"
            )


def _read_sections(reader: ConfigReader, key: str) -> dict[str, Settings]:
    """Settings by name; what is wrong with them becomes the reader's problems."""
    found = {}
    for name, values in reader.section(key, "an object of settings by name").items():
        where = f"{reader.where}.{key}[{name!r}]"
        if not isinstance(values, Mapping):
            reader.problem(key, f"{name!r}: a {type(values).__name__}", "an object of settings")
            continue
        settings = reader.collect(lambda values=values, where=where: _read_settings(values, where))  # type: ignore[misc]
        if settings is not None:
            found[name] = settings
    return found


def _read_settings(values: Mapping[str, Any], where: str) -> Settings:
    reader = ConfigReader(values, where)
    reader.skip(("enable_proxy_error", "indices_as_float"))
    reader.need("vector_quant_dim", lambda v: v == "out", "'out': vectors along rows", UNSUPPORTED)
    reader.need("norm_dim", lambda v: v == 0 and not isinstance(v, bool), "0: one scale per column", UNSUPPORTED)
    lengths, entries, residual = (_pair(reader, key) for key in ("vector_lens", "num_centroids", "num_res_centroids"))
    outliers = reader.integer("outlier_size", default=0, minimum=0)
    # the writer's own condition: a vector of one row is no outlier codebook
    has_outliers = lengths[0] > 1 and entries[0] > 0
    if residual[0] > 0:
        reader.problem("num_res_centroids", repr(list(residual)), "[-1, ...]: outliers have no residual", UNSUPPORTED)
    if outliers and not has_outliers:
        reader.problem(
            "outlier_size", str(outliers), "0, because vector_lens and num_centroids give outliers no codebook", "correct one of them"
        )
    for key, (first, main) in (("vector_lens", lengths), ("num_centroids", entries)):
        if main < 1 or max(first, main) > MAX_ENTRIES:
            reader.problem(key, repr([first, main]), f"a main one from 1 to {MAX_ENTRIES}", FETCH)
    if max(residual) > MAX_ENTRIES:
        reader.problem("num_res_centroids", repr(list(residual)), f"at most {MAX_ENTRIES}")
    sizes = VectorSizes(
        lengths[1], entries[1], max(residual[1], 0), reader.integer("group_num", default=1, minimum=1),
        lengths[0] if has_outliers else 0, entries[0] if has_outliers else 0,
    )  # fmt: skip
    settings = Settings(
        where, (_size(reader, "out_features"), _size(reader, "in_features")), sizes, reader.group_size("group_size", default=-1), outliers,
        reader.flag("is_indice_packed"), reader.flag("enable_perm"), reader.flag("enable_norm"), bool(reader.flag("bias")),
    )  # fmt: skip
    reader.finish()
    return settings


def _size(reader: ConfigReader, key: str) -> int:
    """A size above 0; 0 where it is absent or -1."""
    size = reader.integer(key, default=-1)
    if size < 1 and size != -1:
        reader.problem(key, repr(size), "a size above 0")
    return max(size, 0)


def _pair(reader: ConfigReader, key: str) -> tuple[int, int]:
    """(outliers, main): two integers; -1 stands for none, and so does absence."""
    _, value = reader.read(key)
    if value is None:
        return (-1, -1)
    if not isinstance(value, (list, tuple)) or len(value) != 2 or any(not isinstance(v, int) or isinstance(v, bool) for v in value):
        reader.problem(key, repr(value)[:200], "two integers [outliers, main]")
        return (-1, 1)
    return (value[0], value[1])
