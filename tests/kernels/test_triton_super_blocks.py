"""Products with super-block weights, and rows of every kind of table, in Triton's interpreter: interpreter only, not run on hardware."""

import pytest
import torch

from bitgrain.conformance.grid import ACTIVATIONS, BLOCKED, WEIGHTS, shapes_of
from bitgrain.conformance.tolerances import allowed
from bitgrain.kernels.base import EmbeddingProblem, Fidelity, LinearProblem
from bitgrain.kernels.registry import candidates
from bitgrain.kernels.triton import availability
from bitgrain.kernels.triton.coded import LAYOUTS, CodedLinear
from bitgrain.kernels.triton.rows import DecodedEmbedding
from bitgrain.kernels.triton.super_blocks import SuperBlockLinear
from bitgrain.numerics.super_blocks import SUPER_BLOCKS, write_block_scales
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, SuperBlockWeight
from bitgrain.weights.block_float import block_float_spec
from bitgrain.weights.super_block import super_block_spec
from bitgrain.weights.synthetic import sample_weight

KERNEL, CODED, ROWS = SuperBlockLinear("cuda"), CodedLinear("cuda"), DecodedEmbedding("cuda")
DTYPES = ["float32", "bfloat16", "float16"]
KINDS = list(SUPER_BLOCKS)
# bits per weight of what is prepared beyond the stored ones: six-bit sub-scales become bytes; a table of levels is shared by all rows
LARGER = {"Q3_K": 2 / 16, "Q4_K": 4 / 32, "Q5_K": 4 / 32, "IQ4_XS": 2 / 32}

pytestmark = pytest.mark.skipif(
    bool(availability.missing()) or not availability.interpreted(), reason=availability.missing() or "triton compiles for a device here: TRITON_INTERPRET is not 1"
)


def weight_of(kind, n, k):
    """Random blocks with random float16 scales and minima of both signs, as files may have them."""
    weight = sample_weight(super_block_spec(kind), n, k, 5)
    blocks = weight.packed.clone()
    signs = torch.where(torch.arange(len(blocks.view(-1, 1))) % 3 == 0, -1.0, 1.0)
    step = super_block_spec(kind).group_size
    count = n * k // step
    write_block_scales(blocks.view(count, -1), kind, (torch.rand(count, generator=torch.Generator().manual_seed(2)) + 0.5) * signs[:count] / 64)
    return SuperBlockWeight(blocks, kind)


def product(weight, dtype, m, activation=NO_ACTIVATION, biased=True, x=None, kernel=KERNEL):
    """(how far a product is from the float64 definition, relative to the row's largest output; the result)."""
    n, k = weight.shape
    assert kernel.refusal(LinearProblem(weight.spec, activation.without_values(), n, k, dtype)) is None
    kind = getattr(torch, dtype)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(kind) if x is None else x
    bias = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(kind) if biased else None
    got = kernel.apply(x, kernel.prepare(weight, activation), bias)
    assert got.dtype == kind and tuple(got.shape) == (m, n)
    want = activation.fake_quantize(x).double() @ weight.dequantize().double().T
    want = want if bias is None else want + bias.double()
    return ((got.double() - want).abs() / want.abs().amax(1, keepdim=True)).max().item() if m else 0.0, got


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_agrees_with_the_definition(kind):
    place = KINDS.index(kind)
    dtype = DTYPES[place % 3]
    found, _ = product(weight_of(kind, 33, 2 * super_block_spec(kind).group_size), dtype, 1 + place % 4, biased=place % 2 == 0)
    assert found <= allowed(dtype, "exact")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_type_are_those_of_the_definition(kind):
    weight = weight_of(kind, 37, super_block_spec(kind).group_size)
    prepared = KERNEL.prepare(weight, NO_ACTIVATION)
    index = torch.tensor([36, 0, 5, 36])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(ROWS.apply(index, prepared, dtype), weight.dequantize()[index].to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_prepared_is_about_as_large_as_the_blocks(kind):
    n, k = 64, 1024
    prepared = KERNEL.prepare(sample_weight(super_block_spec(kind), n, k), NO_ACTIVATION)
    stored = sample_weight(super_block_spec(kind), n, k).bits_per_weight
    tables = sum(t.nbytes for t in prepared.tensors.values() if t.shape[:1] != (n,))
    assert tables <= 16 << 10
    assert 8 * (prepared.nbytes - tables) / (n * k) == pytest.approx(stored + LARGER.get(kind, 0))


def test_every_super_block_has_a_decoder():
    for kind in KINDS:
        assert KERNEL.refusal(LinearProblem(super_block_spec(kind), NO_ACTIVATION, 64, 512, "bfloat16")) is None
    assert "super block weights" in KERNEL.refusal(LinearProblem(WEIGHTS[0], NO_ACTIVATION, 64, 512, "bfloat16")).reason


def test_activations_are_emulated_as_the_scheme_says():
    weight, activation = weight_of("Q4_K", 40, 256), ActivationSpec("int8", "token", symmetric=False)
    assert KERNEL.fidelity(LinearProblem(weight.spec, activation, 40, 256, "bfloat16")) is Fidelity.EMULATED
    assert product(weight, "bfloat16", 5, activation)[0] <= allowed("bfloat16", "emulated")


def test_a_row_does_not_depend_on_the_others(monkeypatch):
    from bitgrain.kernels.triton import weight_product

    monkeypatch.setattr(weight_product, "SMALLEST_SPLIT", 128)
    weight, x = weight_of("Q4_K", 70, 768), torch.randn(70, 768, generator=torch.Generator().manual_seed(1))
    found, together = product(weight, "float32", 70, x=x)
    assert found <= allowed("float32", "exact")
    for m in (1, 20):
        assert torch.equal(product(weight, "float32", m, x=x[:m])[1], together[:m])
    assert product(weight, "bfloat16", 0)[1].shape == (0, 70)


STORED = [spec for spec in WEIGHTS if spec.kind in LAYOUTS]


@pytest.mark.parametrize("place", range(len(STORED)), ids=[f"{s.kind}-{s.describe()}".replace(" ", "-") for s in STORED])
def test_weights_as_they_are_stored_agree_with_every_activation(place):
    m, n, k = shapes_of(STORED[place])[1]
    activation, dtype = ACTIVATIONS[place % len(ACTIVATIONS)], DTYPES[place % 3]
    fidelity = CODED.fidelity(LinearProblem(STORED[place], activation.without_values(), n, k, dtype)).value
    assert product(sample_weight(STORED[place], n, k, 3), dtype, m, activation, kernel=CODED)[0] <= allowed(dtype, fidelity)


@pytest.mark.parametrize("spec", [*WEIGHTS, *BLOCKED], ids=lambda s: f"{s.kind}-{s.describe()}".replace(" ", "-"))
def test_rows_of_every_kind_of_table_are_those_of_the_definition(spec):
    _, n, k = shapes_of(spec)[1]
    place = [*WEIGHTS, *BLOCKED].index(spec)
    dtype = DTYPES[place % 3]
    assert ROWS.refusal(EmbeddingProblem(spec, n, k, dtype)) is None
    weight = sample_weight(spec, n, k, place)
    index = torch.tensor([3, 0, n - 1, 3, 17])
    prepared = ROWS.prepare(weight, NO_ACTIVATION)
    got = ROWS.apply(index, prepared, getattr(torch, dtype))
    assert torch.equal(got, weight.dequantize()[index].to(getattr(torch, dtype)))
    assert ROWS.apply(index[:0], prepared, getattr(torch, dtype)).shape == (0, k)


def test_tables_that_are_only_gathered_from_are_not_copied():
    for spec in (s for s in WEIGHTS if s.kind in ("dense", "int_affine", "float", "block_float")):
        weight = sample_weight(spec, 37, 96)
        held = {t.data_ptr() for t in ROWS.prepare(weight, NO_ACTIVATION).tensors.values()}
        assert {t.data_ptr() for t in weight.data_tensors().values()} <= held, spec.describe()


def test_a_table_that_a_head_shares_is_held_once():
    assert KERNEL.name in ROWS.heads
    weight = weight_of("Q6_K", 37, 256)
    prepared = ROWS.prepare(weight, NO_ACTIVATION)
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(1))
    assert torch.equal(KERNEL.apply(x, prepared, None), KERNEL.apply(x, KERNEL.prepare(weight, NO_ACTIVATION), None))
    for platform in ("cuda", "hip", "xpu"):
        assert ROWS.name in [k.name for k in candidates("embedding", platform)]


def test_block_scales_without_a_second_one_and_with_one_per_group():
    for second in ("none", "tensor", "channel", "group"):
        weight = sample_weight(block_float_spec("fp6_e3m2", 16, "e4m3", second), 21, 100)
        index = torch.tensor([20, 1])
        assert torch.equal(ROWS.apply(index, ROWS.prepare(weight, NO_ACTIVATION), torch.float32), weight.dequantize()[index])
