import json

import pytest
import torch
from safetensors.torch import save_file

import bitgrain
from tests.engine.fakes import CONFIG, TEMPLATE, FakeModel, byte_backend, ids_of

TEXT = "naïve 東京"


def write_checkpoint(folder, template=TEMPLATE):
    """Files that are enough to find a tokenizer; the model itself is a fake."""
    folder.mkdir(exist_ok=True)
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    byte_backend().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**CONFIG, **({"chat_template": template} if template else {})}))
    return folder


@pytest.fixture
def loads(monkeypatch):
    """Options of every load_model() call; the model says TEXT."""
    calls = []

    def load_model(path, *, progress=None, **options):
        calls.append({"path": path, **options})
        if progress:
            progress(1, 2)
            progress(2, 2)
        return FakeModel(script=ids_of(TEXT))

    monkeypatch.setattr(bitgrain, "load_model", load_model, raising=False)
    return calls


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "tiny")
