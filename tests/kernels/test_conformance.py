"""The conformance suite over every registered kernel: on this machine all of it, on every instruction set; of simulated devices a part."""

import pytest
import torch

from bitgrain.conformance.cases import Depth, cases, experts_problem, thinned
from bitgrain.conformance.checks import check
from bitgrain.conformance.grid import ACTIVATIONS, BLOCKED, WEIGHTS
from bitgrain.conformance.suite import OPERATIONS, run_kernel
from bitgrain.kernels.base import Fidelity, LinearProblem
from bitgrain.kernels.cpu import library
from bitgrain.kernels.registry import candidates, kernel_entries, operations
from bitgrain.kernels.samples import sample_experts, sample_routing
from bitgrain.platforms.probe import counting_on, generations, present, probe
from bitgrain.weights import NO_ACTIVATION

SETS = library.available_sets()
# held to the bits of a model's modules instead: test_decode_step
WHOLE_STEPS = {"decode_step"}
HERE = [(o, kernel) for o in operations() if o not in WHOLE_STEPS for kernel in candidates(o, "cpu")]
# experts are two linears, which their own cases hold to the definition: of the floor, one case of each weight
DEPTHS = {"reference.experts": Depth.SLICE}
# of a kernel that runs in an interpreter, or on models of operators
MOST = 8


def simulated():
    """(platform, operation, kernel) of each class of kernels once, on the first of the platforms that it is registered for."""
    seen, found = set(), []
    for key in ("cuda", "npu", "xpu", "hip"):
        for operation, platform, kernel in kernel_entries():
            if platform == key and (operation, type(kernel)) not in seen:
                seen.add((operation, type(kernel)))
                found.append((key, operation, kernel))
    return found


def name_of(value):
    return value.name if hasattr(value, "rank") else str(value)


def assert_conforms(result):
    print(f"{result.operation} {result.kernel}: {result.cases} cases, {result.refused} refused, worst {result.error:.2g} of what is allowed, {result.seconds:.1f} s")
    assert not result.failed, "\n".join(result.failures)
    if result.cases == 0:
        pytest.skip(f"{result.kernel} {result.note}")


def test_every_operation_has_a_definition():
    assert set(operations()) == set(OPERATIONS) | WHOLE_STEPS
    assert all(any(True for _ in cases(operation, "cpu")) for operation in OPERATIONS)


@pytest.mark.parametrize(("operation", "kernel"), HERE, ids=name_of)
def test_kernel_agrees_with_the_definition_over_its_domain(operation, kernel):
    assert_conforms(run_kernel(operation, kernel, probe("cpu").platform, DEPTHS.get(kernel.name, Depth.FULL)))


@pytest.fixture
def instruction_set(request):
    before = library.instruction_set()
    library.choose_instruction_set(request.param)
    yield request.param
    library.choose_instruction_set(before)


@pytest.mark.skipif(not SETS, reason=library.missing() or "no instruction set")
@pytest.mark.parametrize("instruction_set", [s for s in SETS if s != library.instruction_set()], indirect=True)
@pytest.mark.parametrize(("operation", "kernel"), [(o, k) for o, k in HERE if k.name.startswith("cpu.") and o != "embedding"], ids=name_of)
def test_other_instruction_sets_agree_as_well(operation, kernel, instruction_set):
    assert library.instruction_set() == instruction_set
    if operation == "experts":
        return assert_conforms(run_kernel(operation, kernel, probe("cpu").platform, Depth.SLICE))
    # emulated activations change the input only, before any instruction set is involved; test_row_tiles runs one of each
    accepted = [c for c in cases(operation, "cpu") if kernel.refusal(c.problem) is None]
    inner = [c for c in thinned(accepted, Depth.FULL) if c.problem.dtype != "float16" and kernel.fidelity(c.problem) is not Fidelity.EMULATED]
    wrong = [f"{case.describe()}: {outcome.problem}" for case in inner if (outcome := check(kernel, case, "cpu")).problem]
    assert inner and not wrong, "\n".join(wrong[:5])


@pytest.mark.parametrize(("platform", "operation", "kernel"), simulated(), ids=name_of)
def test_kernel_of_a_simulated_device_agrees_with_the_definition(platform, operation, kernel):
    # what a device lacks, one of another generation may have
    for request in (f"{platform}@host", *(f"{platform}:{generation}@host" for generation in generations(platform))):
        with counting_on(request):
            result = run_kernel(operation, kernel, present(request), Depth.SLICE, most=MOST)
        if result.cases:
            break
    assert_conforms(result)


def test_floor_refuses_nothing_and_says_when_it_emulates():
    linear, experts = (next(k for o, k in HERE if k.name == name) for name in ("reference.linear", "reference.experts"))
    for weight in [*WEIGHTS, *BLOCKED]:
        for activation in ACTIVATIONS:
            expected = Fidelity.EXACT if activation.is_none else Fidelity.EMULATED
            problem = LinearProblem(weight, activation.without_values(), 8, 128, "bfloat16")
            assert linear.refusal(problem) is None and linear.fidelity(problem) is expected
            problem = experts_problem(weight, activation, (128, 64))
            assert experts.refusal(problem) is None and experts.fidelity(problem) is expected
    assert experts.fidelity(experts_problem(WEIGHTS[0], NO_ACTIVATION, (128, 64), down_activation=ACTIVATIONS[1])) is Fidelity.EMULATED


@pytest.mark.parametrize("kernel", [k for o, k in HERE if o == "experts"], ids=name_of)
def test_places_without_an_expert_add_nothing(kernel):
    problem = next(c.problem for c in cases("experts", "cpu") if c.problem.gate_up_activation.is_none and kernel.refusal(c.problem) is None)
    dtype = getattr(torch, problem.dtype)
    prepared = sample_experts(kernel, problem)
    x = torch.randn(4, problem.hidden, generator=torch.Generator().manual_seed(2)).to(dtype)
    weight, chosen = sample_routing(4, problem.count, 2)
    chosen[1, 0], chosen[2] = -1, -1
    got = kernel.apply(x, weight.to(dtype), chosen, prepared)
    assert not got[2].any() and got[[0, 1, 3]].any(1).all()
    only = kernel.apply(x[1:2], weight[1:2, 1:].to(dtype), chosen[1:2, 1:], prepared)
    assert torch.allclose(got[1:2], only, rtol=0, atol=1e-6) if kernel.rank == 0 else torch.equal(got[1:2], only)  # torch's sums depend on the number of rows
    wide = kernel.apply(x, weight, chosen, prepared)  # float32 weights of a 16-bit x
    assert wide.dtype == dtype and torch.allclose(wide, got, rtol=0.02, atol=0.02)
