"""Configuration of torchao checkpoints.

    quantization_config: {quant_method: torchao, quant_type: {default: {_type, _version, _data}}, modules_to_not_convert: [...]}
`_type` is the class that quantized the model, or FqnToConfig (earlier ModuleFqnToConfig) with one class, or null, per name.
What a tensor means does not stand there but in the metadata of the safetensors files (see `records`); from the settings come
which modules were left alone, and whether integer weights have zero points.
Source: formats specification, section 9; transformers 5.19 TorchAoConfig; torchao 0.18 quant_api.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bitgrain.checkpoint.headers import FLOAT_CODES, TensorHeader
from bitgrain.checkpoint.parts import StoredPart, divide, join
from bitgrain.errors import ConfigError, ShapeMismatchError
from bitgrain.formats.base import ModuleKind, ModuleView, QuantConfig, Scheme
from bitgrain.formats.config_reader import ConfigReader
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.examples import SHAPE, examples_of
from bitgrain.formats.expert_stacks import ExpertStack
from bitgrain.formats.matching import compile_rule, matches_regex
from bitgrain.formats.torchao.activations import LOWEST_NVFP4_SCALE, plain, type_of
from bitgrain.formats.torchao.experts import divide_stacked, parameters_of
from bitgrain.formats.torchao.records import Record, describes_subclasses, read_records
from bitgrain.formats.torchao.schemes import FLOAT8_CODES, BlockScheme, Float8Scheme, Int4Scheme, IntScheme, local
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, WeightSpec

if TYPE_CHECKING:
    from typing_extensions import Self

QDATA = local("qdata")
OLD_QDATA = "weight:qdata"  # as torchao 0.14 named it
PER_NAME = ("FqnToConfig", "ModuleFqnToConfig")
SYMMETRIC = ("SYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR")
WHERE = "quantization_config"


@dataclass(slots=True)
class TorchAOConfig(QuantConfig):
    """Parsed configuration of a torchao checkpoint.

    Args:
        records:  what the metadata say of each quantized parameter, by full name.
        settings: the class that quantized, as its wrapped JSON, by parameter name, module name, "re:" pattern or "_default";
                  null: left alone.  None: the checkpoint does not say.
        skipped:  patterns of parameters that were left alone, matched at the start or the end of a name.
        embeddings: embeddings and heads were quantized in spite of `skipped`.
    """

    name: ClassVar[str] = "torchao"
    quantizes_embeddings: ClassVar[bool] = True

    records: Mapping[str, Record]
    settings: Mapping[str, Any] | None
    skipped: tuple[str, ...]
    embeddings: bool

    @classmethod
    def examples(cls) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
        token = ActivationSpec("int8", "token", reciprocal=True)
        asymmetric = ActivationSpec("int8", "token", symmetric=False, reciprocal=True)
        float8 = ActivationSpec("fp8_e4m3fn", "token")
        mx = ActivationSpec("fp8_e4m3fn", "group", 32, scale_type="e8m0")
        nvfp4 = ActivationSpec("fp4_e2m1", "group", 16, scale_type="e4m3", second_scale="dynamic", lowest_scale=LOWEST_NVFP4_SCALE)
        row, group = (1, SHAPE[1]), (1, 32)
        components = ("qdata", "scale", "zero_point")
        int8, int4 = (Record("IntxUnpackedToInt8Tensor", components, bits=bits) for bits in (8, 4))
        return examples_of(
            IntScheme(SHAPE, NO_ACTIVATION, int8, row),
            IntScheme(SHAPE, token, int8, row),
            IntScheme(SHAPE, asymmetric, int4, group, "BF16"),
            IntScheme(SHAPE, NO_ACTIVATION, int4, group, "BF16", "integer"),
            Int4Scheme(SHAPE, NO_ACTIVATION, int4, (1, 128), "BF16"),
            Float8Scheme(SHAPE, NO_ACTIVATION, int8, row),
            Float8Scheme(SHAPE, float8, int8, row),
            BlockScheme(SHAPE, "fp8_e4m3fn", 32, "e8m0", mx),
            BlockScheme(SHAPE, "fp4_e2m1", 16, "e4m3", nvfp4, second_name=local("per_tensor_scale")),
        )

    @classmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        if evidence.method == "torchao":
            return Detection(100, ("quant_method is 'torchao'",))
        if evidence.method is not None:
            return None
        described = describes_subclasses(evidence.metadata)
        if described is not None:
            return Detection(80, (f"the metadata of {described} name torchao's tensor subclasses",))
        for suffix in (QDATA, OLD_QDATA):
            if suffix in evidence.suffixes:
                return Detection(50, (f"{evidence.suffixes[suffix]} is named as torchao names a part of a tensor subclass",))
        return None

    @classmethod
    def parse(cls, evidence: Evidence) -> Self:
        reader = ConfigReader(evidence.settings(), WHERE)
        reader.skip(("quant_method", "quant_type_kwargs"))
        skipped = reader.names("modules_to_not_convert")
        for pattern in skipped:
            reader.collect(lambda pattern=pattern: compile_rule(pattern, f"{WHERE}.modules_to_not_convert"))  # type: ignore[misc]
        embeddings = reader.flag("include_input_output_embeddings") or False
        reader.flag("untie_embedding_weights")
        settings = _settings(reader)
        records = reader.collect(lambda: read_records(evidence.metadata))
        reader.finish()
        return cls(records or {}, settings, skipped, embeddings)

    def split_name(self, name: str) -> tuple[str, str]:
        stem, colon, component = name.rpartition(":")
        if not colon:
            return QuantConfig.split_name(self, name)
        module, _, parameter = stem.rpartition(".")
        return module, parameter if component == "_data" else f"_{parameter}_{component}"

    def parts(self, tensors: Mapping[str, TensorHeader], experts: ExpertStack | None) -> dict[str, StoredPart]:
        stacked = divide_stacked(tensors, experts, self.records) if experts is not None else {}
        rest = {name: header for name, header in tensors.items() if name not in stacked}
        return join(tensors, QuantConfig.parts(self, rest, experts), divide({name: tensors[name] for name in stacked}, stacked))

    def is_quantized(self, module: ModuleView) -> bool:
        return any(name.endswith("_qdata") for name in module.tensors) or self._record(module) is not None

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        names = parameters_of(module.name)
        is_end = module.kind in (ModuleKind.EMBEDDING, ModuleKind.LM_HEAD)
        for pattern in self.skipped:
            if self.embeddings and is_end and pattern == module.name:
                continue
            if any(matches_regex(pattern, name) or name.endswith(pattern) for name in names):
                self.matched_rules.add(pattern)
                return False, f"modules_to_not_convert has {pattern!r}"
        described = self._record(module) is not None
        key, setting = self._setting(module.name)
        if key is None:
            # silence excludes nothing: parameters may have been quantized one by one afterwards
            return described, "the metadata of the file describe it" if described else "no entry of quant_type matches"
        self.matched_rules.add(key)
        why = f"quant_type has {key!r}" if key != "_default" else "quant_type"
        return setting is not None, f"{why}: {type_of(setting) or setting}"

    def rules(self) -> Sequence[str]:
        return (*self.skipped, *(key for key in self.settings or () if key != "_default"))

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        record = self._record(module)
        if record is None:
            raise _undescribed(module)
        shape = module.shape or _stored_shape(module, record)
        activation = NO_ACTIVATION if module.kind is ModuleKind.EMBEDDING else record.activation
        return _scheme(record, shape, activation, module, self._zero(module, record))

    def _record(self, module: ModuleView) -> Record | None:
        return next((self.records[name] for name in parameters_of(module.name) if name in self.records), None)

    def _setting(self, module: str) -> tuple[str | None, Any]:
        """(key, setting) of a module, as torchao looks it up: exact names before patterns before the default."""
        settings = self.settings or {}
        names = (*parameters_of(module), module)
        for name in names:
            if name in settings:
                return name, settings[name]
        for key, setting in settings.items():
            if key.startswith("re:") and any(compile_rule(key[3:], f"{WHERE}.quant_type").fullmatch(name) for name in names):
                return key, setting
        return ("_default", settings["_default"]) if "_default" in settings else (None, None)

    def _zero(self, module: ModuleView, record: Record) -> str:
        """WeightSpec.zero of an integer weight."""
        stored = module.tensors.get(local("zero_point"))
        if stored is None or record.kind == "Int8Tensor":
            return "constant"  # torchao multiplies with int8 weights as if they had none
        if stored.dtype in FLOAT_CODES:
            return "float"
        data = plain(self._setting(module.name)[1])
        mapping = [data.get(key) for key in ("mapping_type", "weight_mapping_type")] if isinstance(data, Mapping) else []
        return "constant" if any(plain(value) in SYMMETRIC for value in mapping) else "integer"


def _settings(reader: ConfigReader) -> dict[str, Any] | None:
    """See TorchAOConfig.settings."""
    _, value = reader.read("quant_type")
    if isinstance(value, Mapping) and "_type" not in value:
        value = value.get("default")
    if value is None or isinstance(value, str):
        # a word is torchao's older way; it applied to every linear module
        return None if value is None else {"_default": {"_type": value}}
    kind, data = type_of(value), plain(value)
    if not kind or not isinstance(data, Mapping):
        reader.problem("quant_type", repr(value)[:200], 'an object {"default": {"_type": ..., "_data": ...}}')
        return None
    if kind not in PER_NAME:
        return {"_default": value}
    entries = data.get("fqn_to_config") or data.get("module_fqn_to_config") or {}
    if not isinstance(entries, Mapping):
        reader.problem("quant_type", f"the entries of {kind} are a {type(entries).__name__}", "an object of names")
        return None
    for key in entries:
        if key.startswith("re:"):
            reader.collect(lambda key=key: compile_rule(key[3:], f"{WHERE}.quant_type"))  # type: ignore[misc]
    return dict(entries)


def _undescribed(module: ModuleView) -> ConfigError:
    found = f"{module.name or 'the weight'}, which has {', '.join(sorted(module.tensors))}"
    where = f"{next(iter(module.tensors.values())).file}: metadata"
    if module.name.rpartition(".")[2] == "experts":
        return ConfigError(where, f"experts in one stack: {found}", "an architecture that says how they lie", "fetch the config.json of the model")
    needed, action = "an entry that names its tensor subclass", "fetch the file again: saving it with another tool loses its metadata"
    return ConfigError(where, f"nothing about {found}", needed, action)


def _stored_shape(module: ModuleView, record: Record) -> tuple[int, int]:
    """(N, K) as qdata show it; (0, 0) if there are none."""
    header = module.tensors.get(QDATA)
    if header is None or len(header.shape) != 2:
        return (0, 0)
    packed = record.kind == "Int4Tensor" or record.element == "fp4_e2m1"
    return header.shape[0], header.shape[1] * (2 if packed else 1)


def _scheme(record: Record, shape: tuple[int, int], activation: ActivationSpec, module: ModuleView, zero: str) -> Scheme:
    cell = _cell(record, shape, module)
    if record.element:
        second, static = (local(name) if name in record.components else "" for name in ("per_tensor_scale", "act_per_tensor_scale"))
        kind = "e4m3" if record.kind == "NVFP4Tensor" else "e8m0"
        return BlockScheme(shape, record.element, cell[1], kind, activation, QDATA, local("scale"), second, input_name=static, swizzled=record.swizzled)
    stored = module.tensors.get(local("scale"))
    scale_dtype = stored.dtype if stored is not None and stored.dtype in FLOAT_CODES else "F32"
    if record.kind == "Int4Tensor":
        return Int4Scheme(shape, activation, record, cell, scale_dtype)
    if record.kind == "Float8Tensor":
        qdata = module.tensors.get(QDATA)
        dtype = qdata.dtype if qdata is not None and qdata.dtype in FLOAT8_CODES else FLOAT8_CODES[0]
        return Float8Scheme(shape, activation, record, cell, "F32", dtype)
    return IntScheme(shape, activation, record, cell, scale_dtype, zero)


def _cell(record: Record, shape: tuple[int, int], module: ModuleView) -> tuple[int, int]:
    """(rows, columns) that share a scale.

    Raises:
        ShapeMismatchError: a block larger than the matrix.
    """
    (n, k), block = (max(shape[0], 1), max(shape[1], 1)), record.block[-2:]
    if not block:
        return n, k
    # a stack of experts may have one scale for all rows of all projections
    rows = block[0] if len(record.block) == 2 else min(block[0], n)
    if rows > n or block[1] > k:
        raise ShapeMismatchError(module.name, f"block_size {list(record.block)}", f"blocks inside [{n}, {k}]", "correct config.json, or write the checkpoint again")
    return rows, block[1]
