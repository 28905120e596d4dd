"""Every golden module, as its producer wrote it, through the Triton kernel that selection gives it, in Triton's interpreter.

Interpreter only, not run on hardware.  Modules are cut to a few rows where their packing allows: the interpreter is slow.
"""

import functools
import json

import pytest
import torch

import bitgrain
from bitgrain.checkpoint.files import open_files
from bitgrain.conformance.tolerances import allowed
from bitgrain.errors import ShardError
from bitgrain.formats.base import ModuleKind
from bitgrain.formats.detect import described
from bitgrain.kernels.base import EmbeddingProblem, LinearProblem
from bitgrain.kernels.selection import Policy, select
from bitgrain.kernels.triton import availability
from bitgrain.layers.decoding import ModuleReader
from bitgrain.resolve import ResolveOptions, resolve
from bitgrain.weights import NO_ACTIVATION, Transformed
from tests.golden_checks import GOLDEN

# rows of a module that are enough to meet every part of its packing
FEW_ROWS = 40
# modules that no Triton kernel takes, and what a kernel of their kind of weight says
FLOOR = {}
CASES = sorted(p.parent.name for p in GOLDEN.glob("*/case.json"))

pytestmark = pytest.mark.skipif(
    bool(availability.missing()) or not availability.interpreted(), reason=availability.missing() or "triton compiles for a device here: TRITON_INTERPRET is not 1"
)


@functools.cache
def modules(case):
    """(kind, weight in the basis in which it is stored, activation) of every golden module of a case."""
    folder = GOLDEN / case
    names = sorted({check["name"] for check in json.loads((folder / "case.json").read_text())["checks"]})
    container = folder / "model.gguf"
    if container.is_file():
        files = described(open_files(container))
        reader = ModuleReader(files, resolve(files, None, ResolveOptions()))
    else:
        checkpoint = bitgrain.open_checkpoint(folder)
        reader = ModuleReader(checkpoint.files, checkpoint.plan)
    found = []
    for name in names:
        row = reader.row(name if name in reader.plan.modules else name.rpartition(".")[0])
        if row.kind is not ModuleKind.VECTOR:
            weight, activation, _ = reader.weight(row)
            weight = weight.inner if isinstance(weight, Transformed) else weight
            found.append((row.kind, cut(weight), NO_ACTIVATION if row.kind is ModuleKind.EMBEDDING else activation))
    return found


def cut(weight):
    """Few rows of a weight, or all where a row cannot be cut off."""
    n = weight.shape[0]
    for count in range(n // 8, 1, -1):
        if n % count == 0 and n // count <= FEW_ROWS:
            try:
                return weight.shard(0, count - 1, count)
            except ShardError:
                continue
    return weight


def selected(kind, weight, activation, dtype):
    problem = (
        EmbeddingProblem(weight.spec, *weight.shape, dtype)
        if kind is ModuleKind.EMBEDDING
        else LinearProblem(weight.spec, activation.without_values(), *weight.shape, dtype)
    )
    # library kernels would take some; an unquantized matrix is theirs
    forbidden = frozenset() if weight.spec.kind == "dense" else frozenset({"torch", "cuda"})
    return select(problem, "cuda", Policy(self_test=False, forbid=forbidden))


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch):
    monkeypatch.setenv("BITGRAIN_PLATFORM", "cuda@host")


@pytest.mark.parametrize("case", CASES)
def test_golden_module_runs_in_triton(case):
    for place, (kind, weight, activation) in enumerate(modules(case)):
        dtype = ("float32", "bfloat16", "float16")[(CASES.index(case) + place) % 3]
        selection = selected(kind, weight, activation, dtype)
        if selection.kernel.rank == 0:
            assert case in FLOOR, f"no Triton kernel: {[(c.name, c.reason) for c in selection.candidates]}"
            assert any(FLOOR[case] in c.reason for c in selection.candidates), [c.reason for c in selection.candidates]
            continue
        assert case not in FLOOR, f"{selection.kernel.name} takes it: take it off the list"
        agrees(selection, weight, activation, dtype)


def agrees(selection, weight, activation, dtype):
    kernel, kind = selection.kernel, getattr(torch, dtype)
    prepared = kernel.prepare(weight, activation)
    want = weight.dequantize().double()
    if selection.problem.operation == "embedding":
        index = torch.arange(weight.shape[0] - 1, -1, -2)
        assert torch.equal(kernel.apply(index, prepared, kind), want[index].to(kind))
        return
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(kind)
    got = kernel.apply(x, prepared, None).double()
    want = activation.fake_quantize(x).double() @ want.T
    worst = ((got - want).abs() / want.abs().amax(1, keepdim=True)).max().item()
    assert worst <= allowed(dtype, selection.fidelity.value), f"{kernel.name}, {selection.problem.describe()}: {worst:.2g}"


def test_most_golden_modules_are_met():
    met = sum(len(modules(case)) for case in CASES)
    assert met >= 100 and len(FLOOR) < met // 4
