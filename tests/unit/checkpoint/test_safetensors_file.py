"""Headers of whole and of damaged files, and tensors mapped from them."""

import struct

import pytest
import torch
from safetensors.torch import save_file

from bitgrain.checkpoint.safetensors_file import map_tensor, read_header
from bitgrain.errors import BitgrainError, DamagedFileError
from tests.unit.checkpoint.safetensors_bytes import write_file

TWO = {"a": ("F32", [2, 2], bytes(16)), "b": ("U8", [3], b"\x01\x02\x03")}


def test_tensors_written_by_the_reference_implementation_read_back(tmp_path):
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "fp8": torch.randn(7).to(torch.float8_e4m3fn),
        "odd": torch.arange(3, dtype=torch.uint8),
        "words": torch.randint(-(2**31), 2**31 - 1, (2, 3), dtype=torch.int32),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    headers, metadata = read_header(tmp_path / "m.safetensors")
    assert metadata == {"format": "pt"} and headers.keys() == tensors.keys()
    for name, want in tensors.items():
        got = map_tensor(tmp_path / "m.safetensors", headers[name])
        assert got.dtype == want.dtype and got.shape == want.shape
        assert torch.equal(got.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8))


def test_mapped_tensor_is_private_to_the_process(tmp_path):
    path = write_file(tmp_path / "m.safetensors", TWO)
    headers, _ = read_header(path)
    map_tensor(path, headers["b"])[0] = 99
    assert map_tensor(path, headers["b"]).tolist() == [1, 2, 3]


def test_unaligned_tensor_is_read_right(tmp_path):
    path = write_file(tmp_path / "m.safetensors", {"b": ("U8", [3], b"abc"), "f": ("F32", [2], struct.pack("<2f", 1.5, -2.0))})
    headers, _ = read_header(path)
    assert map_tensor(path, headers["f"]).tolist() == [1.5, -2.0]


DAMAGES = {
    "truncated": (lambda raw: raw[:-1], "truncated"),
    "one byte too many": (lambda raw: raw + b"x", "too long"),
    "shorter than its length": (lambda raw: raw[:4], "claims"),
    "absurd header length": (lambda raw: struct.pack("<Q", 1 << 60) + raw[8:], "claims"),
    "header is not JSON": (lambda raw: raw[:8] + b"!" * (len(raw) - 8), "not valid JSON"),
    "header is a list": (lambda raw: struct.pack("<Q", 2) + b"[]", "not a JSON object"),
    "header is not UTF-8": (lambda raw: struct.pack("<Q", 2) + b"\xff\xfe", "not valid JSON"),
    "deep nesting": (lambda raw: struct.pack("<Q", 200_000) + b"[" * 200_000, "not valid JSON"),
    "empty": (lambda raw: b"", "claims"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_refused_by_name(tmp_path, damage):
    change, word = DAMAGES[damage]
    path = write_file(tmp_path / "m.safetensors", TWO)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DamagedFileError, match=word) as caught:
        read_header(path)
    assert "m.safetensors" in str(caught.value)


HEADERS = {
    "overlap": (lambda h: h["b"].update(data_offsets=[15, 18]), "overlaps"),
    "gap": (lambda h: h["b"].update(data_offsets=[17, 20]), "gap"),
    "unknown dtype": (lambda h: h["a"].update(dtype="F7"), "F7"),
    "dtype that needs other bytes": (lambda h: h["a"].update(dtype="F16"), "16 bytes for F16"),
    "negative size": (lambda h: h["a"].update(shape=[-2, -2]), "header entry"),
    "sizes that overflow": (lambda h: h["a"].update(shape=[1 << 62, 1 << 62]), "bytes for"),
    "float size": (lambda h: h["a"].update(shape=[2.0, 2.0]), "header entry"),
    "no offsets": (lambda h: h["a"].pop("data_offsets"), "header entry"),
    "entry is a number": (lambda h: h.update(a=3), "header entry"),
}


@pytest.mark.parametrize("lie", HEADERS)
def test_lying_header_is_refused_by_tensor(tmp_path, lie):
    change, word = HEADERS[lie]
    path = write_file(tmp_path / "m.safetensors", TWO, change)
    with pytest.raises(BitgrainError, match=word):
        read_header(path)


def test_duplicate_names_are_refused(tmp_path):
    entry = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    text = b"{" + entry + b"," + entry + b"}"
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"x")
    with pytest.raises(DamagedFileError, match="twice: a"):
        read_header(tmp_path / "m.safetensors")
