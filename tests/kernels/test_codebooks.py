"""Native codebook products: every setting on every instruction set, against the definition in float64."""

from dataclasses import replace

import pytest
import torch

from bitgrain.conformance.tolerances import allowed
from bitgrain.kernels.base import LinearProblem
from bitgrain.kernels.cpu import library
from bitgrain.kernels.cpu.codebook import CODEBOOK_KERNELS, lattice_tables
from bitgrain.kernels.selection import Policy, select
from bitgrain.kernels.selftest import self_test
from bitgrain.numerics.e8_lattice import e8p_codebook
from bitgrain.weights import NO_ACTIVATION
from bitgrain.weights.additive import additive_spec
from bitgrain.weights.codebook import codebook_spec
from bitgrain.weights.lattice import lattice_spec
from bitgrain.weights.synthetic import block_of, sample_weight
from bitgrain.weights.trellis import trellis_spec
from bitgrain.weights.vector_codebook import VectorSizes, vector_spec

needs_library = pytest.mark.skipif(bool(library.missing()), reason=library.missing() or "present")
BY_KIND = {kernel.kind: kernel for kernel in CODEBOOK_KERNELS}
SETS = library.available_sets()

ADDITIVE = [
    additive_spec(1, 16, (1, 8), "float16"),
    additive_spec(2, 8, (1, 8), "bfloat16"),
    additive_spec(4, 8, (2, 8), "float32"),
    additive_spec(3, 9, (1, 16), "float16"),
    additive_spec(2, 12, (1, 24), "float32"),
    additive_spec(2, 8, (1, 4), "float16"),  # entries that end inside a vector of the kernel
    additive_spec(5, 10, (4, 6), "bfloat16"),
]
LATTICE = [lattice_spec(bits) for bits in (2, 3, 4)]
TRELLIS = [
    *(trellis_spec(bits, decoder, 16, 1, order=order) for bits in (1, 2, 3, 4, 8) for decoder in ("1mad", "2mad", "3inst") for order in ("rows", "fragments")),
    *(trellis_spec(bits, "quantlut_sym", 16, 2, 9, order) for bits in (2, 3, 4) for order in ("rows", "fragments")),
    *(trellis_spec(bits, "lut", window, step, window, order) for bits, window, step in ((2, 10, 2), (3, 16, 1), (1, 12, 4), (2, 18, 8)) for order in ("rows", "fragments")),
    trellis_spec(3, "quantlut", 16, 1, 7),
    trellis_spec(2, "quantlut", 20, 2, 16, "fragments"),
]
VECTORS = [
    vector_spec(VectorSizes(8, 65536, 256), "float16", zero=True),
    vector_spec(VectorSizes(8, 256, 16, 2, 4, 64), "float16", zero=True),  # groups, residual, outliers
    vector_spec(VectorSizes(16, 1024, 300, 1, 16, 32), "bfloat16", zero=True),
    vector_spec(VectorSizes(6, 4096, 0, 4, 12, 1000), "float32"),
    vector_spec(VectorSizes(12, 300, 70, 3)),
    vector_spec(VectorSizes(4, 500)),
]
LOOKUP = [*(codebook_spec(bits, group) for bits in range(1, 9) for group in (64, 0)), codebook_spec(4, 12, "bfloat16"), codebook_spec(4, 40), codebook_spec(3, 8, "float16")]
EVERY = [*ADDITIVE, *LATTICE, *TRELLIS, *VECTORS, *LOOKUP]
# one row, few, several tiles; more than one chunk of K and more than one block of N; odd sizes
SHAPES = [(1, 64, 128), (3, 37, 1117), (17, 83, 2060)]


def label(value):
    return value.describe().replace(" ", "-") if hasattr(value, "describe") else str(value)


def sampled(spec, n, k, seed=0):
    """A weight of about [n, k], at least one block."""
    rows, columns = block_of(spec)
    return sample_weight(spec, -(-n // rows) * rows, -(-k // columns) * columns, seed)


def prepared(spec, n, k):
    weight = sampled(spec, n, k)
    return BY_KIND[spec.kind], BY_KIND[spec.kind].prepare(weight, NO_ACTIVATION), weight


def assert_product(kernel, held, weight, m, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed + m)
    x = torch.randn(m, weight.shape[1], generator=generator).to(dtype)
    bias = torch.randn(weight.shape[0], generator=generator).to(dtype) if m != 3 else None
    got = kernel.apply(x, held, bias)
    want = x.double() @ weight.dequantize().double().T + (0 if bias is None else bias.double())
    assert got.dtype == dtype and got.shape == want.shape
    worst = ((got.double() - want).abs() / want.abs().amax(1, keepdim=True)).max().item()
    assert worst <= allowed(str(dtype).removeprefix("torch."), "exact"), f"M = {m}: {worst:.2g}"


@pytest.fixture(params=SETS)
def isa(request):
    before = library.instruction_set()
    library.choose_instruction_set(request.param)
    yield request.param
    library.choose_instruction_set(before)


@needs_library
@pytest.mark.parametrize("spec", EVERY, ids=label)
def test_every_setting_agrees_with_the_definition(spec, isa):
    for m, n, k in SHAPES:
        assert_product(*prepared(spec, n, k), m, torch.float32)


ONE_OF_EACH = [ADDITIVE[0], LATTICE[2], TRELLIS[8], TRELLIS[31], VECTORS[1], codebook_spec(4, 64)]


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=label)
def test_sixteen_bit_inputs_and_outputs(spec, dtype, isa):
    held = prepared(spec, 45, 1030)
    for m in (1, 4, 33):
        assert_product(*held, m, dtype)


@needs_library
@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=label)
def test_every_number_of_rows_up_to_a_chunk_of_tokens(spec):
    held = prepared(spec, 40, 256)
    for m in (2, 5, 6, 7, 8, 64, 130):
        assert_product(*held, m, torch.float32)


@needs_library
@pytest.mark.parametrize("spec", [*ONE_OF_EACH, ADDITIVE[5], VECTORS[5]], ids=label)
def test_result_does_not_depend_on_threads_or_on_other_rows(spec, isa):
    kernel, held, weight = prepared(spec, 100, 1500)
    x = torch.randn(19, weight.shape[1], generator=torch.Generator().manual_seed(5)).bfloat16().float()
    whole, threads = kernel.apply(x, held, None), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(kernel.apply(x, held, None), whole)
    finally:
        torch.set_num_threads(threads)
    for rows in (1, 2, 3, 5, 8):
        assert torch.equal(kernel.apply(x[:rows], held, None), whole[:rows])
    assert torch.equal(kernel.apply(x[7:8], held, None), whole[7:8])


@needs_library
@pytest.mark.parametrize("bits", [1, 3, 4, 6, 8])
def test_table_of_each_row(bits, isa):
    weight = sample_weight(codebook_spec(bits, 32), 37, 200)
    weight = replace(weight, table=torch.randn(37, 1 << bits, generator=torch.Generator().manual_seed(2)))
    for m in (1, 5):
        assert_product(BY_KIND["codebook"], BY_KIND["codebook"].prepare(weight, NO_ACTIVATION), weight, m, torch.float32)


@needs_library
def test_books_of_different_types_are_read_exactly(isa):
    weight = sample_weight(VECTORS[1], 40, 200)
    weight = replace(weight, residual_centroids=weight.residual_centroids.float(), outlier_centroids=weight.outlier_centroids.bfloat16())
    assert_product(BY_KIND["vector_codebook"], BY_KIND["vector_codebook"].prepare(weight, NO_ACTIVATION), weight, 2, torch.float32)


@needs_library
def test_all_columns_are_outliers(isa):
    weight = sample_weight(VECTORS[1], 40, 64)
    codes = torch.randint(0, 64, (10, 64), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    none = weight.codes[:, :0].contiguous()
    weight = replace(weight, codes=none, residual_codes=none, group_index=weight.group_index[:0], outlier_codes=codes, outlier_columns=torch.arange(64))
    assert_product(BY_KIND["vector_codebook"], BY_KIND["vector_codebook"].prepare(weight, NO_ACTIVATION), weight, 2, torch.float32)


def test_lattice_tables_give_every_code():
    magnitudes, signs, shifts = lattice_tables()
    flipped = (magnitudes.view(torch.int32)[:, None] ^ signs[None]).view(torch.float32)
    assert torch.equal((flipped + shifts[None, :, None]).view(-1, 8), e8p_codebook())


@needs_library
@pytest.mark.parametrize("spec", [additive_spec(2, 8, (1, 8), "float16"), *LATTICE, TRELLIS[2], TRELLIS[30], VECTORS[1], codebook_spec(4, 64)], ids=label)
def test_prepared_weight_stays_near_its_stored_size(spec):
    weight = sample_weight(spec, 1024, 1024)
    assert BY_KIND[spec.kind].prepare(weight, NO_ACTIVATION).nbytes <= 1.05 * weight.nbytes + 40_000  # tables


@needs_library
@pytest.mark.parametrize("spec", EVERY, ids=label)
def test_native_kernel_is_chosen_after_its_self_test(spec, monkeypatch, tmp_path):
    monkeypatch.setenv("BITGRAIN_CACHE", str(tmp_path))
    n, k = sampled(spec, 96, 520).shape
    kernel, problem = BY_KIND[spec.kind], LinearProblem(spec, NO_ACTIVATION, n, k, "bfloat16")
    assert self_test(kernel, problem) is None
    chosen = select(problem, "cpu", Policy()).kernel.name
    assert chosen == kernel.name


@needs_library
def test_self_test_notices_a_wrong_kernel(monkeypatch, tmp_path):
    from bitgrain.kernels import selftest

    monkeypatch.setenv("BITGRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(selftest, "_results", {})
    selftest._stored.cache_clear()

    class Halved(type(BY_KIND["lattice"])):
        name = "test.halved"

        def apply(self, x, prepared, bias):
            return super().apply(x, prepared, bias) / 2

    for spec in (LATTICE[0], LATTICE[2]):
        refusal = self_test(Halved(), LinearProblem(spec, NO_ACTIVATION, 64, 64, "float32"))
        assert refusal is not None and "differs from the reference" in refusal.reason


@needs_library
def test_settings_beyond_the_kernel_are_refused_and_run_by_the_floor():
    for spec, text in ((trellis_spec(1, "lut", 16, 16, 16), "16"), (trellis_spec(9, "1mad", 16, 1), "9")):
        problem = LinearProblem(spec, NO_ACTIVATION, 64, 64, "float32")
        assert text in BY_KIND["trellis"].refusal(problem).reason
        assert select(problem, "cpu", Policy()).kernel.name == "reference.linear"
    assert "takes lattice weights" in BY_KIND["lattice"].refusal(LinearProblem(ADDITIVE[0], NO_ACTIVATION, 64, 64, "float32")).reason


@needs_library
@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=label)
def test_no_rows_and_strided_rows(spec):
    kernel, held, weight = prepared(spec, 32, 64)
    n, k = weight.shape
    assert tuple(kernel.apply(torch.empty(0, k), held, None).shape) == (0, n)
    wide = torch.randn(4, 2 * k, generator=torch.Generator().manual_seed(3))
    assert torch.equal(kernel.apply(wide[:, :k], held, None), kernel.apply(wide[:, :k].contiguous(), held, None))


@needs_library
@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=label)
def test_fake_tensors_carry_shapes_through_the_operators(spec):
    from torch._subclasses.fake_tensor import FakeTensorMode

    kernel, held, weight = prepared(spec, 48, 64)
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(tensor) for name, tensor in held.tensors.items()}
        y = kernel.apply(torch.empty(7, weight.shape[1], dtype=torch.bfloat16), replace(held, tensors=fakes), None)
    assert tuple(y.shape) == (7, weight.shape[0]) and y.dtype == torch.bfloat16
