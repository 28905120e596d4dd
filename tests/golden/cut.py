"""Cut one module out of a fixture into a golden case of a few kilobytes.

Usage: cut.py FIXTURE MODULE TARGET [EXTRA_TENSOR ...]

The tensors, the configuration and the golden row and SHA-256 are the fixture's own; nothing is computed here.  EXTRA_TENSORs
are kept beside the module's own.  Of golden tensors that would not fit, every fourth row is kept.
"""

import json
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

LARGEST = 40_000  # bytes of golden tensors in one case


def cut(fixture: Path, module: str, target: Path, extra: list[str]) -> None:
    """Write config.json, the sidecars, model.safetensors, golden.safetensors and case.json of one module."""
    case = json.loads((fixture / "case.json").read_text())
    name = f"{module}.weight"
    target.mkdir(parents=True, exist_ok=True)
    tensors, metadata = {}, {}
    for file in (f for f in case["files"] if f.endswith(".safetensors")):
        with safe_open(str(fixture / file), "pt") as source:
            tensors |= {n: source.get_tensor(n) for n in list(source.keys()) if n.startswith(f"{module}.") or n in extra}
            metadata |= source.metadata() or {}
    save_file(tensors, str(target / "model.safetensors"), metadata or None)
    with safe_open(str(fixture / "golden.safetensors"), "pt") as golden:
        kept = [key for key in (f"weight/{name}", f"effective/{name}") if key in list(golden.keys())]
        values = {key: golden.get_tensor(key) for key in kept}
    checks = [c for c in case["checks"] if c.get("name") == name]
    if sum(v.nbytes for v in values.values()) > LARGEST:
        heights = {len(value) for value in values.values()}
        values = {key: value[::4].contiguous() for key, value in values.items()}
        checks = [{**c, "rows": list(range(0, max(heights), 4) if c["rows"] == "all" else c["rows"][::4])} for c in checks]
    save_file(values, str(target / "golden.safetensors"))
    config = json.loads((fixture / "config.json").read_text())
    kept = {k: v for k, v in config.items() if k in ("quantization_config", "compression_config", "quip_params")}
    (target / "config.json").write_text(json.dumps(kept, indent=1) + "\n")
    sidecars = [f for f in case["files"] if f.endswith(".json") and "quant" in f]
    for file in sidecars:
        (target / file).write_text((fixture / file).read_text())
    facts = {k: case[k] for k in ("producer", "producer_version", "family")}
    files = ["config.json", *sidecars, "model.safetensors"]
    (target / "case.json").write_text(json.dumps({"name": target.name, **facts, "cut_from": fixture.name, "files": files, "checks": checks}, indent=1) + "\n")


if __name__ == "__main__":
    cut(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
