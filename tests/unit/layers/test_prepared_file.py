"""Prepared weights kept in a file: the same numbers at the second start, and never those of another checkpoint."""

import os
from pathlib import Path

import pytest
import torch

import bitgrain
from bitgrain.errors import RequestError, RunError
from bitgrain.kernels.cpu import library
from bitgrain.layers import prepared_file
from bitgrain.layers.builder import BuildOptions
from bitgrain.layers.decoding import ModuleReader
from bitgrain.layers.prepared_file import checksum
from bitgrain.models.loading import with_prepared
from tests.checkpoints import edited, small_llama, write_checkpoint
from tests.unit.models.tiny_models import BASE, random_tensors

IDS = torch.tensor([3, 40, 7, 7, 0, 21])
needs_library = pytest.mark.skipif(bool(library.missing()), reason=library.missing() or "present")
# weights of every kind, two with inputs that are quantized too
TARGETS = ("int4", "int8", "fp8-block", "mxfp4", "nf4")


@pytest.fixture
def decoded(monkeypatch):
    """Names of the modules that are decoded, as it happens."""
    names, plain = [], ModuleReader.weight

    def noted(self, row):
        names.append(row.name)
        return plain(self, row)

    monkeypatch.setattr(ModuleReader, "weight", noted)
    return names


def load(place: Path, folder: Path, **options):
    return bitgrain.load_model(place, dtype="float32", prepared_folder=folder, **options)


def only_file(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_second_start_decodes_no_quantized_module_and_computes_the_same(target, tmp_path, decoded):
    place = small_llama(tmp_path / "m")
    first = load(place, tmp_path / "ready", quantization=target).logits(IDS)
    assert "model.layers.0.mlp.down_proj" in decoded
    written = only_file(tmp_path / "ready").stat().st_mtime_ns
    decoded.clear()
    again = load(place, tmp_path / "ready", quantization=target)
    assert set(decoded) <= {"model.embed_tokens", "lm_head"}
    assert torch.equal(again.logits(IDS), first)
    assert only_file(tmp_path / "ready").stat().st_mtime_ns == written
    plain = bitgrain.load_model(place, dtype="float32", quantization=target)
    assert again.explain() == plain.explain()


@pytest.mark.parametrize("target", ["int4", "mxfp4"])
def test_second_start_of_a_mixture_decodes_no_expert(target, tmp_path, decoded):
    changes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    config = {**BASE, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": 16, "num_hidden_layers": 1, "torch_dtype": "float32", **changes}
    place = write_checkpoint(tmp_path / "m", random_tensors(config), config)
    first = load(place, tmp_path / "ready", quantization=target)
    want, experts = first.logits(IDS), [name for name in decoded if ".experts." in name]
    assert len(experts) == 12
    decoded.clear()
    again = load(place, tmp_path / "ready", quantization=target)
    assert torch.equal(again.logits(IDS), want) and again.explain() == first.explain()
    left = [name for name in decoded if ".experts." in name]
    # experts without a kernel of their own are linear modules of stacked halves, which are prepared anew
    assert not left or library.missing()


def test_changed_checkpoint_of_equal_headers_is_decoded_again(tmp_path):
    place = small_llama(tmp_path / "m")
    load(place, tmp_path / "ready", quantization="int4")

    def negate(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"].neg_()

    other = edited(place, tmp_path / "other", negate)
    model = bitgrain.load_model(other, dtype="float32", quantization="int4")
    os.replace(other / "model.safetensors", place / "model.safetensors")
    assert torch.equal(load(place, tmp_path / "ready", quantization="int4").logits(IDS), model.logits(IDS))


def test_copy_with_other_times_and_the_same_bytes_is_recognized(tmp_path, decoded):
    place = small_llama(tmp_path / "m")
    first = load(place, tmp_path / "ready", quantization="int4").logits(IDS)
    os.utime(place / "model.safetensors", ns=(1, 1))
    decoded.clear()
    assert torch.equal(load(place, tmp_path / "ready", quantization="int4").logits(IDS), first)
    assert set(decoded) <= {"model.embed_tokens", "lm_head"}


@pytest.mark.parametrize("damage", ["byte", "cut", "empty", "index", "trailer"])
def test_damaged_file_is_as_if_it_were_not_there_and_is_written_again(damage, tmp_path, decoded):
    place = small_llama(tmp_path / "m")
    want = load(place, tmp_path / "ready", quantization="int4").logits(IDS)
    file = only_file(tmp_path / "ready")
    whole = file.read_bytes()
    at = {"byte": 1000, "index": len(whole) - 200, "trailer": len(whole) - 3}.get(damage, 0)
    broken = {"cut": whole[:-100], "empty": b""}.get(damage, whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
    file.write_bytes(broken)
    decoded.clear()
    assert torch.equal(load(place, tmp_path / "ready", quantization="int4").logits(IDS), want)
    assert "model.layers.0.mlp.down_proj" in decoded
    decoded.clear()
    load(place, tmp_path / "ready", quantization="int4")
    assert set(decoded) <= {"model.embed_tokens", "lm_head"}


@needs_library
def test_weights_of_another_kernel_are_not_used(tmp_path, decoded, monkeypatch):
    place = small_llama(tmp_path / "m")
    load(place, tmp_path / "ready", quantization="int4")
    decoded.clear()
    monkeypatch.setattr("bitgrain.kernels.cpu.native_kernel.build_stamp", lambda: 1)
    want = bitgrain.load_model(place, dtype="float32", quantization="int4").logits(IDS)
    decoded.clear()
    assert torch.equal(load(place, tmp_path / "ready", quantization="int4").logits(IDS), want)
    assert "model.layers.0.mlp.down_proj" in decoded


def test_other_options_have_a_file_of_their_own(tmp_path):
    place = small_llama(tmp_path / "m")
    load(place, tmp_path / "ready", quantization="int4")
    load(place, tmp_path / "ready", quantization="mxfp4")
    load(place, tmp_path / "ready", quantization="int8", activations="none")
    load(place, tmp_path / "ready", quantization="int8")
    assert len(list((tmp_path / "ready").iterdir())) == 4


def test_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RunError, match=r"(?s)taken.*cannot be written"):
        load(small_llama(tmp_path / "m"), tmp_path / "taken", quantization="int4")


def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(file, tensor):
        file.write(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared_file, "_written", full)
    with pytest.raises(RunError, match="No space left"):
        load(small_llama(tmp_path / "m"), tmp_path / "ready", quantization="int4")
    assert list((tmp_path / "ready").iterdir()) == []


def test_other_devices_are_refused(tmp_path):
    checkpoint = bitgrain.open_checkpoint(small_llama(tmp_path / "m"))
    options = BuildOptions(torch.float32, torch.device("meta"), "any")
    with pytest.raises(RequestError, match="prepared weights"):
        with_prepared(options, checkpoint.files, checkpoint.plan, tmp_path / "ready")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, 32768, 32768 * 3 + 9])
def test_checksum_sees_every_byte(size):
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    for at in {0, size // 2, size - 1} & set(range(size)):
        other = data.clone()
        other[at] ^= 1
        assert checksum(other) != checksum(data)
    assert checksum(data.clone()) == checksum(data)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_file_is_read_in_shares(threads, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared_file, "_SHARE", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    (tmp_path / "f").write_bytes(bytes(index % 251 for index in range(1000)))
    data = torch.zeros(900, dtype=torch.uint8)
    assert prepared_file._fill_together(tmp_path / "f", data) == 900
    assert torch.equal(data.int(), torch.arange(900, dtype=torch.int32) % 251)
    assert prepared_file._fill_together(tmp_path / "f", torch.zeros(2000, dtype=torch.uint8)) == 1000
