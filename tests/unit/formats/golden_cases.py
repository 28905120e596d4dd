"""Checkpoints with golden weights: whole fixtures beside the repository, and single modules cut from them in tests/golden."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bitgrain.checkpoint.headers import TensorHeader
from bitgrain.formats.base import ModuleKind, ModuleView
from bitgrain.formats.evidence import Evidence

ROOT = Path(__file__).resolve().parents[3]
FIXTURES = ROOT.parent / "shared" / "fixtures"
GOLDEN = ROOT / "tests" / "golden"


class Case:
    """One checkpoint folder: configuration, headers, data, and its golden weights."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.facts = json.loads((folder / "case.json").read_text())
        self.config = json.loads((folder / "config.json").read_text())
        self.sidecars = {
            n: json.loads((folder / n).read_text()) for n in ("quantization_config.json", "quantize_config.json", "quant_config.json") if (folder / n).is_file()
        }
        self.files = [safe_open(str(folder / n), "pt") for n in self.facts["files"] if n.endswith(".safetensors")]
        self.owner = {name: file for file in self.files for name in file.keys()}  # noqa: SIM118 (the reader is no dict)
        self.headers = {name: self._header(name) for name in self.owner}

    def _header(self, name: str) -> TensorHeader:
        part = self.owner[name].get_slice(name)
        return TensorHeader(name, part.get_dtype(), tuple(part.get_shape()), "model.safetensors", 0, 0)

    def evidence(self, **changes) -> Evidence:
        config = {**self.config, **changes}
        suffixes: dict[str, str] = {}
        for name in self.headers:
            suffixes.setdefault(name.rpartition(".")[2], name)
        section = config.get("quantization_config") or config.get("compression_config")
        return Evidence(config, section, self.sidecars, self.headers, suffixes)

    def weights(self) -> list[str]:
        """Names of all weights that have golden data."""
        return sorted({c["name"] for c in self.facts["checks"] if c["type"] in ("weight", "sha256")})

    def module(self, name: str, shape=None) -> ModuleView:
        """The view of module `name` as resolution would make it."""
        tensors = {n.removeprefix(f"{name}."): h for n, h in self.headers.items() if n.rpartition(".")[0] == name}
        last = name.rpartition(".")[2]
        kind = ModuleKind.LM_HEAD if last == "lm_head" else ModuleKind.EMBEDDING if last == "embed_tokens" else ModuleKind.LINEAR
        return ModuleView(name, ModuleKind.EXPERT if ".experts." in name else kind, tensors, shape)

    def data(self, module: ModuleView) -> dict[str, torch.Tensor]:
        return {local: self.owner[h.name].get_tensor(h.name) for local, h in module.tensors.items()}

    def check(self, name: str, got: torch.Tensor) -> int:
        """Compare a decoded weight with all golden data of it; returns the number of comparisons."""
        done = 0
        for check in self.facts["checks"]:
            if check.get("name") != name:
                continue
            done += 1
            if check["type"] == "sha256":
                assert hashlib.sha256((got + 0.0).numpy().tobytes()).hexdigest() == check["of"], name
                continue
            with safe_open(str(self.folder / "golden.safetensors"), "pt") as golden:
                want = golden.get_tensor(f"weight/{name}")
            mine = got if check["rows"] == "all" else got[check["rows"]]
            if check["exact"]:
                assert torch.equal(mine, want), name
            else:
                torch.testing.assert_close(mine, want, rtol=check["rtol"], atol=check["atol"])
        return done


def fixture_cases(*families: str, only=lambda name: True) -> list:
    """Parameters for every shared fixture of the families; one that skips with its reason if there are none."""
    folders = sorted(p.parent for p in FIXTURES.glob("*/case.json")) if FIXTURES.is_dir() else []
    found = [f for f in folders if json.loads((f / "case.json").read_text())["family"] in families and only(f.name)]
    return [pytest.param(f, id=f.name) for f in found] or [pytest.param(None, marks=pytest.mark.skip(reason="../shared/fixtures is absent"))]


def golden_cases(*families: str) -> list:
    """Parameters for every case in tests/golden of the families."""
    folders = sorted(p.parent for p in GOLDEN.glob("*/case.json"))
    return [pytest.param(f, id=f.name) for f in folders if json.loads((f / "case.json").read_text())["family"] in families]


def problems_of(scheme, module: ModuleView) -> list[str]:
    """What the header comparison finds: missing, undeclared, wrong type, wrong shape."""
    rules = {rule.name: rule for rule in (*scheme.tensors(), scheme.bias_rule())}
    found = [f"missing {n}" for n, r in rules.items() if r.required and n not in module.tensors]
    for local, header in module.tensors.items():
        rule = rules.get(local)
        if rule is None:
            found.append(f"undeclared {local}")
        elif header.dtype not in rule.dtypes:
            found.append(f"dtype {local}")
        elif not rule.allows_shape(header.shape):
            found.append(f"shape {local}")
    return found


def decode_all(case: Case, config) -> int:
    """Decode every golden weight through scheme, header comparison, to_weight and dequantize; returns comparisons made."""
    done = 0
    for name in case.weights():
        module = case.module(name.removesuffix(".weight"))
        choice = config.decide(module)
        scheme, data = choice.scheme, case.data(module)
        assert problems_of(scheme, module) == [], name
        weight = scheme.to_weight(data)
        assert weight.spec == scheme.weight_spec
        assert weight.shape == scheme.shape
        got = weight.dequantize()
        # what the architecture would say must not change anything
        told = config.decide(case.module(module.name, scheme.shape)).scheme
        assert told == scheme
        done += case.check(name, got)
    return done
