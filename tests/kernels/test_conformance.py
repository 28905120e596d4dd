"""Every registered kernel over its declared domain against the definition in float64, on every instruction set of this machine."""

import pytest
import torch

from bitgrain.conformance.grid import ACTIVATIONS, BLOCKED, DTYPES, WEIGHTS, shapes_of
from bitgrain.conformance.tolerances import allowed
from bitgrain.kernels.base import EmbeddingProblem, Fidelity, LinearProblem
from bitgrain.kernels.cpu import library
from bitgrain.kernels.registry import kernel_entries
from bitgrain.weights import NO_ACTIVATION
from bitgrain.weights.synthetic import sample_weight

LINEAR = [kernel for operation, _, kernel in kernel_entries() if operation == "linear"]
SETS = library.available_sets()


def describe(spec):
    return spec.describe().replace(" ", "-")


def cases(kernel):
    """Problems of the grid that the kernel does not refuse, with their weight and activation."""
    for weight in [*WEIGHTS, *BLOCKED]:
        for activation in ACTIVATIONS:
            for dtype in DTYPES:
                for m, n, k in shapes_of(weight):
                    problem = LinearProblem(weight, activation.without_values(), n, k, dtype)
                    if kernel.refusal(problem) is None:
                        yield problem, activation, m


def check(kernel, problem, activation, m):
    weight = sample_weight(problem.weight, problem.n, problem.k)
    dtype = getattr(torch, problem.dtype)
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, problem.k, generator=generator).to(dtype)
    bias = torch.randn(problem.n, generator=generator).to(dtype) if m != 3 else None
    got = kernel.apply(x, kernel.prepare(weight, activation), bias)
    assert got.dtype == dtype and tuple(got.shape) == (m, problem.n)
    want = activation.fake_quantize(x).double() @ weight.dequantize().double().T
    want = want if bias is None else want + bias.double()
    worst = ((got.double() - want).abs() / want.abs().amax(1, keepdim=True)).max().item()
    assert worst <= allowed(problem.dtype, kernel.fidelity(problem).value), f"{problem.describe()}, M = {m}: {worst:.2g}"


@pytest.mark.parametrize("kernel", LINEAR, ids=lambda k: k.name)
def test_kernel_agrees_with_the_definition_over_its_domain(kernel):
    count = 0
    for problem, activation, m in cases(kernel):
        check(kernel, problem, activation, m)
        count += 1
    if count == 0:
        reasons = {kernel.refusal(LinearProblem(w, a.without_values(), 64, 128, "float32")).reason for w in WEIGHTS for a in ACTIVATIONS}
        pytest.skip(f"{kernel.name} refuses everything here: {'; '.join(sorted(reasons)[:3])}")


@pytest.fixture
def instruction_set(request):
    before = library.instruction_set()
    library.choose_instruction_set(request.param)
    yield request.param
    library.choose_instruction_set(before)


@pytest.mark.skipif(not SETS, reason=library.missing() or "no instruction set")
@pytest.mark.parametrize("instruction_set", [s for s in SETS if s != library.instruction_set()], indirect=True)
@pytest.mark.parametrize("kernel", [k for k in LINEAR if hasattr(k, "build")], ids=lambda k: k.name)
def test_other_instruction_sets_agree_as_well(kernel, instruction_set):
    assert library.instruction_set() == instruction_set
    # emulated activations change the input only, before any instruction set is involved; test_row_tiles runs one of each
    inner = [c for c in cases(kernel) if c[0].dtype != "float16" and kernel.fidelity(c[0]) is not Fidelity.EMULATED]
    checked = [check(kernel, *case) for case in inner]
    assert checked


def test_floor_refuses_nothing():
    floor = next(k for k in LINEAR if k.name == "reference.linear")
    for weight in WEIGHTS:
        for activation in ACTIVATIONS:
            problem = LinearProblem(weight, activation.without_values(), 8, 128, "bfloat16")
            assert floor.refusal(problem) is None
            assert floor.fidelity(problem) is (Fidelity.EXACT if activation.is_none else Fidelity.EMULATED)


EMBEDDING = [kernel for operation, _, kernel in kernel_entries() if operation == "embedding"]


@pytest.mark.parametrize("kernel", EMBEDDING, ids=lambda k: k.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_rows_equal_the_definition(kernel, dtype):
    index = torch.tensor([3, 0, 36, 3])
    taken = 0
    for spec in [*WEIGHTS, *BLOCKED]:
        _, n, k = shapes_of(spec)[1]
        if kernel.refusal(EmbeddingProblem(spec, n, k, dtype)) is None:
            weight = sample_weight(spec, n, k)
            rows = kernel.apply(index, kernel.prepare(weight, NO_ACTIVATION), getattr(torch, dtype))
            assert torch.equal(rows, weight.dequantize()[index].to(getattr(torch, dtype)))
            taken += 1
    assert taken >= 3
