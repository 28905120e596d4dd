"""Folders: single files, shards with an index, sidecars; and every way in which they disagree."""

import json

import pytest

from bitgrain.checkpoint.files import open_files
from bitgrain.checkpoint.ledger import Ledger
from bitgrain.errors import DamagedFileError, ManyProblemsError, MissingTensorError, RequestError, UnexpectedTensorError, UnsafeFileError
from tests.unit.checkpoint.safetensors_bytes import write_file


def tensor(value: int) -> tuple[str, list[int], bytes]:
    return ("U8", [1], bytes([value]))


def shards(folder):
    write_file(folder / "model-00001-of-00002.safetensors", {"x.weight": tensor(1)})
    write_file(folder / "model-00002-of-00002.safetensors", {"y.weight": tensor(2)})
    weight_map = {"x.weight": "model-00001-of-00002.safetensors", "y.weight": "model-00002-of-00002.safetensors"}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_read_as_one_checkpoint(tmp_path):
    shards(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / "quantize_config.json").write_text('{"bits": 4}')
    files = open_files(tmp_path)
    assert [files.read(n).item() for n in ("x.weight", "y.weight")] == [1, 2]
    assert files.config == {"a": 1} and files.sidecars == {"quantize_config.json": {"bits": 4}}


def test_files_outside_the_index_are_left_out_and_noted(tmp_path):
    shards(tmp_path)
    write_file(tmp_path / "consolidated.safetensors", {"z": tensor(3)})
    files = open_files(tmp_path)
    assert "z" not in files.tensors and "consolidated.safetensors" in files.notes[0]


def test_absent_shard_is_named(tmp_path):
    shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(DamagedFileError, match="model-00002-of-00002.safetensors"):
        open_files(tmp_path)


def test_index_that_points_to_the_wrong_shard_is_refused(tmp_path):
    weight_map = shards(tmp_path)
    write_index(tmp_path, {**weight_map, "x.weight": "model-00002-of-00002.safetensors"})
    with pytest.raises(MissingTensorError, match=r"x\.weight: absent"):
        open_files(tmp_path)


def test_tensor_that_the_index_does_not_name_is_refused(tmp_path):
    weight_map = shards(tmp_path)
    write_file(tmp_path / "model-00001-of-00002.safetensors", {"x.weight": tensor(1), "stray": tensor(1)})
    write_index(tmp_path, weight_map)
    with pytest.raises(UnexpectedTensorError, match="stray"):
        open_files(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"weight_map": {"x": 3}}', '{"weight_map": {"x": "../outside.safetensors"}}', "\x00"])
def test_broken_index_is_refused(tmp_path, text):
    shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(DamagedFileError, match=r"index\.json"):
        open_files(tmp_path)


def test_one_name_in_two_files_without_an_index_is_refused(tmp_path):
    write_file(tmp_path / "a.safetensors", {"x": tensor(1)})
    write_file(tmp_path / "b.safetensors", {"x": tensor(2)})
    with pytest.raises(DamagedFileError, match=r"also in a\.safetensors"):
        open_files(tmp_path)


def test_pickles_are_refused_and_named(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(UnsafeFileError, match=r"pytorch_model\.bin"):
        open_files(tmp_path)
    with pytest.raises(UnsafeFileError, match="pickle"):
        open_files(tmp_path / "pytorch_model.bin")


def test_absent_path_is_refused():
    with pytest.raises(RequestError, match="no such file or folder"):
        open_files("./nowhere/at/all")


def test_broken_config_is_refused(tmp_path):
    write_file(tmp_path / "model.safetensors", {"x": tensor(1)})
    (tmp_path / "config.json").write_text("{,}")
    with pytest.raises(DamagedFileError, match=r"config\.json"):
        open_files(tmp_path)


def test_ledger_lists_every_leftover():
    ledger = Ledger(["a", "b", "c", "d"], {"d": "a rule"})
    ledger.consume("a", "m")
    with pytest.raises(ManyProblemsError) as caught:
        ledger.close("model")
    assert [p.where for p in caught.value.problems] == ["b", "c"]


def test_ledger_refuses_a_second_consumer_and_an_absent_tensor():
    ledger = Ledger(["a"], {})
    ledger.consume("a", "m")
    ledger.consume("a", "m")
    with pytest.raises(UnexpectedTensorError, match="consumed by m and again by n"):
        ledger.consume("a", "n")
    with pytest.raises(MissingTensorError):
        ledger.consume("b", "m")
