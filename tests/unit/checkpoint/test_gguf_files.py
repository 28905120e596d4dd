"""GGUF containers: what is read, which files make a model, and that hostile files are refused at once."""

import struct

import pytest
import torch

from bitgrain.checkpoint.files import open_files
from bitgrain.checkpoint.gguf_header import read_gguf_header
from bitgrain.errors import BitgrainError, DamagedFileError, RequestError, ShapeMismatchError
from tests.unit.checkpoint.gguf_bytes import Packed, gguf_bytes, random_blocks, text, typed, write_gguf

# a small file must not cost time, whatever it claims
pytestmark = pytest.mark.timeout(60)

BASE = {"general.architecture": "llama", "general.type": "model"}
HUGE = 1 << 60


def tensors():
    return {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": random_blocks("Q4_K", (3, 512)), "c.bias": torch.tensor([1.5]).half()}


def refused(tmp_path, raw, *words, error=DamagedFileError):
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(error) as caught:
        open_files(path)
    for word in ("bad.gguf", *words):
        assert word in str(caught.value), str(caught.value)


# --- what is read -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", [2, 3])
def test_metadata_of_every_type_is_read(tmp_path, version):
    numbers = {"u8": (0, "B", 200), "i8": (1, "b", -5), "u16": (2, "H", 60000), "i16": (3, "h", -300), "u32": (4, "I", 1 << 31), "i32": (5, "i", -7),
               "f32": (6, "f", 0.5), "u64": (10, "Q", 1 << 63), "i64": (11, "q", -(1 << 62)), "f64": (12, "d", 1e-300)}  # fmt: skip
    written = {key: struct.pack(f"<I{code}", kind, value) for key, (kind, code, value) in numbers.items()}
    nested = struct.pack("<IIQ", 9, 9, 2) + typed([1, 2])[4:] + typed([3])[4:]
    more = {"yes": True, "word": "Ωmega", "list": ["a", "b"], "floats": [0.5, 2.0], "flags": [True, False], "nested": nested, "none": []}
    path = write_gguf(tmp_path / "m.gguf", BASE | written | more, {}, version=version)
    found = read_gguf_header(path).metadata
    assert {k: found[k] for k in numbers} == {k: v[2] for k, v in numbers.items()}
    assert found["nested"] == [[1, 2], [3]] and found["flags"] == [True, False] and found["none"] == []
    assert all(found[k] == more[k] for k in ("yes", "word", "list", "floats"))


def test_tensors_have_reversed_sizes_and_their_bytes(tmp_path):
    files = open_files(write_gguf(tmp_path / "m.gguf", BASE, tensors()))
    assert files.tensors["b.weight"].describe() == "Q4_K [3, 512]" and files.tensors["a.weight"].shape == (2, 3)
    assert torch.equal(files.read("a.weight"), tensors()["a.weight"]) and torch.equal(files.read("c.bias"), tensors()["c.bias"])
    stored = files.read("b.weight")
    assert tuple(stored.shape) == (3, 288) and stored.numpy().tobytes() == tensors()["b.weight"].data
    assert files.properties["general.architecture"] == "llama" and files.config == {}


def test_alignment_of_the_file_counts(tmp_path):
    for alignment in (1, 8, 4096):
        path = write_gguf(tmp_path / "m.gguf", BASE | {"general.alignment": alignment}, tensors(), alignment=alignment)
        assert torch.equal(open_files(path).read("a.weight"), tensors()["a.weight"])


def test_text_that_is_no_utf8_keeps_its_bytes(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", BASE | {"token": struct.pack("<I", 8) + text(b"\xff\xfe")}, {})
    assert read_gguf_header(path).metadata["token"].encode("utf-8", "surrogateescape") == b"\xff\xfe"


# --- files that are not what they say -----------------------------------------------------------------------------------
def test_magic_version_and_byte_order_are_refused_by_name(tmp_path):
    good = gguf_bytes(BASE, tensors())
    refused(tmp_path, b"GGML" + good[4:], "magic")
    refused(tmp_path, b"", "magic")
    refused(tmp_path, good[:20], "magic")
    for version in (0, 1, 4, 99):
        refused(tmp_path, good[:4] + struct.pack("<I", version) + good[8:], "version", str(version))
    refused(tmp_path, b"GGUF" + struct.pack(">I", 3) + good[8:], "big-endian")


@pytest.mark.parametrize("count", [1 << 21, HUGE, (1 << 64) - 1])
def test_counts_beyond_the_file_are_refused(tmp_path, count):
    refused(tmp_path, gguf_bytes(BASE, tensors(), counts=(count, None)), "tensor_count")
    refused(tmp_path, gguf_bytes(BASE, tensors(), counts=(None, count)), "kv_count")
    refused(tmp_path, gguf_bytes(BASE | {"x": struct.pack("<IIQ", 9, 8, count)}, {}), "x", "count")
    refused(tmp_path, gguf_bytes(BASE | {"x": struct.pack("<IQ", 8, count)}, {}), "x", "length")


def test_lying_lengths_and_types_in_metadata_are_refused(tmp_path):
    raw = gguf_bytes(BASE, {})
    refused(tmp_path, raw[:24] + struct.pack("<Q", HUGE) + raw[32:], "key", "length")
    refused(tmp_path, gguf_bytes(BASE | {"x": struct.pack("<I", 77)}, {}), "x", "type 77")
    refused(tmp_path, gguf_bytes(BASE | {"x": struct.pack("<IIQ", 9, 13, 1)}, {}), "x", "type 13")
    refused(tmp_path, gguf_bytes(BASE | {"x": struct.pack("<IB", 7, 2)}, {}), "x", "truth")
    refused(tmp_path, gguf_bytes([*BASE.items(), ("x", 1), ("x", 1)], {}), "'x'", "twice")
    refused(tmp_path, gguf_bytes([*BASE.items(), (b"\xff\xff", 1)], {}), "UTF-8")
    deep = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 40 + struct.pack("<IQ", 4, 0)
    refused(tmp_path, gguf_bytes(BASE | {"x": deep}, {}), "x", "nested")


def test_many_small_arrays_are_bounded_together(tmp_path):
    # a byte each in the file, but an object each in memory
    array = struct.pack("<IIQ", 9, 0, 6_000_000) + bytes(6_000_000)
    refused(tmp_path, gguf_bytes(BASE | {"x": array, "y": array, "z": array}, {}), "z", "elements")


@pytest.mark.parametrize("value", [0, 3, 48, -1, True, "32", 1 << 40])
def test_alignment_that_is_no_power_of_two_is_refused(tmp_path, value):
    refused(tmp_path, gguf_bytes(BASE | {"general.alignment": value}, tensors()), "general.alignment", error=BitgrainError)


def test_every_truncation_is_refused(tmp_path):
    raw = gguf_bytes(BASE, tensors())
    for size in [*range(0, 300, 7), len(raw) - 33, len(raw) * 3 // 4]:
        refused(tmp_path, raw[:size], error=BitgrainError)


def test_offsets_must_lie_one_after_another(tmp_path):
    for offset, words in ((16, ("a multiple of the alignment",)), (HUGE, ("truncated",)), (0, ("overlaps",)), ((1 << 64) - 32, ("truncated",))):
        refused(tmp_path, gguf_bytes(BASE, tensors(), offsets={"b.weight": offset}), ".weight", *words, error=BitgrainError)
    spread = {"a.weight": torch.zeros(2), "gap.weight": torch.zeros(2), "c.weight": torch.zeros(64)}
    refused(tmp_path, gguf_bytes(BASE, spread, offsets={"gap.weight": 0, "c.weight": 64}), "weight", error=BitgrainError)
    refused(tmp_path, gguf_bytes(BASE, {"a.weight": torch.zeros(2), "b.weight": torch.zeros(64)}, offsets={"b.weight": 64}) + bytes(64), "gap")
    refused(tmp_path, gguf_bytes(BASE, tensors()) + bytes(1), "1 bytes after", "alignment")


def test_alignment_that_the_file_does_not_name_is_noticed(tmp_path):
    # some writers align later shards as the first one says, and do not repeat it there
    for extra in range(0, 64, 8):
        metadata = BASE | {"general.name": "n" * extra}
        raw = gguf_bytes(metadata, tensors(), alignment=64)
        if raw != gguf_bytes(metadata, tensors(), alignment=32):
            refused(tmp_path, raw, error=BitgrainError)


def test_types_are_named(tmp_path):
    for kind, name in ((4, "Q4_2"), (33, "Q4_0_8_8"), (37, "IQ4_NL_4_8"), (9, "Q8_1"), (15, "Q8_K"), (9999, "9999")):
        refused(tmp_path, gguf_bytes(BASE, tensors(), kinds={"b.weight": kind}), "b.weight", name)


def test_impossible_sizes_are_refused(tmp_path):
    refused(tmp_path, gguf_bytes(BASE, {"x": Packed("F32", (1,) * 9, bytes(4))}), "x", "9 dimensions")
    refused(tmp_path, gguf_bytes(BASE, {"x": Packed("F32", (0, 4), b"")}), "x", "at least 1")
    refused(tmp_path, gguf_bytes(BASE, {"x": Packed("F32", (HUGE, HUGE, HUGE, HUGE), bytes(4))}), "x")
    refused(tmp_path, gguf_bytes(BASE, {"x": Packed("Q4_K", (2, 100), bytes(288))}), "x", "256", error=ShapeMismatchError)
    refused(tmp_path, gguf_bytes(BASE, [("x", torch.zeros(8)), ("x", torch.zeros(8))]), "x", "twice")


def test_every_bad_tensor_is_listed(tmp_path):
    raw = gguf_bytes(BASE, tensors(), kinds={"a.weight": 5, "b.weight": 1234})
    refused(tmp_path, raw, "a.weight", "b.weight", "Q4_3", "1234", error=BitgrainError)


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix", "vocab", "other"])
def test_files_of_other_kinds_are_refused(tmp_path, kind):
    refused(tmp_path, gguf_bytes(BASE | {"general.type": kind}, {}), kind, error=RequestError)


# --- split models and folders -------------------------------------------------------------------------------------------
def shards(folder, count=3, stem="m", **changes):
    """A model of one tensor per shard; changes: (shard, key) to a value."""
    paths = []
    for index in range(count):
        own = {"split.no": index, "split.count": count, "split.tensors.count": count} | {k: v for (i, k), v in changes.get("keys", {}).items() if i == index}
        metadata = own | (BASE if index == 0 else {})
        names = changes.get("names", {})
        path = folder / f"{stem}-{index + 1:05d}-of-{count:05d}.gguf"
        paths.append(write_gguf(path, metadata, {names.get(index, f"t{index}.weight"): torch.full((4,), float(index))}))
    return paths


def test_split_model_is_one_checkpoint(tmp_path):
    first = shards(tmp_path)[0]
    for path in (first, tmp_path):
        files = open_files(path)
        assert list(files.tensors) == ["t0.weight", "t1.weight", "t2.weight"]
        assert float(files.read("t2.weight")[0]) == 2.0 and files.properties["general.architecture"] == "llama"


def split_refused(path, *words):
    with pytest.raises(BitgrainError) as caught:
        open_files(path)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_later_shard_is_refused_and_the_first_named(tmp_path):
    split_refused(shards(tmp_path)[1], "shard 2 of 3", "m-00001-of-00003.gguf")


def test_absent_shard_is_named(tmp_path):
    paths = shards(tmp_path)
    paths[2].unlink()
    split_refused(paths[0], "1 of 3", "m-00003-of-00003.gguf")


@pytest.mark.parametrize(
    ("keys", "names", "words"),
    [
        ({(1, "split.no"): 0}, {}, ("m-00002", "split.no 0")),
        ({(1, "split.no"): 2}, {}, ("m-00002", "split.no 2")),
        ({(2, "split.count"): 4}, {}, ("m-00003", "split.count 4")),
        ({(0, "split.tensors.count"): 7}, {}, ("split.tensors.count", "7")),
        ({(0, "split.count"): 60000}, {}, ("60000", "m-00001-of-60000.gguf")),
        ({(0, "split.count"): 1 << 40}, {}, ("split.count",)),
        ({(0, "split.count"): -3}, {}, ("split.count", "-3")),
        ({}, {2: "t0.weight"}, ("t0.weight", "m-00003")),
    ],
)
def test_shards_that_disagree_are_refused(tmp_path, keys, names, words):
    split_refused(shards(tmp_path, keys=keys, names=names)[0], *words)


def test_shards_that_lead_back_to_the_first_are_refused(tmp_path):
    paths = shards(tmp_path)
    for path in paths[1:]:
        path.unlink()
        path.symlink_to(paths[0])
    split_refused(paths[0], "split.no 0")
    loop = tmp_path / "m-00002-of-00003.gguf"
    loop.unlink()
    loop.symlink_to(loop)
    split_refused(paths[0], "m-00002-of-00003.gguf")


def test_renamed_first_shard_is_refused(tmp_path):
    path = shards(tmp_path)[0]
    split_refused(path.rename(tmp_path / "model.gguf"), "model-00001-of-00003.gguf")


def test_folder_with_one_model_beside_a_projector_is_opened(tmp_path):
    write_gguf(tmp_path / "model.gguf", BASE, tensors())
    write_gguf(tmp_path / "mmproj.gguf", BASE | {"general.type": "mmproj"}, {})
    files = open_files(tmp_path)
    assert files.label == "model.gguf" and "mmproj" in files.notes[0]
    write_gguf(tmp_path / "second.gguf", BASE, tensors())
    split_refused(tmp_path, "model.gguf", "second.gguf")


def test_safetensors_win_over_gguf_in_one_folder(tmp_path):
    from safetensors.torch import save_file

    save_file({"x.weight": torch.zeros(2, 2)}, str(tmp_path / "model.safetensors"))
    write_gguf(tmp_path / "other.gguf", BASE, tensors())
    files = open_files(tmp_path)
    assert list(files.tensors) == ["x.weight"] and any("other.gguf" in note for note in files.notes)


def test_absent_file_is_no_hub_name(tmp_path):
    with pytest.raises(RequestError, match="no such file"):
        open_files("folder/model.gguf")
