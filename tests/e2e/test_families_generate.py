"""Every format that the package knows, over a dense model and a mixture of experts: written, loaded, compared and generated with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import bitgrain
from bitgrain.engine.llm import LLM
from bitgrain.errors import BitgrainError
from bitgrain.formats.base import ModuleKind
from bitgrain.formats.registry import formats
from bitgrain.models.config import ModelConfig
from bitgrain.models.registry import model_class
from bitgrain.quantize import TARGETS
from tests.checkpoints import write_checkpoint
from tests.unit.checkpoint.gguf_bytes import random_blocks
from tests.unit.formats import test_mxfp4 as mxfp4
from tests.unit.formats.gguf_models import write_model
from tests.unit.formats.producers import PRODUCERS, Producer, write
from tests.unit.models.sparse_models import stacked
from tests.unit.models.tiny_models import BASE, random_tensors

PROMPT = [5, 9, 17, 33, 2]
IDS = torch.tensor([5, 1, 17, 39, 3, 3, 22, 9])
SMALL = {**BASE, "vocab_size": 48, "num_hidden_layers": 1, "head_dim": 16, "torch_dtype": "float32"}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
ARCHITECTURES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **EXPERTS},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None, **EXPERTS},
}  # fmt: skip
# Formats that one of the two models is not written in, and why.  (The scripts of quip and qtip know no mixture either; experts
# in modules of their own are read as their other linear modules are.)
NO_DENSE_MODEL = {"mxfp4-moe": "only experts are stored so; everything else of such a checkpoint is 16-bit"}
# formats whose containers are no safetensors files with modules by name, each with cases of its own below
OTHER_CONTAINERS = {"gguf", "mxfp4-moe"}


def config_of(architecture: str, size: int = 96, **changes) -> dict:
    """A model whose matrices are multiples of 32; `size` out features of gate and up."""
    config = {**SMALL, **ARCHITECTURES[architecture], "intermediate_size": size}
    return config | ({"moe_intermediate_size": size} if architecture == "qwen3_moe" else {}) | changes


def config_for(producer: Producer, architecture: str) -> dict:
    """The model in sizes that the producer stores: where they come in tiles of 64, keys have as many rows as queries."""
    return config_of(architecture, producer.size, **({} if producer.size % 64 else {"num_key_value_heads": 4}))


def linear_modules(config: dict) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """((N, K) of the linear modules that producers quantize, the names of those that they leave alone: routers and the head)."""
    parsed = ModelConfig.from_dict(config, "config.json")
    slots = [s for s in model_class(parsed.architecture).slots(parsed).modules if s.kind in (ModuleKind.LINEAR, ModuleKind.EXPERT, ModuleKind.LM_HEAD)]
    rest = [s.name for s in slots if s.kind is ModuleKind.LM_HEAD or s.name.rpartition(".")[2] in ("gate", "router")]
    return {s.name: s.shape for s in slots if s.name not in rest}, rest


# ---- what every checkpoint must do ----


def check(place: Path, config: dict, tensors: dict[str, Tensor], names: list[str], wanted: dict[str, Tensor | None], folder: Path, **how) -> None:
    """The model computes what its weights mean, and generates; `names` are its quantized modules, `tensors` those of the dense model."""
    checkpoint = bitgrain.open_checkpoint(place, **how)
    values = {name: checkpoint.effective_weight(f"{name}.weight") for name in names}
    for name, value in values.items():
        assert checkpoint.plan.format == "unquantized" or not checkpoint.plan.modules[name].label.startswith("dense"), name
        if wanted.get(name) is not None:
            # a transformed weight is a product of float32 matrices
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-5 * float(wanted[name].abs().max()))
    twin = {name: tensor.float() for name, tensor in tensors.items()} | {f"{name}.weight": value for name, value in values.items()}
    want = bitgrain.load_model(write_checkpoint(folder, twin, config), device="cpu", dtype="float32").logits(IDS)
    model = bitgrain.load_model(place, device="cpu", dtype="float32", activations="none", **how)
    assert (model.logits(IDS) - want).abs().max() < 1e-4 * want.abs().max()
    generates(bitgrain.load_model(place, device="cpu", dtype="float32", **how), names)


def generates(model, names: list[str]) -> None:
    with LLM.from_parts(model, None) as llm:
        (completion,) = llm.generate([PROMPT], bitgrain.SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    assert len(completion.token_ids) == 4
    assert completion.token_ids[0] == int(model.logits(torch.tensor(PROMPT))[-1].argmax())
    rows = model.explain()
    assert rows and all(row["kernel"] and row["fidelity"] for row in rows)
    assert any(".experts" in row["modules"] for row in rows) == any(hasattr(layer.mlp, "experts") for layer in model.layers)


def refused_without(place: Path, folder: Path, gone: str, *other_names: str) -> None:
    """The checkpoint less one stored tensor is refused, the error naming it, or a module's tensor that was part of it."""
    folder.mkdir()
    for file in place.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(place / "model.safetensors")
    del tensors[gone]
    with safe_open(place / "model.safetensors", "pt") as file:
        save_file(tensors, folder / "model.safetensors", metadata=file.metadata())
    with pytest.raises(BitgrainError) as caught:
        bitgrain.load_model(folder)
    assert any(name in str(caught.value) for name in (gone, *other_names)), str(caught.value)


# ---- producers that store modules in safetensors files ----


def made(tmp_path: Path, producer: Producer, architecture: str, joined: bool = False):
    """(checkpoint, configuration, dense tensors, quantized modules, what those mean)."""
    config = config_for(producer, architecture)
    tensors = random_tensors(config, seed=3)
    shapes, rest = linear_modules(config)
    wanted = write(tmp_path / "q", producer, config, tensors, shapes, rest, joined)
    return tmp_path / "q", config, tensors, list(shapes), wanted


@pytest.mark.parametrize("kind", PRODUCERS)
def test_dense_model(kind, tmp_path):
    check(*made(tmp_path, PRODUCERS[kind], "llama"), tmp_path / "d")


@pytest.mark.parametrize("kind", PRODUCERS)
def test_mixture(kind, tmp_path):
    producer = PRODUCERS[kind]
    place, config, tensors, names, wanted = made(tmp_path, producer, producer.mixture)
    check(place, config, tensors, names, wanted, tmp_path / "d")
    expert = next(name for name in names if ".experts.2." in name and name.endswith(("up_proj", "w3")))
    refused_without(place, tmp_path / "less", f"{expert}.{producer.scale}")


@pytest.mark.parametrize("kind", [kind for kind, producer in PRODUCERS.items() if producer.stacked is not None])
def test_mixture_whose_experts_are_stored_together(kind, tmp_path):
    producer = PRODUCERS[kind]
    place, config, tensors, names, wanted = made(tmp_path, producer, "qwen3_moe", joined=True)
    check(place, config, tensors, names, wanted, tmp_path / "d")
    parent = "model.layers.0.mlp.experts"
    refused_without(place, tmp_path / "less", f"{parent}.{producer.stacked('down_proj', producer.scale)}", f"{parent}.0.down_proj.{producer.scale}")


@pytest.mark.parametrize("kind", list({producer.format: kind for kind, producer in PRODUCERS.items()}.values()))
def test_mixture_whose_experts_were_left_alone_together(kind, tmp_path):
    """Tools that see no linear modules in one parameter for all experts quantize the rest."""
    producer = PRODUCERS[kind]
    config = config_for(producer, "qwen3_moe")
    tensors = random_tensors(config, seed=3)
    shapes, rest = linear_modules(config)
    shapes = {name: shape for name, shape in shapes.items() if ".experts." not in name}
    wanted = write(tmp_path / "q", producer, config, stacked(tensors), shapes, rest)
    check(tmp_path / "q", config, tensors, list(shapes), wanted, tmp_path / "d")


# ---- other containers ----


@pytest.mark.parametrize(("kind", "width"), [("Q8_0", 64), ("Q4_0", 64), ("Q4_1", 64), ("MXFP4", 64), ("NVFP4", 64), ("IQ4_NL", 64), ("Q4_K", 256), ("Q6_K", 256), ("IQ2_XS", 256)])
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_gguf(kind, width, architecture, tmp_path):
    config = config_of(architecture, 128 if width == 64 else 256, hidden_size=width, head_dim=width // 4)
    tensors = random_tensors(config, seed=3)
    shapes, _ = linear_modules(config)
    place = write_model(tmp_path / "m.gguf", config, tensors, more=gguf_blocks(config, shapes, kind))
    check(place, config, tensors, list(shapes), {}, tmp_path / "d")
    if architecture == "qwen3_moe":
        with pytest.raises(BitgrainError, match=r"ffn_up_exps|experts\.0\.up_proj"):
            bitgrain.load_model(write_model(tmp_path / "less.gguf", config, tensors, more=gguf_blocks(config, shapes, kind) | {"blk.0.ffn_up_exps.weight": None}))


def gguf_blocks(config: dict, shapes: dict[str, tuple[int, int]], kind: str) -> dict:
    """Packed blocks of every linear module, the experts of a layer stacked."""
    stored = {f"self_attn.{p}_proj": f"attn_{q}" for p, q in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))}
    stored |= {f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")} | {f"mlp.experts.0.{p}_proj": f"ffn_{p}_exps" for p in ("gate", "up", "down")}
    found = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        place = stored.get(name.removeprefix("model.layers.0."))
        if place is not None:
            found[f"blk.0.{place}.weight"] = random_blocks(kind, (config["num_experts"], *shape) if "exps" in place else shape, seed)
    return found


def test_mxfp4_mixture(tmp_path):
    stored, wanted, _ = mxfp4.random_checkpoint()
    config = mxfp4.config(architectures=["GptOssForCausalLM"], torch_dtype="float32")
    place = write_checkpoint(tmp_path / "q", stored, config)
    names = [name.removesuffix(".weight") for name in wanted]
    dense = {name: tensor for name, tensor in stored.items() if not name.endswith(("_blocks", "_scales", "_proj_bias"))}
    biases = {name: tensor for name, tensor in stored.items() if name.endswith("_proj_bias")}
    for name, value in biases.items():
        parent, _, local = name.rpartition(".")
        halves = {"gate_proj": value[:, 0::2], "up_proj": value[:, 1::2]} if local == "gate_up_proj_bias" else {"down_proj": value}
        dense |= {f"{parent}.{e}.{part}.bias": row for part, rows in halves.items() for e, row in enumerate(rows)}
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    check(place, plain, dense, names, {name.removesuffix(".weight"): value for name, value in wanted.items()}, tmp_path / "d")
    refused_without(place, tmp_path / "less", "model.layers.1.mlp.experts.gate_up_proj_scales")


# ---- weights that are quantized while they are loaded ----


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("target", TARGETS)
def test_quantized_while_loading(target, architecture, tmp_path):
    config = config_of(architecture)
    tensors = random_tensors(config, seed=3)
    shapes, _ = linear_modules(config)
    place = write_checkpoint(tmp_path / "q", tensors, config)
    check(place, config, tensors, list(shapes), {}, tmp_path / "d", quantization=target)


def test_no_format_is_left_out():
    tested = {producer.format for producer in PRODUCERS.values()}
    assert set(dict(formats().items())) == tested | OTHER_CONTAINERS
    assert not tested & OTHER_CONTAINERS and set(NO_DENSE_MODEL) <= OTHER_CONTAINERS
