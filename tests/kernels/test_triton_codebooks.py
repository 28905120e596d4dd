"""Products with codebook weights in Triton, on host tensors in its interpreter: interpreter only, not run on hardware."""

import pytest
import torch

from bitgrain.conformance.grid import CODES
from bitgrain.conformance.tolerances import allowed
from bitgrain.kernels.base import Fidelity, LinearProblem
from bitgrain.kernels.registry import candidates
from bitgrain.kernels.triton import availability
from bitgrain.kernels.triton.codebooks import CODEBOOK_KERNELS
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, CodebookWeight
from bitgrain.weights.additive import additive_spec
from bitgrain.weights.codebook import codebook_spec
from bitgrain.weights.synthetic import block_of, sample_activation, sample_weight
from bitgrain.weights.vector_codebook import VectorSizes, vector_spec

KERNELS = {kernel.kind: kernel("cuda") for kernel in CODEBOOK_KERNELS}
DTYPES = ["float32", "bfloat16", "float16"]

needs_interpreter = pytest.mark.skipif(
    bool(availability.missing()) or not availability.interpreted(), reason=availability.missing() or "triton compiles for a device here: TRITON_INTERPRET is not 1"
)
pytestmark = needs_interpreter

SPECS = [
    *(codebook_spec(bits, 64) for bits in range(1, 9)),  # every width: one plane, and several
    codebook_spec(4, 128, "bfloat16"), codebook_spec(4, 12, "float16"), codebook_spec(4, 0, "bfloat16"), codebook_spec(3, 20),
    *CODES,
    additive_spec(3, 5, (1, 6), "float16"), additive_spec(2, 16, (3, 4), "float32"),
    vector_spec(VectorSizes(6, 300, 20, 3, 5, 300), "bfloat16"), vector_spec(VectorSizes(12, 4096), zero=True),
]  # fmt: skip


def error(problem, m, weight=None, activation=NO_ACTIVATION, biased=True, x=None):
    """(how far a product is from the float64 definition, relative to the row's largest output; the result)."""
    kernel, dtype = KERNELS[problem.weight.kind], getattr(torch, problem.dtype)
    assert kernel.refusal(problem) is None
    weight = weight or sample_weight(problem.weight, problem.n, problem.k, 3)
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, problem.k, generator=generator).to(dtype) if x is None else x
    bias = torch.randn(problem.n, generator=generator).to(dtype) if biased else None
    got = kernel.apply(x, kernel.prepare(weight, activation), bias)
    assert got.dtype == dtype and tuple(got.shape) == (m, problem.n)
    want = activation.fake_quantize(x).double() @ weight.dequantize().double().T
    want = want if bias is None else want + bias.double()
    return ((got.double() - want).abs() / want.abs().amax(1, keepdim=True)).max().item() if m else 0.0, got


def sizes_of(spec):
    """An odd N and K as far as the weight's blocks let them be."""
    rows, columns = block_of(spec)
    return -(-70 // rows) * rows, -(-150 // columns) * columns


@pytest.mark.parametrize("place", range(len(SPECS)), ids=[f"{s.kind}-{s.describe()}".replace(" ", "-") for s in SPECS])
def test_agrees_with_the_definition(place):
    spec = SPECS[place]
    n, k = sizes_of(spec)
    for turn, m in enumerate((1, 19)):
        dtype = DTYPES[(place + turn) % 3]
        found, _ = error(LinearProblem(spec, NO_ACTIVATION, n, k, dtype), m, biased=turn == 0)
        assert found <= allowed(dtype, "exact"), f"{dtype}, M = {m}: {found:.2g}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_float_tables_keep_their_24_bits(dtype):
    # values that no 16-bit type holds: of 1 - 2^-20, bfloat16 and float16 keep 1
    table = torch.tensor([[1.0, -1.0 + 2.0**-20]])
    weight = CodebookWeight.from_codes(torch.tensor([[0, 1]]).to(torch.uint8), 1, table, torch.ones(1, 1), 2)
    x = torch.ones(1, 2).to(getattr(torch, dtype))
    _, got = error(LinearProblem(weight.spec, NO_ACTIVATION, 1, 2, dtype), 1, weight, biased=False, x=x)
    assert got.item() == 2.0**-20


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("pieces", [True, False])
def test_a_device_without_brain_floats_agrees_too(kind, pieces, monkeypatch):
    from bitgrain.kernels.triton import weight_product

    original = weight_product.multiply
    monkeypatch.setattr(weight_product, "multiply", lambda *a: original(*a[:-1], pieces))
    spec = next(s for s in SPECS if s.kind == kind)
    found, _ = error(LinearProblem(spec, NO_ACTIVATION, *sizes_of(spec), "float16"), 3)
    assert found <= allowed("float16", "exact")


def test_no_rows_give_no_rows():
    assert error(LinearProblem(SPECS[3], NO_ACTIVATION, 33, 64, "bfloat16"), 0)[1].shape == (0, 33)


def test_a_row_does_not_depend_on_the_others_and_splits_add_up_in_order(monkeypatch):
    from bitgrain.kernels.triton import weight_product

    monkeypatch.setattr(weight_product, "SMALLEST_SPLIT", 64)
    assert weight_product.columns_per_split(40, 300, 64) == 128  # 4 splits asked for, of whole blocks: 3
    problem = LinearProblem(codebook_spec(4, 64), NO_ACTIVATION, 40, 300, "float32")
    x = torch.randn(70, 300, generator=torch.Generator().manual_seed(1))
    found, _ = error(problem, 70, x=x)
    assert found <= allowed("float32", "exact")
    alone = [error(problem, m, biased=False, x=x[:m])[1][0] for m in (1, 20, 40)]
    assert all(torch.equal(row, alone[0]) for row in alone)


@pytest.mark.parametrize("kind", KERNELS)
def test_many_rows_decode_once_into_the_same_numbers(kind, monkeypatch):
    from bitgrain.kernels.triton import weight_product

    spec = next(s for s in SPECS if s.kind == kind)
    problem = LinearProblem(spec, NO_ACTIVATION, *sizes_of(spec), "float16")
    _, apart = error(problem, 20)
    monkeypatch.setattr(weight_product, "EXPAND_ROWS", 20)
    found, expanded = error(problem, 20)
    assert found <= allowed("float16", "exact") and torch.equal(apart, expanded)


@pytest.mark.parametrize("activation", [ActivationSpec("int8", "token"), ActivationSpec("fp8_e4m3fn", "tensor", dynamic=False)], ids=["int8", "fp8-stored"])
@pytest.mark.parametrize("kind", KERNELS)
def test_activations_are_emulated_as_the_scheme_says(kind, activation):
    spec = next(s for s in SPECS if s.kind == kind)
    problem = LinearProblem(spec, activation.without_values(), *sizes_of(spec), "bfloat16")
    assert KERNELS[kind].fidelity(problem) is Fidelity.EMULATED
    assert error(problem, 5, activation=sample_activation(activation))[0] <= allowed("bfloat16", "emulated")


def test_what_is_prepared_is_as_large_as_the_weight():
    for spec in SPECS:
        n, k = sizes_of(spec)
        weight = sample_weight(spec, n, k)
        prepared = KERNELS[spec.kind].prepare(weight, NO_ACTIVATION)
        tables = 4 * k + 4096 + 8192 + 3 * n  # places of columns; magnitudes, the ball; last bytes of planes
        assert prepared.nbytes <= weight.nbytes + tables, spec.describe()


def test_registered_for_every_platform_of_triton_and_refused_without_16_bits(monkeypatch):
    problem = LinearProblem(codebook_spec(4, 64), NO_ACTIVATION, 64, 64, "bfloat16")
    for platform in ("cuda", "hip", "xpu"):
        assert {k.name for k in KERNELS.values()} <= {k.name for k in candidates("linear", platform)}
    assert "takes codebook weights" in KERNELS["codebook"].refusal(LinearProblem(CODES[0], NO_ACTIVATION, 64, 64, "float32")).reason
    monkeypatch.setenv("BITGRAIN_PLATFORM", "cuda:sm75@host")
    assert "bfloat16" in KERNELS["codebook"].refusal(problem).reason
