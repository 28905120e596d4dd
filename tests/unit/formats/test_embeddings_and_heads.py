"""Quantized embeddings and output heads of every format that can hold them: through the plan, tied and untied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bitgrain
from bitgrain.formats.registry import formats
from bitgrain.inspect.choices import choose_for_plan
from bitgrain.kernels.cpu.embedding import SHARED_ROWS
from bitgrain.kernels.selection import Policy
from bitgrain.weights import WeightSpec
from bitgrain.weights.synthetic import block_of, sample_weight
from tests.checkpoints import HIDDEN, VOCAB, llama_config, llama_tensors, write_checkpoint
from tests.unit.checkpoint.gguf_bytes import TYPES, random_blocks
from tests.unit.formats.gguf_models import write_model
from tests.unit.formats.producers import PRODUCERS, Producer, write

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
IDS = torch.tensor([3, 40, 7, 7, 0, 21])
# producers that quantize heads, and store one of these sizes
HEADS = [name for name, producer in PRODUCERS.items() if producer.embeds or name in ("gptq", "awq", "autoround", "quark")]


def written(folder: Path, producer: Producer, names: list[str], tied: bool) -> tuple[Path, dict[str, Tensor | None]]:
    """A small Llama whose modules `names` a producer has quantized; a tied head is not stored unless it is one of them."""
    tensors = llama_tensors(dtype=torch.float32)
    if tied:
        del tensors[f"{HEAD}.weight"]
    config = llama_config(tie_word_embeddings=tied, torch_dtype="float32")
    return folder, write(folder, producer, config, tensors, dict.fromkeys(names, (VOCAB, HIDDEN)))


def check_model(place: Path, quantized: list[str], tied: bool, dense: Callable[[dict[str, Tensor]], Path], wanted: dict[str, Tensor | None] | None = None) -> None:
    """Rows and logits are those of the dense model with the same numbers; tied modules hold one set of tensors."""
    checkpoint = bitgrain.open_checkpoint(place)
    values = {name: checkpoint.dequantize(f"{name}.weight") for name in quantized}
    for name, want in (wanted or {}).items():
        assert not checkpoint.plan.modules[name].label.startswith("dense")
        if want is not None:
            torch.testing.assert_close(values[name], want, rtol=1e-6, atol=1e-7)
    twin = bitgrain.load_model(dense(values), dtype="float32")
    model = bitgrain.load_model(place, dtype="float32", activations="none")
    if EMBEDDING in quantized:
        assert torch.equal(model.embed(IDS), values[EMBEDDING][IDS])
    torch.testing.assert_close(model.logits(IDS), twin.logits(IDS), rtol=1e-4, atol=1e-4 * float(twin.logits(IDS).abs().max()))
    by_rows = [kernel for kernel in SHARED_ROWS if model.selections[HEAD].kernel.name in kernel.heads and not kernel.linear.rows_refusal(model.selections[HEAD].problem.weight)]
    if tied and by_rows:
        assert model.selections[EMBEDDING].kernel.name == by_rows[0].name and model.embed.prepared is model.head.prepared
    floor = bitgrain.load_model(place, dtype="float32", activations="none", forbid=("cpu",))
    held = [{name: (t.data_ptr(), t.nbytes) for name, t in module.prepared.tensors.items()} for module in (floor.embed, floor.head)]
    assert (held[0] == held[1]) is tied, "a tied pair holds its tensors once, any other pair twice"
    assert all(nbytes < VOCAB * floor.embed.prepared.shape[1] * 4 or name == "data" for name, (_, nbytes) in held[1].items()), "packed as it is stored"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", [name for name, producer in PRODUCERS.items() if producer.embeds])
def test_quantized_embedding_runs_and_is_shared_with_a_tied_head(kind, tied, tmp_path):
    names = [EMBEDDING] if tied else [EMBEDDING, HEAD]
    place, wanted = written(tmp_path / "m", PRODUCERS[kind], names, tied)
    plan = bitgrain.open_checkpoint(place).plan
    assert plan.modules[HEAD].tied_to == (EMBEDDING if tied else None)

    def dense(values: dict[str, Tensor]) -> Path:
        tensors = llama_tensors(dtype=torch.float32) | {f"{HEAD}.weight": values.get(HEAD, values[EMBEDDING]).clone(), f"{EMBEDDING}.weight": values[EMBEDDING]}
        return write_checkpoint(tmp_path / "dense", tensors, llama_config(torch_dtype="float32"))

    check_model(place, names, tied, dense, wanted)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", HEADS)
def test_quantized_head_runs_whether_the_configuration_ties_it_or_not(kind, tied, tmp_path):
    place, wanted = written(tmp_path / "m", PRODUCERS[kind], [HEAD], tied)

    def dense(values: dict[str, Tensor]) -> Path:
        tensors = llama_tensors(dtype=torch.float32) | {f"{HEAD}.weight": values[HEAD]}
        return write_checkpoint(tmp_path / "dense", tensors, llama_config(torch_dtype="float32"))

    assert bitgrain.open_checkpoint(place).plan.modules[HEAD].tied_to is None
    check_model(place, [HEAD], False, dense, wanted)


@pytest.mark.parametrize("kind", [name for name, producer in PRODUCERS.items() if name in HEADS and not producer.embeds])
def test_format_that_leaves_embeddings_alone_refuses_a_quantized_one_by_name(kind, tmp_path):
    place, _ = written(tmp_path / "m", PRODUCERS[kind], [EMBEDDING], False)
    with pytest.raises(bitgrain.BitgrainError, match=r"model\.embed_tokens"):
        bitgrain.load_model(place)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in ("I32", "F64")])
def test_packed_embedding_of_every_gguf_type_runs_tied(kind, tmp_path):
    hidden, heads = 256, 4
    config = llama_config(hidden_size=hidden, num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=heads, intermediate_size=64, torch_dtype="float32")
    tensors = gguf_tensors(hidden)
    table = tensors[f"{EMBEDDING}.weight"].to({"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)) if TYPES[kind][1] == 1 else random_blocks(kind, (VOCAB, hidden))
    place = write_model(tmp_path / "m.gguf", config, {n: t for n, t in tensors.items() if n != f"{HEAD}.weight"}, more={"token_embd.weight": table})

    def dense(values: dict[str, Tensor]) -> Path:
        both = dict.fromkeys((f"{EMBEDDING}.weight", f"{HEAD}.weight"), values[EMBEDDING])
        return write_checkpoint(tmp_path / "dense", {n: t.clone() for n, t in (tensors | both).items()}, config)

    plan = bitgrain.open_checkpoint(place).plan
    assert plan.modules[HEAD].tied_to == EMBEDDING
    check_model(place, [EMBEDDING], True, dense)
    promised = choose_for_plan(plan, "cpu", Policy(fidelity="fast"), "bfloat16")
    model = bitgrain.load_model(place, dtype="bfloat16", fidelity="fast")
    assert {label: s.as_dict() for label, s in promised.items()} == {label: s.as_dict() for label, s in model.selections.items()}


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
def test_packed_head_beside_another_packed_embedding(kind, tmp_path):
    config = llama_config(hidden_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, intermediate_size=64, torch_dtype="float32")
    tensors = gguf_tensors(256)
    more = {"token_embd.weight": random_blocks("Q6_K", (VOCAB, 256)), "output.weight": random_blocks(kind, (VOCAB, 256), 1)}
    place = write_model(tmp_path / "m.gguf", config, tensors, more=more)

    def dense(values: dict[str, Tensor]) -> Path:
        return write_checkpoint(tmp_path / "dense", tensors | {f"{name}.weight": value for name, value in values.items()}, config)

    check_model(place, [EMBEDDING, HEAD], False, dense)


def gguf_tensors(hidden: int) -> dict[str, Tensor]:
    """A Llama of one layer as wide as the longest block."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"self_attn.{p}_proj": (hidden, hidden) for p in "qkvo"} | {"mlp.gate_proj": (64, hidden), "mlp.up_proj": (64, hidden), "mlp.down_proj": (hidden, 64)}
    tensors = {f"model.layers.0.{name}.weight": torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}
    tensors |= {f"model.layers.0.{norm}_layernorm.weight": torch.ones(hidden) for norm in ("input", "post_attention")}
    tensors |= {f"{name}.weight": torch.randn(VOCAB, hidden, generator=generator) for name in (EMBEDDING, HEAD)}
    return tensors | {"model.norm.weight": torch.ones(hidden)}


# ---- rows that are asked for, and no others ----


class NewStorage(TorchDispatchMode):
    """Bytes of the largest storage that an operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def embedding_specs() -> list[WeightSpec]:
    """The specs of all examples of formats that quantize embeddings, and one of each other kind of weight."""
    found: dict[WeightSpec, None] = {}
    kinds: set[str] = set()
    for config in dict(formats().items()).values():
        for _, spec, _ in config.examples():
            if config.quantizes_embeddings or spec.kind not in kinds:
                found[spec] = None
                kinds.add(spec.kind)
    return list(found)


@pytest.mark.parametrize("spec", embedding_specs(), ids=lambda spec: spec.describe().replace(" ", "-"))
def test_gathering_rows_touches_those_rows_only(spec):
    height, width = block_of(spec)
    n, k = 2048 // height * height, 512 // width * width
    weight = sample_weight(spec, n, k)
    index = torch.tensor([n - 1, 0, 17, 17])
    with NewStorage() as seen:
        rows = weight.gather_rows(index)
    assert torch.equal(rows, weight.dequantize()[index]) and rows.dtype is torch.float32
    # eight-byte indices for each asked row, or for the block of rows in which it is stored; lookup tables are read whole
    tables = 4 * 8 * (1 << 16) if spec.kind in ("additive", "lattice", "vector_codebook") else 0
    assert seen.largest <= max(16 * k * len(index) * height, tables) < n * k * 4


def test_a_format_that_quantizes_embeddings_is_tested_here():
    tested = {"compressed-tensors": "ct-int8", "fp8": "fp8", "modelopt": "modelopt-fp8", "modelslim": "modelslim-w8a16", "torchao": "torchao-int8", "quanto": "quanto-qint8", "gguf": None}
    assert {name for name, config in formats().items() if config.quantizes_embeddings} == set(tested)
    assert all(PRODUCERS[kind].embeds for kind in tested.values() if kind)
