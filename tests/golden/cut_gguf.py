"""Cut one module out of a GGUF fixture into a golden case of a few kilobytes.

Usage: cut_gguf.py FIXTURE MODULE TARGET

The tensor's bytes, the model's metadata (the tokenizer left out) and the golden row and SHA-256 are the fixture's own.  Of a
stack of experts the first is kept, so MODULE is one of experts.0.
"""

import json
import sys
from math import prod
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from bitgrain.checkpoint.files import open_files
from bitgrain.formats.detect import gather_evidence
from bitgrain.formats.gguf import GGUFConfig
from tests.unit.checkpoint.gguf_bytes import Packed, write_gguf


def cut(fixture: Path, module: str, target: Path) -> None:
    """Write model.gguf, golden.safetensors and case.json of one module."""
    case = json.loads((fixture / "case.json").read_text())
    files = open_files(fixture / case["checkpoint"])
    config = GGUFConfig.parse(gather_evidence(files))
    tensors = {}
    for name, part in config.parts(files.tensors, None).items():
        if name.rpartition(".")[0] == module:
            header = files.tensors[part.source]
            shape = (1, *header.shape[1:]) if len(header.shape) == 3 else header.shape
            data = files.read(part.source).contiguous().view(-1).numpy().tobytes()
            tensors[part.source] = Packed(header.dtype, shape, data[: len(data) * prod(shape) // header.numel])
    target.mkdir(parents=True, exist_ok=True)
    metadata = {k: v for k, v in files.properties.items() if not k.startswith(("tokenizer.", "quantize."))}
    write_gguf(target / "model.gguf", metadata, tensors)
    key = f"weight/{module}.weight"
    with safe_open(str(fixture / "golden.safetensors"), "pt") as golden:
        save_file({key: golden.get_tensor(key)}, str(target / "golden.safetensors"))
    facts = {k: case[k] for k in ("producer", "producer_version", "family")}
    checks = [c for c in case["checks"] if c.get("name") == f"{module}.weight"]
    text = {"name": target.name, **facts, "cut_from": fixture.name, "files": ["model.gguf"], "checks": checks}
    (target / "case.json").write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    cut(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
