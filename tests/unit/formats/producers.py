"""How each producer stores a matrix, a small model and a small mixture of experts: tensors, configuration and files beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import log2
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.checkpoints import write_checkpoint
from tests.unit.formats import test_aqlm as aqlm
from tests.unit.formats import test_bitsandbytes as bnb
from tests.unit.formats import test_compressed_tensors as ct
from tests.unit.formats import test_compressed_tensors_blocks as ct_blocks
from tests.unit.formats import test_compressed_tensors_sparse as ct_sparse
from tests.unit.formats import test_fp8 as fp8
from tests.unit.formats import test_hqq as hqq
from tests.unit.formats import test_modelopt as modelopt
from tests.unit.formats import test_modelslim as modelslim
from tests.unit.formats import test_qtip as qtip
from tests.unit.formats import test_quanto as quanto
from tests.unit.formats import test_quark as quark
from tests.unit.formats import test_quip as quip
from tests.unit.formats import test_torchao as torchao
from tests.unit.formats import test_vptq as vptq
from tests.unit.formats.incoherent_models import dense_weight
from tests.unit.formats.word_packers import gemm_tensors, gemv_tensors, gptq_tensors, numbers

Module = tuple[dict[str, Tensor], "Tensor | None"]
Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Producer:
    """How a producer stores a matrix [N, K].

    Args:
        format:   whose it is, by the format's canonical name.
        module:   (tensors by local name, W in y = x W^T where the helper works it out), of N, K and a seed.
        section:  what config.json says, of the quantized modules' shapes and the names of the linear modules left alone.
        scale:    local name of a tensor without which no module can be read.
        factor:   local name of the floating-point tensor that all values are multiples of, "" if there is none.
        divides:  the factor is stored as a divisor.
        key:      of config.json under which `section` stands.
        sidecars: file name to contents, of the quantized modules and the names of all other tensors.
        metadata: of the file, of the tensors of each quantized parameter and the names of all other tensors.
        embeds:   embeddings may be stored so, not heads alone.
        size:     out features of gate and up in small models of it.
        mixture:  the architecture of its small mixture.
        stacked:  (projection, local name) of experts to their name in a tensor for all experts of a layer; None: it writes none.
    """

    format: str
    module: Callable[[int, int, int], Module]
    section: Callable[[Shapes, Sequence[str]], dict | None]
    scale: str
    factor: str = ""
    divides: bool = False
    key: str = "quantization_config"
    sidecars: Callable[[Mapping[str, dict[str, Tensor]], Sequence[str]], dict] = field(default=lambda modules, others: {})
    metadata: Callable[[Mapping[str, dict[str, Tensor]], Sequence[str]], dict] = field(default=lambda parameters, others: {})
    embeds: bool = False
    size: int = 96
    mixture: str = "qwen3_moe"
    stacked: Callable[[str, str], str] | None = None

    def make(self, n: int, k: int, seed: int) -> Module:
        """A module whose values are about as large as those of a trained one: 1 / sqrt(K)."""
        tensors, want = _module(self, n, k, seed)
        return dict(tensors), want


@lru_cache(maxsize=64)
def _module(producer: Producer, n: int, k: int, seed: int) -> Module:
    tensors, want = producer.module(n, k, seed)
    if not producer.factor:
        return tensors, want
    assert want is not None
    power = round(log2(1 / (k**0.5 * float(want.std()))))
    factor = tensors[producer.factor]
    tensors[producer.factor] = (factor.float() * 2.0 ** (-power if producer.divides else power)).to(factor.dtype)
    return tensors, want * 2.0**power


def rolled(module: Module, seed: int) -> Module:
    """The module with its rows moved, for helpers that take no seed."""
    tensors, want = module
    n = len(want)
    moved = {local: _bytes(t).roll(seed, 0).view(t.dtype) if t.dim() and len(t) == n else t for local, t in tensors.items()}
    return moved, want.roll(seed, 0)


def _bytes(tensor: Tensor) -> Tensor:
    """Elements of one byte as bytes, which torch moves and joins whatever they mean."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


# ---- modules ----


def int8_rows(n: int, k: int, seed: int) -> Module:
    torch.manual_seed(seed)
    codes, scale = torch.randint(-127, 128, (n, k), dtype=torch.int8), (torch.rand(n, 1) + 0.1).bfloat16()
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def float8_rows(n: int, k: int, seed: int) -> Module:
    torch.manual_seed(seed)
    codes, scale = (torch.randn(n, k) * 90).to(torch.float8_e4m3fn), torch.rand(n, 1) * 0.02 + 0.001
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def float8_static(n: int, k: int, seed: int) -> Module:
    """One scale for the weight and one for the input."""
    tensors, _ = float8_rows(n, k, seed)
    scale = torch.tensor(0.003 + 0.001 * seed)
    return {"weight": tensors["weight"], "weight_scale": scale, "input_scale": torch.tensor(0.01 + 0.001 * seed)}, tensors["weight"].float() * scale


def float8_blocks(n: int, k: int, seed: int) -> Module:
    codes, _ = fp8.block_module(n, k, 16)
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(codes["weight_scale_inv"].shape, generator=generator) + 0.1
    full = scale.repeat_interleave(16, 0)[:n].repeat_interleave(16, 1)[:, :k]
    return {"weight": codes["weight"], "weight_scale_inv": scale}, codes["weight"].float() * full


def packed_words(n: int, k: int, seed: int) -> Module:
    tensors, codes = ct.packed_module(bits=4, groups=k // 32, packing="padded", n=n, k=k)
    tensors["weight_packed"] = tensors["weight_packed"].roll(seed, 0)
    return tensors, codes.roll(seed, 0).float() * tensors["weight_scale"].float().repeat_interleave(32, 1)


def block_floats(n: int, k: int, seed: int) -> Module:
    tensors, want = rolled(ct_blocks.stored_module("nvfp4-pack-quantized", n, k), seed)
    return {**tensors, "input_global_scale": torch.tensor([150.0 + seed])}, want


def described_rows(n: int, k: int, seed: int) -> Module:
    tensors, want = int8_rows(n, k, seed)
    return {**tensors, "weight_offset": torch.zeros(n, 1)}, want


def described(build: Callable[..., Module], **settings) -> Callable[[int, int, int], Module]:
    def module(n: int, k: int, seed: int) -> Module:
        modelslim.GENERATOR.manual_seed(seed)
        return build(n=n, k=k, **settings)

    return module


def torchao_rows(n: int, k: int, seed: int) -> Module:
    torch.manual_seed(seed)
    codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    tensors = torchao.int8_module((1, k), (n, k))[0] | {torchao.Q: codes}
    return tensors, codes.float() * tensors[torchao.S]


def torchao_float8(n: int, k: int, seed: int) -> Module:
    tensors = torchao.float8_module((1, k), (n, k))[0]
    return rolled((tensors, tensors[torchao.Q].float() * tensors[torchao.S]), seed)


def quanto_bytes(n: int, k: int, seed: int) -> Module:
    torch.manual_seed(seed)
    tensors = quanto.bytes_module(n=n, k=k, scale=(n, 1))
    return tensors, tensors[quanto.D].float() * tensors[quanto.S]


def quanto_bits(n: int, k: int, seed: int) -> Module:
    torch.manual_seed(seed)
    return quanto.bits_module(4, n, k, integer=True)


def hqq_groups(n: int, k: int, seed: int) -> Module:
    tensors, grid = hqq.stored_module(4, n, k, 64, seed=seed)
    return tensors, ((torch.tensor(grid) - tensors["zero"]) * tensors["scale"]).view(n, k)


def words(n: int, k: int, seed: int) -> Module:
    v = numbers(n, k, 32, seed=seed)
    return gptq_tensors(v), v.weight()


def ordered_words(n: int, k: int, seed: int) -> Module:
    """Columns in groups by activation order."""
    v = numbers(n, k, 32, seed=seed)
    v.groups = v.groups[torch.randperm(k, generator=torch.Generator().manual_seed(seed))]
    return gptq_tensors(v), v.weight()


def interleaved_words(n: int, k: int, seed: int) -> Module:
    v = numbers(n, k, 32, seed=seed)
    return gemm_tensors(v), v.weight()


def vector_words(n: int, k: int, seed: int) -> Module:
    v = numbers(n, k, 32, seed=seed)
    return gemv_tensors(v, 32), v.weight()


def vectors(n: int, k: int, seed: int) -> Module:
    return vptq.module_tensors(vptq.settings(n, k, 8, 64, 16), seed, size_of_scale=0.1)


def lattice(n: int, k: int, seed: int) -> Module:
    tensors, values = quip.make(2, n, k, seed)
    return tensors, dense_weight(values, tensors["SU"], tensors["SV"]).float()


def trellis(n: int, k: int, seed: int) -> Module:
    tensors, values = qtip.make(qtip.HYBRID, n, k, seed)
    return tensors, dense_weight(values, tensors["SU"], tensors["SV"]).float()


def plain(n: int, k: int, seed: int) -> Module:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).bfloat16() / 8
    return {"weight": weight}, weight.float()


# ---- configurations ----


def ct_section(weights: dict, storage: str, inputs: dict | None = None) -> Callable[[Shapes, Sequence[str]], dict]:
    def section(shapes: Shapes, rest: Sequence[str]) -> dict:
        targets = ["Linear"] if rest else [f"re:{name}$" for name in shapes]
        return ct.section(weights, storage, ignore=list(rest)) | {"config_groups": {"g": {"targets": targets, "weights": weights, "input_activations": inputs}}}

    return section


def torchao_entries(kind: str, **data) -> Callable[[Mapping[str, dict[str, Tensor]], Sequence[str]], dict]:
    def entries(parameters: Mapping[str, dict[str, Tensor]], others: Sequence[str]) -> dict:
        found = {name: json.dumps({"_type": "Tensor"}) for name in others}
        for name, tensors in parameters.items():
            codes = next(t for local, t in tensors.items() if local.endswith("_qdata"))
            block = [1] * (codes.dim() - 1) + [codes.shape[-1]]
            found[name] = torchao.entry(kind, tensors, name.rpartition(".")[2], block_size=block, dtype=torchao.BF16, act_quant_kwargs=None, **data)
        return torchao.metadata(found)

    return entries


def descriptions(kind: str, **keys) -> Callable[[Mapping[str, dict[str, Tensor]], Sequence[str]], dict]:
    def files(modules: Mapping[str, dict[str, Tensor]], others: Sequence[str]) -> dict:
        types = dict.fromkeys(others, "FLOAT") | {f"{name}.{local}": kind for name, tensors in modules.items() for local in tensors}
        return {modelslim.FILE: types | {"version": "1.0.0", "model_quant_type": kind, "group_size": 0, **keys}}

    return files


def quanto_map(kind: str) -> Callable[[Mapping[str, dict[str, Tensor]], Sequence[str]], dict]:
    return lambda modules, others: {quanto.MAP: {name: {"weights": kind, "activations": "none"} for name in modules}}


def quark_section(weight: dict, inputs: dict | None = None) -> Callable[[Shapes, Sequence[str]], dict]:
    export = {"pack_method": "reorder", "weight_format": "real_quantized", "kv_cache_group": [], "min_kv_scale": 0.0}
    return lambda shapes, rest: {"quant_method": "quark", "global_quant_config": quark.layer(weight, inputs), "exclude": list(rest), "version": "0.13", "export": export}


def autoround_section(shapes: Shapes, rest: Sequence[str]) -> dict:
    extra = {"lm_head": {"bits": 4, "group_size": 32, "sym": False, "data_type": "int"}} if "lm_head" in shapes else {}
    routers = {f".*{name}.*".replace(".", r"\."): {"bits": 16, "data_type": "float"} for name in rest if name != "lm_head"}
    routers = {key.replace(r"\.*", ".*"): value for key, value in routers.items()}
    return AUTOROUND | ({"extra_config": extra | routers} if extra or routers else {})


def by_name(base: dict, key: str) -> Callable[[Shapes, Sequence[str]], dict]:
    """A section with a list of modules that are left alone."""
    return lambda shapes, rest: base | {key: list(rest)}


def unsuffixed(projection: str, local: str) -> str:
    """The stack of a weight has the projection's name, its scales the same with a suffix."""
    return projection if local == "weight" else f"{projection}_{local.removeprefix('weight_') if local == 'weight_scale_inv' else local}"


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
AUTOROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int", "packing_format": "auto_round:auto_gptq", "block_name_to_quantize": "model.layers"}
PER_TOKEN = {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
NVFP4_INPUT = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True, "dynamic": "local"}
TILED = ct_sparse.tiled_args(4, 32)
FP8_DYNAMIC = {"quant_method": "fp8", "activation_scheme": "dynamic"}
FP8_PER_TENSOR = quark.spec("fp8_e4m3", "per_tensor")

PRODUCERS = {
    "ct-int8": Producer("compressed-tensors", int8_rows, ct_section(ct.W8_CHANNEL, "int-quantized"), "weight_scale", "weight_scale", embeds=True),
    "ct-w8a8": Producer("compressed-tensors", int8_rows, ct_section(ct.W8_CHANNEL, "int-quantized", PER_TOKEN | {"type": "int"}), "weight_scale", "weight_scale", embeds=True),
    "ct-pack-w4": Producer("compressed-tensors", packed_words, ct_section(ct.W4_G32, "pack-quantized"), "weight_scale", "weight_scale", embeds=True),
    "ct-fp8": Producer(
        "compressed-tensors", float8_rows, ct_section(ct.FP8_TENSOR | {"strategy": "channel"}, "float-quantized", PER_TOKEN | {"type": "float"}), "weight_scale", "weight_scale", embeds=True,
    ),
    "ct-nvfp4": Producer(
        "compressed-tensors", block_floats, ct_section(ct_blocks.NVFP4, "nvfp4-pack-quantized", NVFP4_INPUT), "weight_global_scale", "weight_global_scale", divides=True,
    ),
    "ct-marlin-24": Producer(
        "compressed-tensors", lambda n, k, seed: ct_sparse.tiled_module(n, k, 4, 32, seed), ct_section(TILED, "marlin-24"), "scale_packed", "scale_packed", size=64,
    ),
    "fp8": Producer("fp8", float8_rows, by_name(FP8_DYNAMIC, "modules_to_not_convert"), "weight_scale", "weight_scale", embeds=True),
    "fp8-static": Producer(
        "fp8", float8_static, by_name({"quant_method": "fp8", "activation_scheme": "static"}, "ignored_layers"), "input_scale", "weight_scale", mixture="mixtral",
    ),
    "fp8-block": Producer(
        "fp8", float8_blocks, by_name(FP8_DYNAMIC | {"fmt": "e4m3", "weight_block_size": [16, 16]}, "modules_to_not_convert"), "weight_scale_inv", "weight_scale_inv", stacked=unsuffixed,
    ),
    "modelopt-fp8": Producer(
        "modelopt", lambda n, k, seed: rolled(modelopt.module_of("FP8_PER_CHANNEL_PER_TOKEN", n, k), seed),
        lambda shapes, rest: modelopt.flat("FP8_PER_CHANNEL_PER_TOKEN", ignore=list(rest)), "weight_scale", "weight_scale", embeds=True,
    ),
    "modelopt-fp8-static": Producer(
        "modelopt", lambda n, k, seed: rolled(modelopt.module_of("FP8", n, k), seed), lambda shapes, rest: modelopt.flat("FP8", ignore=list(rest)),
        "input_scale", "weight_scale", embeds=True, stacked=unsuffixed,
    ),
    "modelopt-nvfp4": Producer(
        "modelopt", lambda n, k, seed: rolled(modelopt.module_of("NVFP4", n, k), seed), lambda shapes, rest: modelopt.flat("NVFP4", ignore=list(rest)),
        "weight_scale_2", "weight_scale_2", embeds=True, stacked=unsuffixed,
    ),
    "modelslim-w8a16": Producer("modelslim", described_rows, lambda shapes, rest: None, "weight_scale", "weight_scale", sidecars=descriptions("W8A16"), embeds=True),
    "modelslim-w8a8-dynamic": Producer(
        "modelslim", described(modelslim.integers, bits=8), lambda shapes, rest: None, "weight_scale", "weight_scale", sidecars=descriptions("W8A8_DYNAMIC"),
    ),
    "modelslim-w8a8": Producer(
        "modelslim", described(modelslim.static), lambda shapes, rest: None, "deq_scale", "deq_scale", sidecars=descriptions("W8A8"), mixture="mixtral",
    ),
    "modelslim-w4a8": Producer(
        "modelslim", described(modelslim.integers, bits=4, pack=modelslim.pack_rows), lambda shapes, rest: None, "weight_scale", "weight_scale", sidecars=descriptions("W4A8_DYNAMIC"),
    ),
    "torchao-int8": Producer(
        "torchao", torchao_rows, lambda shapes, rest: torchao.section(include_input_output_embeddings=not rest, **({"modules_to_not_convert": list(rest)} if rest else {})),
        torchao.S, torchao.S, metadata=torchao_entries("Int8Tensor", reduce_range=False), embeds=True, stacked=lambda projection, local: local.replace("_weight_", f"_{projection}_"),
    ),
    "torchao-fp8": Producer(
        "torchao", torchao_float8, lambda shapes, rest: torchao.section(include_input_output_embeddings=not rest, **({"modules_to_not_convert": list(rest)} if rest else {})),
        torchao.S, torchao.S, metadata=torchao_entries("Float8Tensor", mm_config=None), embeds=True, stacked=lambda projection, local: local.replace("_weight_", f"_{projection}_"),
    ),
    "quanto-qint8": Producer("quanto", quanto_bytes, lambda shapes, rest: None, quanto.S, quanto.S, sidecars=quanto_map("qint8"), embeds=True),
    "quanto-qint4": Producer("quanto", quanto_bits, lambda shapes, rest: None, quanto.S, quanto.S, sidecars=quanto_map("qint4")),
    "bnb-nf4": Producer(
        "bitsandbytes", lambda n, k, seed: bnb.lookup_module(n, k, block=64, seed=seed), by_name(bnb.FOUR, "llm_int8_skip_modules"), "weight.absmax", "weight.absmax", mixture="mixtral", embeds=True,
    ),
    "bnb-int8": Producer("bitsandbytes", lambda n, k, seed: bnb.int8_module(n, k, seed), by_name(bnb.EIGHT, "llm_int8_skip_modules"), "SCB", "SCB", mixture="mixtral", embeds=True),
    "hqq-4bit": Producer(
        "hqq", hqq_groups, lambda shapes, rest: hqq.section(4, 64, skip_modules=list(rest)), "scale", "scale", mixture="mixtral", embeds=True,
    ),
    "gptq": Producer("gptq", words, lambda shapes, rest: GPTQ | {"lm_head": "lm_head" in shapes}, "scales", "scales", mixture="mixtral"),
    "gptq-order": Producer("gptq", ordered_words, lambda shapes, rest: GPTQ | {"desc_act": True, "lm_head": "lm_head" in shapes}, "scales", "scales"),
    "awq": Producer("awq", interleaved_words, lambda shapes, rest: AWQ | ({"modules_to_not_convert": list(rest)} if rest else {}), "scales", "scales", mixture="mixtral"),
    "awq-gemv": Producer("awq", vector_words, lambda shapes, rest: AWQ | {"version": "gemv"} | ({"modules_to_not_convert": list(rest)} if rest else {}), "scales", "scales"),
    "autoround": Producer("auto-round", words, autoround_section, "scales", "scales"),
    "quark": Producer("quark", lambda n, k, seed: quark.int_module("uint4", "group", n, k, seed=seed), quark_section(quark.int_spec("uint4", "group")), "weight_scale", "weight_scale"),
    "quark-fp8": Producer("quark", float8_static, quark_section(FP8_PER_TENSOR, FP8_PER_TENSOR), "weight_scale", "weight_scale"),
    "aqlm": Producer(
        "aqlm", lambda n, k, seed: aqlm.row_module(n, k, seed=seed), lambda shapes, rest: aqlm.section(linear_weights_not_to_quantize=[f"{name}.weight" for name in rest]),
        "scales", "scales", mixture="mixtral",
    ),
    "vptq": Producer(
        "vptq", vectors, lambda shapes, rest: {"quant_method": "vptq", "config_for_layers": {name: vptq.settings(*shape, 8, 64, 16) for name, shape in shapes.items()}, "shared_layer_config": {}},
        "centroids.weight",
    ),
    "quip": Producer("quip", lattice, lambda shapes, rest: quip.PARAMS[2], "SV", key="quip_params", size=192, mixture="mixtral"),
    "qtip": Producer("qtip", trellis, lambda shapes, rest: qtip.HYBRID, "SV", key="quip_params"),
    "unquantized": Producer("unquantized", plain, lambda shapes, rest: None, "weight", stacked=unsuffixed),
}  # fmt: skip


# ---- checkpoints ----


def stack_experts(producer: Producer, modules: Mapping[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The experts among `modules` as parameters for all experts of a layer, gate above up: full parameter name to tensors by their last segment."""
    assert producer.stacked is not None
    layers = sorted({name.partition(".experts.")[0] for name in modules})
    found: dict[str, dict[str, Tensor]] = {}
    for layer in layers:
        parent = f"{layer}.experts"
        count = len([name for name in modules if name.startswith(f"{parent}.") and name.endswith(".down_proj")])
        for projection, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            own = [[modules[f"{parent}.{e}.{part}"] for part in parts] for e in range(count)]
            found[f"{parent}.{projection}"] = {
                producer.stacked(projection, local): _stack([[tensors[local] for tensors in expert] for expert in own]) for local in own[0][0]
            }
    return found


def _stack(experts: Sequence[Sequence[Tensor]]) -> Tensor:
    """[E, ...] of each expert's parts, one above the other; numbers that its parts share once: [E]."""
    dtype = experts[0][0].dtype
    raw = [[_bytes(t) for t in parts] for parts in experts]
    joined = [parts[0] if parts[0].dim() == 0 else torch.cat(parts) for parts in raw]
    return torch.stack(joined).view(dtype)


def write(folder: Path, producer: Producer, config: dict, tensors: Mapping[str, Tensor], shapes: Shapes, rest: Sequence[str] = (), stacked: bool = False) -> dict[str, Tensor | None]:
    """A checkpoint whose modules of these shapes the producer has quantized; what each of them means, where that is worked out.

    Args:
        tensors: of the model; the weights of quantized modules are replaced.
        rest:    linear modules that are left alone, which the configuration then names.
        stacked: experts are stored together.
    """
    others = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in shapes or name.endswith(".bias")}
    modules, wanted = {}, {}
    for seed, (name, shape) in enumerate(shapes.items()):
        modules[name], wanted[name] = producer.make(*shape, seed)
        if name.endswith("embed_tokens"):
            modules[name].pop("input_scale", None)  # of linear modules: an embedding has no input to quantize
    experts = {name: own for name, own in modules.items() if stacked and ".experts." in name}
    if stacked:  # numbers for both halves of a parameter
        for name, own in experts.items():
            gate = experts.get(name.replace(".up_proj", ".gate_proj"), own)
            own |= {local: gate[local] for local, t in own.items() if t.dim() == 0}
            if name.endswith(".up_proj") and "weight_scale" in own and own["weight_scale"].dim() == 0:
                wanted[name] = None  # its codes with gate's scale
    single = {name: own for name, own in modules.items() if name not in experts}
    joint = stack_experts(producer, experts) if experts else {}
    held = {f"{name}.{local}": t for name, own in single.items() for local, t in own.items()}
    held |= {f"{name.rpartition('.')[0]}.{local}": t for name, own in joint.items() for local, t in own.items()}
    section = producer.section(shapes, rest)
    write_checkpoint(folder, others | held, {**config, **({producer.key: section} if section else {})})
    for file, contents in producer.sidecars(modules, list(others)).items():
        (folder / file).write_text(json.dumps(contents))
    metadata = producer.metadata({**{f"{name}.weight": own for name, own in single.items()}, **joint}, list(others))
    if metadata:
        save_file({n: t.contiguous() for n, t in (others | held).items()}, folder / "model.safetensors", metadata=metadata)
    return wanted
