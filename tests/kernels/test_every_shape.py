"""Every native kernel of the registry, on every instruction set, over shapes that are multiples of nothing: against the definition, a row
alone against the row in its batch, one thread against several.

A kernel that is registered as cpu.* is covered by itself: its problems are those of the conformance grid that it accepts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product

import pytest
import torch

from bitgrain.conformance import definitions
from bitgrain.conformance.cases import Case, experts_problem
from bitgrain.conformance.checks import check
from bitgrain.conformance.grid import ACTIVATIONS, BLOCKED, DTYPES, WEIGHTS, steps_of
from bitgrain.conformance.tolerances import allowed, allowed_of_experts
from bitgrain.kernels.base import EmbeddingProblem, Fidelity, HadamardProblem, LinearProblem, StepProblem
from bitgrain.kernels.cpu import library
from bitgrain.kernels.cpu.dense import native_rows
from bitgrain.kernels.cpu.step import FEW_ROWS
from bitgrain.kernels.registry import candidates, operations
from bitgrain.kernels.samples import sample_experts, sample_routing
from bitgrain.weights.synthetic import sample_weight

pytestmark = pytest.mark.skipif(bool(library.missing()), reason=library.missing() or "the native library is there")

ROWS = (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 130)
SIZES = (1, 7, 15, 17, 33, 100, 129)
SHAPES = [(SIZES[i % 7], SIZES[(i + i // 7) % 7]) for i in range(49)]  # every N with every K, both changing all the time
KERNELS = [(o, kernel) for o in operations() for kernel in candidates(o, "cpu") if kernel.name.startswith("cpu.")]
# have tests of their own below; decode steps of whole models are in test_decode_step.py
ELSEWHERE = ("linear", "embedding", "experts", "decode_step")


def of(operation):
    return pytest.mark.parametrize("kernel", [k for o, k in KERNELS if o == operation], ids=lambda k: k.name)


@pytest.fixture(params=library.available_sets() or ["none"], autouse=True)
def instruction_set(request):
    before = library.instruction_set()
    library.choose_instruction_set(request.param)
    yield request.param
    library.choose_instruction_set(before)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounded_up(spec, n, k):
    rows, columns = steps_of(spec)
    return -(-n // rows) * rows, -(-k // columns) * columns


def accepted_linears(kernel):
    """(problem, activation): each weight and activation of the grid that the kernel takes, shapes and dtypes in turn, every shape once."""
    found = []
    for spec, activation in product([*WEIGHTS, *BLOCKED], ACTIVATIONS):
        n, k = SHAPES[len(found) % 49]
        for shape in ((n, k), (n, -(-k // 32) * 32), (100, 256)):  # some take whole units in K only
            problem = LinearProblem(spec, activation.without_values(), *rounded_up(spec, *shape), DTYPES[len(found) % 3])
            # emulated activations change x only, before the kernel sees it
            if kernel.refusal(problem) is None and kernel.fidelity(problem) is not Fidelity.EMULATED:
                found.append((problem, activation))
                break
    return [*found, *((LinearProblem(*_with_shape(found, i)), found[i % len(found)][1]) for i in range(len(found), 49))] if found else []


def _with_shape(found, i):
    problem = found[i % len(found)][0]
    n, k = rounded_up(problem.weight, *SHAPES[i])
    return problem.weight, problem.activation, n, -(-k // 32) * 32 if problem.k % 32 == 0 else k, DTYPES[i % 3]


def assert_near(got, want, size, tolerance, what):
    """Relative to the row's largest output, or to an eighth of its largest sum of magnitudes where terms cancel each other."""
    if want.numel():
        smallest = torch.finfo(got.dtype).smallest_normal
        apart = (got.double() - want).abs().amax(-1) / torch.maximum(want.abs(), size / 8).amax(-1).clamp(min=smallest)
        assert float(apart.nan_to_num(nan=9e9).max()) <= tolerance, f"{what}: {float(apart.max()):.3g} apart, {tolerance:.3g} allowed"


def assert_same_with_threads(run, one, what):
    for count in (2, 3):
        torch.set_num_threads(count)
        assert torch.equal(run(), one), f"{what}: other bits with {count} threads"
    torch.set_num_threads(1)


@of("linear")
def test_linear_of_odd_shapes(kernel):
    torch.set_num_threads(1)
    problems = [(p, a) for p, a in accepted_linears(kernel) if kernel.refusal(p) is None]
    assert problems, f"{kernel.name} takes no weight of the grid"
    for turn, (problem, activation) in enumerate(problems):
        what, dtype = f"{kernel.name}: {problem.describe()}", getattr(torch, problem.dtype)
        weight = sample_weight(problem.weight, problem.n, problem.k)
        x, bias, values = random(ROWS[-1], problem.k, dtype=dtype), random(problem.n, dtype=dtype, seed=1) if turn % 2 else None, weight.dequantize().double()
        prepared = kernel.prepare(weight, activation)
        whole = kernel.apply(x, prepared, bias)
        one_scale = activation.granularity == "tensor" and activation.dynamic and not activation.is_none
        torchs = kernel.name == "cpu.dense" and native_rows(dtype) < ROWS[-1]  # its sums depend on the number of rows and of threads
        together = torchs or one_scale
        for rows in ROWS if together else ROWS[:1] + ROWS[-1:]:
            part, got = x[:rows], kernel.apply(x[:rows], prepared, bias)
            size = activation.fake_quantize(part).double().abs() @ values.abs().T
            want = definitions.linear(part, values, activation, bias)
            assert got.shape == (rows, problem.n) and got.dtype == dtype, what
            assert_near(got, want, size, allowed(problem.dtype, kernel.fidelity(problem).value), f"{what}, M = {rows}")
        if not together:
            for place, rows in enumerate(ROWS):
                first = place % 2 * (ROWS[-1] - rows)
                assert torch.equal(kernel.apply(x[first : first + rows], prepared, bias), whole[first : first + rows]), f"{what}: other bits of {rows} rows alone"
        if not torchs:
            assert_same_with_threads(lambda x=x, prepared=prepared, bias=bias: kernel.apply(x, prepared, bias), whole, what)


@of("embedding")
def test_rows_of_odd_tables(kernel):
    heads = ["", *(k.name for o, k in KERNELS if o == "linear")]
    found = 0
    for turn, (spec, head) in enumerate(product([*WEIGHTS, *BLOCKED], heads)):
        n, k = rounded_up(spec, *SHAPES[turn % 49])
        problem = EmbeddingProblem(spec, n, k, DTYPES[turn % 3], head)
        shared = next((linear for _, linear in KERNELS if linear.name == head), None)
        if kernel.refusal(problem) is not None or (shared and shared.refusal(LinearProblem(spec, ACTIVATIONS[0], n, k, problem.dtype))):
            continue
        found += 1
        weight, dtype = sample_weight(spec, n, k), getattr(torch, problem.dtype)
        prepared, values = kernel.prepare(weight, ACTIVATIONS[0]), weight.dequantize().double()
        for rows in ROWS:
            index = (torch.arange(rows) * 7) % n
            got = kernel.apply(index, prepared, dtype)
            assert got.shape == (rows, k) and torch.equal(got.double(), values[index].to(dtype).double()), f"{kernel.name}: {problem.describe()}, M = {rows}"
    assert found, f"{kernel.name} takes no table of the grid"


@of("experts")
def test_experts_of_odd_shapes(kernel):
    torch.set_num_threads(1)
    found = 0
    for turn, spec in enumerate([*WEIGHTS, *BLOCKED]):
        for activation in (ACTIVATIONS[0], ACTIVATIONS[1 + turn % 3]):
            problem = experts_problem(spec, activation, SHAPES[turn % 49], DTYPES[turn % 3], biased=turn % 2 == 1)
            if kernel.refusal(problem) is not None or kernel.fidelity(problem) is Fidelity.EMULATED:
                continue
            found += 1
            what, dtype = f"{kernel.name}: {problem.describe()}", getattr(torch, problem.dtype)
            prepared, x = sample_experts(kernel, problem), random(ROWS[-1], problem.hidden, dtype=dtype)
            weight, chosen = sample_routing(ROWS[-1], problem.count, 2)
            weight = weight.to(dtype)
            whole = kernel.apply(x, weight, chosen, prepared)
            want, size = definitions.experts(problem, x, weight, chosen)
            assert_near(whole, want, 8 * size, allowed_of_experts(problem, kernel.fidelity(problem).value)[1], what)
            for place, rows in enumerate(ROWS):
                part = slice(place % 2 * (ROWS[-1] - rows), place % 2 * (ROWS[-1] - rows) + rows)
                assert torch.equal(kernel.apply(x[part], weight[part], chosen[part], prepared), whole[part]), f"{what}: other bits of {rows} rows alone"
            assert_same_with_threads(lambda x=x, w=weight, c=chosen, p=prepared: kernel.apply(x, w, c, p), whole, what)
    assert found, f"{kernel.name} takes no experts of the grid"


def step_cases(operation, turn, rows):
    """Cases of an operation that is neither a product nor a table; all sizes are odd where they may be."""
    size, other, dtype = SIZES[turn % 7], SIZES[turn // 7 % 7], DTYPES[turn % 3]
    if operation == "hadamard":
        order = (1, 12, 20, 28)[turn % 4]
        yield Case(HadamardProblem(order << turn % 6, order, dtype), rows, options={"blocks": 1 + turn % 3, "transpose": turn % 2 == 1})
    elif operation == "norm":
        yield Case(StepProblem("norm", size * other, dtype), rows, options={"wide": turn % 2 == 1, "float32 weight": turn % 4 == 1, "bias": turn % 3 == 0})
    elif operation == "rotary":
        yield Case(StepProblem("rotary", size + 1, dtype), rows, options={"heads": 1 + turn % 4, "turned": (size + 1) // 2 * 2, "interleaved": turn % 2 == 1})
    elif operation == "gate":
        yield Case(StepProblem("gate", 0, dtype, "silu"), rows, options={"columns": size * other})
    elif operation == "attention":
        groups = 1 + turn % 3
        yield Case(
            StepProblem("attention", other, dtype), rows, options={
                "tokens": rows + turn % 40, "heads": groups * (1 + turn % 2), "groups": groups, "head": size, "value": other,
                "window": (None, 5, 40)[turn % 3], "sinks": turn % 2 == 1, "cap": (None, 3.0)[turn // 2 % 2],
            },
        )  # fmt: skip


@pytest.mark.parametrize(("operation", "kernel"), [(o, k) for o, k in KERNELS if o not in ELSEWHERE], ids=lambda v: getattr(v, "name", ""))
def test_other_operations_of_odd_shapes(operation, kernel):
    torch.set_num_threads(1)
    ran = 0
    for turn, (rows, _) in enumerate(product(ROWS, range(3))):
        for case in step_cases(operation, 5 * turn + rows, rows):
            if kernel.refusal(case.problem) is None and not (operation == "attention" and (rows > FEW_ROWS or case.options["tokens"] == 0)):  # more rows are torch's
                ran += 1
                outcome = check(kernel, case, "cpu")
                assert not outcome.problem, f"{kernel.name}: {case.describe()}: {outcome.problem}"
    assert ran, f"{kernel.name}: no case of {operation} here; add some to step_cases"


ONE_CORE = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
from bitgrain.conformance.grid import int_affine
from bitgrain.kernels.cpu.int_affine import IntAffineLinear
from bitgrain.weights import NO_ACTIVATION
from bitgrain.weights.synthetic import sample_weight
kernel = IntAffineLinear()
prepared = kernel.prepare(sample_weight(int_affine(4, "group", 32), 300, 520), NO_ACTIVATION)
x = torch.randn(70, 520, generator=torch.Generator().manual_seed(0))
before = len(os.listdir("/proc/self/task"))
y = kernel.apply(x, prepared, None)
print(torch.get_num_threads(), len(os.listdir("/proc/self/task")) - before, y.view(torch.int32).sum().item())
"""


def one_core_or_all(code, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=kept | environment)
    assert ran.returncode == 0, ran.stderr
    return [int(word) for word in ran.stdout.split()]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc, cores chosen by Linux")
def test_a_process_with_one_core_starts_no_other_threads_and_gives_the_same_bits(instruction_set):
    threads, started, bits = one_core_or_all(ONE_CORE, BITGRAIN_CPU_ISA=instruction_set)
    assert (threads, started) == (1, 0)
    everywhere = ONE_CORE.replace("os.sched_setaffinity", "(lambda *_: None)")
    assert one_core_or_all(everywhere, BITGRAIN_CPU_ISA=instruction_set)[2] == bits
