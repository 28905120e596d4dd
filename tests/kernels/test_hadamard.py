"""Native Walsh-Hadamard transforms against the definition, on every instruction set; which kernel layers run them with."""

from types import SimpleNamespace

import pytest
import torch

from bitgrain.kernels.base import HadamardProblem
from bitgrain.kernels.cpu import library
from bitgrain.kernels.cpu.hadamard import NativeHadamard
from bitgrain.kernels.registry import candidates
from bitgrain.kernels.selection import Policy, select
from bitgrain.layers.builder import BuildOptions, ModelBuilder
from bitgrain.layers.transform import KernelTransform
from bitgrain.weights import NO_ACTIVATION, ChannelScale, DenseWeight, Hadamard, Transformed

needs_library = pytest.mark.skipif(bool(library.missing()), reason=library.missing() or "present")
KERNEL = NativeHadamard()
# (entries per block, order of the base): powers of two below, at and above a vector; bases times widths of 1, 2, 4, 8, 16, 64
SIZES = [(1, 1), (2, 1), (4, 1), (8, 1), (64, 1), (128, 1), (4096, 1), (12, 12), (24, 12), (48, 12), (96, 12), (20 * 16, 20), (28 * 64, 28), (172 * 4, 172)]


def signs(order, seed=0):
    """[order, order] of +-1, not symmetric."""
    return None if order == 1 else torch.randint(0, 2, (order, order), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def transform_of(size, order, transpose=False):
    return Hadamard(size, signs(order), size**-0.5, transpose)


@pytest.fixture(params=library.available_sets())
def isa(request):
    before = library.instruction_set()
    library.choose_instruction_set(request.param)
    yield request.param
    library.choose_instruction_set(before)


@needs_library
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("size", "order"), SIZES)
def test_transform_agrees_with_the_definition(size, order, transpose, isa):
    transform = transform_of(size, order, transpose)
    for rows, blocks in ((1, 1), (5, 3), (64, 1)):
        x = torch.randn(rows, size * blocks, generator=torch.Generator().manual_seed(rows))
        got, want = KERNEL.apply(x, KERNEL.prepare(transform)), transform.apply(x.double())
        if order == 1:
            assert torch.equal(got, transform.apply(x))  # the same sums
        assert torch.allclose(got.double(), want, atol=2e-6 * want.abs().max().item() + 1e-30, rtol=0)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("size", "order"), [(4, 1), (1024, 1), (24, 12), (28 * 8, 28)])
def test_sixteen_bit_values_are_widened_and_rounded_once(size, order, dtype, isa):
    transform = transform_of(size, order)
    x = torch.randn(7, 2 * size, generator=torch.Generator().manual_seed(4)).to(dtype)
    got, want = KERNEL.apply(x, KERNEL.prepare(transform)), transform.apply(x)
    assert got.dtype == dtype
    if order == 1:
        assert torch.equal(got, want)
    step = 2.0 ** (-7 if dtype == torch.bfloat16 else -10)  # sums in another order may round to the neighbour
    assert bool(((got.float() - want.float()).abs() <= step * want.float().abs() + 1e-6).all())


@needs_library
def test_infinities_and_nans_come_through(isa):
    x = torch.zeros(2, 64, dtype=torch.bfloat16)
    x[0, 3], x[1, 5] = float("inf"), float("nan")
    got = KERNEL.apply(x, KERNEL.prepare(transform_of(64, 1)))
    assert bool(got[0].isinf().any()) and bool(got[1].isnan().all())


@needs_library
def test_result_does_not_depend_on_threads_or_on_other_rows(isa):
    prepared = KERNEL.prepare(transform_of(28 * 64, 28))
    x = torch.randn(37, 28 * 64, generator=torch.Generator().manual_seed(6))
    whole, threads = KERNEL.apply(x, prepared), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(KERNEL.apply(x, prepared), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(KERNEL.apply(x[11:12], prepared), whole[11:12])


@needs_library
def test_strided_values_and_no_values():
    prepared, x = KERNEL.prepare(transform_of(64, 1)), torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(8))
    turned = x.transpose(0, 1)
    assert torch.equal(KERNEL.apply(turned, prepared), KERNEL.apply(x, prepared).transpose(0, 1))
    assert tuple(KERNEL.apply(torch.empty(0, 64), prepared).shape) == (0, 64)


@needs_library
def test_native_kernel_is_chosen_and_can_be_forbidden():
    problem = HadamardProblem(896, 28, "bfloat16")
    assert select(problem, "cpu", Policy()).kernel.name == "cpu.hadamard"
    assert select(problem, "cpu", Policy(forbid=frozenset({"cpu"}))).kernel.name == "reference.hadamard"
    assert "power of two" in KERNEL.refusal(HadamardProblem(84, 28, "bfloat16")).reason


def test_floor_takes_every_size_on_every_platform():
    (floor,) = candidates("hadamard", "some other platform")
    assert floor.rank == 0 and floor.refusal(HadamardProblem(84, 28, "bfloat16")) is None
    transform, x = transform_of(24, 12), torch.randn(2, 24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(floor.apply(x, floor.prepare(transform)), transform.apply(x))


def built(transforms, outputs, policy):
    """(weight, layer, builder) of a dense weight [24, 64] between transforms."""
    generator = torch.Generator().manual_seed(9)
    weight = Transformed(DenseWeight(torch.randn(24, 64, generator=generator)), transforms, outputs=outputs)
    reader = SimpleNamespace(plan=SimpleNamespace(fusions=[]))
    builder = ModelBuilder(reader, None, BuildOptions(torch.float32, torch.device("cpu"), "cpu", policy=policy))
    return weight, builder.prepared("layer", weight, NO_ACTIVATION, torch.ones(24)), builder


@needs_library
@pytest.mark.parametrize(("policy", "kernel"), [(Policy(), "cpu.hadamard"), (Policy(require="native"), "cpu.hadamard"), (Policy(force={"hadamard": "reference.hadamard"}), "reference.hadamard")])
def test_layers_run_transforms_by_the_chosen_kernel(policy, kernel):
    inputs = (ChannelScale(torch.linspace(0.5, 2.0, 64)), transform_of(64, 1))
    weight, layer, builder = built(inputs, (transform_of(24, 12, transpose=True),), policy)
    ran = [t.kernel.name for t in (*layer.transforms, *layer.outputs) if isinstance(t, KernelTransform)]
    assert ran == [kernel, kernel]
    assert {label: s.kernel.name for label, s in builder.selections.items() if "Hadamard" in label} == {"layer input, Hadamard of 64": kernel, "layer output, Hadamard of 24": kernel}
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(10))
    assert torch.allclose(layer(x), x @ weight.effective().T + 1, atol=1e-4)
    assert layer.nbytes >= 4 * (24 * 64 + 64 + 12 * 12)
