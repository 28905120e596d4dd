"""Hub ids: which files of a repository are fetched, and what is opened; the hub is a folder here."""

from __future__ import annotations

import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest

from bitgrain.checkpoint.hub import fetch, is_hub_id
from bitgrain.errors import MissingDependencyError, RequestError


class Hub:
    """A repository with these files, whose copy is `here`; notes what was downloaded."""

    def __init__(self, here: Path, *names: str, reachable: bool = True) -> None:
        self.here, self.names, self.reachable = here, names, reachable
        self.fetched: list[str] = []
        self.HfApi = lambda: SimpleNamespace(list_repo_files=self.list_repo_files)

    def list_repo_files(self, repository: str) -> list[str]:
        if not self.reachable:
            raise OSError("no route to host")
        assert repository == "owner/name"
        return list(self.names)

    def snapshot_download(self, repository: str, allow_patterns: list[str]) -> str:
        for name in self.names:
            if self.reachable and any(fnmatch(name, pattern) for pattern in allow_patterns):
                place = self.here / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.touch()
                self.fetched.append(name)
        return str(self.here)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    def make(*names: str, reachable: bool = True) -> Hub:
        made = Hub(tmp_path, *names, reachable=reachable)
        monkeypatch.setitem(sys.modules, "huggingface_hub", made)
        return made

    return make


@pytest.mark.parametrize(
    ("text", "is_id"),
    [("owner/name", True), ("owner/name:a.gguf", True), ("owner/name:sub/a.gguf", True), ("owner/na.me-1:Q4_K_M", True), ("./name", False), ("/owner/name", False),
     ("~/name", False), ("owner/a.gguf", False), ("owner/a.safetensors", False), ("a/b/c", False), ("name", False), ("owner/name:", False), ("../name", False)],
)  # fmt: skip
def test_ids_are_told_from_paths(text, is_id):
    assert is_hub_id(text) is is_id


def test_repository_of_safetensors_is_fetched_without_anything_else(hub, tmp_path):
    made = hub("config.json", "model.safetensors", "model.gguf", "pytorch_model.bin")
    assert fetch("owner/name") == tmp_path and sorted(made.fetched) == ["config.json", "model.safetensors"]


def test_the_one_packed_model_of_a_repository_is_fetched(hub, tmp_path):
    made = hub("README.md", "config.json", "model-Q4_0.gguf", "mmproj-model-f16.gguf", "imatrix.gguf")
    assert fetch("owner/name") == tmp_path / "model-Q4_0.gguf"
    assert made.fetched == ["config.json", "model-Q4_0.gguf"]


def test_all_shards_of_a_split_model_are_fetched_and_the_first_is_opened(hub, tmp_path):
    shards = [f"Q8/m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    made = hub(*shards)
    assert fetch("owner/name") == tmp_path / shards[0] and made.fetched == shards


def test_several_models_are_listed_with_the_way_to_choose(hub):
    made = hub("m-Q4_0.gguf", "m-Q8_0.gguf", "big-00001-of-00002.gguf", "big-00002-of-00002.gguf")
    with pytest.raises(RequestError) as caught:
        fetch("owner/name")
    problem = caught.value
    assert problem.where == "owner/name" and "3 models fit: big-00001-of-00002.gguf, m-Q4_0.gguf, m-Q8_0.gguf" in problem.found
    assert "owner/name:FILE.gguf" in problem.needed and not made.fetched


@pytest.mark.parametrize("wanted", ["m-Q8_0.gguf", "Q8_0", "q8_0", "sub/m-Q8_0.gguf"])
def test_a_model_is_chosen_by_its_name_or_by_what_it_ends_in(hub, tmp_path, wanted):
    hub("model.safetensors", "m-Q4_0.gguf", "sub/m-Q8_0.gguf", "m-Q8_0-mmproj.gguf")
    assert fetch(f"owner/name:{wanted}") == tmp_path / "sub" / "m-Q8_0.gguf"


@pytest.mark.parametrize(("wanted", "found"), [("Q5_0", "no such file; there are: a-Q8_0.gguf, b-Q8_0.gguf"), ("Q8_0", "2 models fit: a-Q8_0.gguf, b-Q8_0.gguf")])
def test_choice_that_fits_none_or_several_is_refused_with_what_there_is(hub, wanted, found):
    hub("a-Q8_0.gguf", "b-Q8_0.gguf")
    with pytest.raises(RequestError) as caught:
        fetch(f"owner/name:{wanted}")
    assert caught.value.where == f"owner/name:{wanted}" and found in caught.value.found


def test_what_was_fetched_before_serves_without_a_network(hub, tmp_path):
    (tmp_path / "m-Q4_0.gguf").touch()
    hub("m-Q4_0.gguf", reachable=False)
    assert fetch("owner/name") == tmp_path / "m-Q4_0.gguf"


def test_hub_that_does_not_answer_is_named(hub):
    hub("m-Q4_0.gguf", reachable=False)
    with pytest.raises(RequestError, match="no route to host"):
        fetch("owner/name")


def test_absent_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match="owner/name"):
        fetch("owner/name")
