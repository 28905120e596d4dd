"""Linear kernels of the NPU through the models of its operators: against the definition, and what they refuse.  Not run on hardware."""

from dataclasses import replace

import pytest
import torch

from bitgrain.conformance.grid import float8, int_affine
from bitgrain.conformance.tolerances import allowed
from bitgrain.errors import BadValueError, RequestError
from bitgrain.kernels.base import Fidelity, LinearProblem
from bitgrain.kernels.npu import antiquant_layout, contracts
from bitgrain.kernels.npu.contract_checks import unpack_words
from bitgrain.kernels.npu.fp8_matmul import NpuFloat8Linear
from bitgrain.kernels.npu.int4_matmul import NpuInt4Linear
from bitgrain.kernels.npu.int8_matmul import NpuInt8Linear
from bitgrain.kernels.npu.mx_matmul import NpuMicroscaledLinear
from bitgrain.kernels.npu.weight_only import NpuWeightOnly
from bitgrain.kernels.selection import Policy, select
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, IntAffineWeight
from bitgrain.weights.block_float import block_float_spec
from bitgrain.weights.synthetic import sample_activation, sample_weight

WEIGHT_ONLY, INT8, INT4, MX = NpuWeightOnly("npu"), NpuInt8Linear("npu"), NpuInt4Linear("npu"), NpuMicroscaledLinear("npu")
FP8 = NpuFloat8Linear("npu")
TOKEN, TOKEN_TOP = ActivationSpec("int8", "token"), ActivationSpec("int8", "token", top=127.0)
STATIC = ActivationSpec("int8", "tensor", dynamic=False, scale=0.03)
STATIC_ASYM = replace(STATIC, symmetric=False, zero=-7)
TOKEN_INT4 = ActivationSpec("int4", "token", top=7.0)


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch):
    monkeypatch.setenv("BITGRAIN_PLATFORM", "npu@host")


def newest(monkeypatch):
    monkeypatch.setenv("BITGRAIN_PLATFORM", "npu:910_95@host")


def problem_of(spec, activation, n, k, dtype):
    return LinearProblem(spec, activation.without_values(), n, k, dtype)


def inputs(m, n, k, dtype):
    generator = torch.Generator().manual_seed(m + 1)
    kind = getattr(torch, dtype)
    return torch.randn(m, k, generator=generator).to(kind), torch.randn(n, generator=generator).to(kind)


def check(kernel, weight, activation, dtype, rows=(1, 3, 40), biased=(False, True)):
    """The kernel's outputs against the float64 definition, of several heights, with and without bias.

    What rounds decoded weights to x's dtype is held to twice what one rounding of the output takes, not to all that "approximate" admits.
    """
    n, k = weight.shape
    problem = problem_of(weight.spec, activation, n, k, dtype)
    assert kernel.refusal(problem) is None
    prepared, definition = kernel.prepare(weight, activation), weight.dequantize().double().T
    for m in rows:
        x, bias = inputs(m, n, k, dtype)
        for own in [bias if b else None for b in biased]:
            got = kernel.apply(x, prepared, own)
            assert got.dtype == x.dtype and got.shape == (m, n) and got.is_contiguous()
            want = activation.fake_quantize(x).double() @ definition + (0 if own is None else own.double())
            worst = ((got.double() - want).abs() / want.abs().amax(1, keepdim=True)).max().item()
            fidelity = kernel.fidelity(problem)
            assert worst <= (2 * allowed(dtype, "exact") if fidelity is Fidelity.APPROXIMATE else allowed(dtype, fidelity.value)), f"{problem.describe()}, M = {m}: {worst:.2g}"
    assert kernel.apply(inputs(1, n, k, dtype)[0][:0], prepared, None).shape == (0, n)
    return prepared


# ---- weights decoded inside the product ----


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zero", ["constant", "integer"])
def test_every_width_with_and_without_zero_points(bits, zero, dtype):
    check(WEIGHT_ONLY, sample_weight(int_affine(bits, "group", 32, zero, scale=dtype), 37, 96), NO_ACTIVATION, dtype)


@pytest.mark.parametrize(("group", "k"), [(32, 64), (64, 160), (128, 384), (1024, 2048), (96, 100), (64, 65)])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_every_size_and_a_short_last_one(group, k, bits):
    check(WEIGHT_ONLY, sample_weight(int_affine(bits, "group", group, "integer"), 24, k), NO_ACTIVATION, "float16", rows=(1, 5))


@pytest.mark.parametrize("granularity", ["channel", "tensor", "group"])
@pytest.mark.parametrize("scale", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_of_any_type(granularity, scale, dtype, bits):
    spec = int_affine(bits, granularity, 32 if granularity == "group" else 0, scale=scale)
    prepared = check(WEIGHT_ONLY, sample_weight(spec, 19, 70), NO_ACTIVATION, dtype)
    scales = antiquant_layout.scales_of(prepared, getattr(torch, dtype))
    assert scales.scale.dtype == getattr(torch, dtype) and scales is antiquant_layout.scales_of(prepared, scales.scale.dtype)
    assert scale != dtype or torch.equal(scales.scale, prepared.tensors["scale"])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_fractional_zero_points_are_rounded_as_offsets(bits, dtype):
    check(WEIGHT_ONLY, sample_weight(int_affine(bits, "group", 32, "float", scale=dtype), 24, 96), NO_ACTIVATION, dtype)


def test_float16_takes_scales_that_it_could_not_hold():
    weight = sample_weight(int_affine(8, "group", 32, scale="float32"), 16, 64)
    bias = torch.linspace(-1, 1, 16).half()
    for power in (-16, 24):
        moved = replace(weight, scale=weight.scale * 2.0**power)
        x = (torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 2.0 ** (6 if power < 0 else -10)).half()
        want = x.double() @ moved.dequantize().double().T + bias.double()
        prepared = WEIGHT_ONLY.prepare(moved, NO_ACTIVATION)
        assert antiquant_layout.scales_of(prepared, torch.float16).factor is not None
        got = WEIGHT_ONLY.apply(x, prepared, bias)
        assert (got.double() - want).abs().max() < 2e-3 * want.abs().max()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_act_order_becomes_a_gather_of_columns(bits):
    weight = sample_weight(int_affine(bits, "group", 32, "integer", index=True), 24, 128)
    prepared = check(WEIGHT_ONLY, weight, NO_ACTIVATION, "float16")
    assert sorted(prepared.tensors["gather"].tolist()) == list(range(128))


def test_groups_of_an_act_order_that_are_not_whole_are_filled():
    whole = sample_weight(int_affine(4, "group", 32, "integer", index=True), 24, 128)
    shard = whole.columns(0, 64)  # any number of columns of each of the four groups
    assert set(torch.bincount(shard.group_index.long()).tolist()) != {32}
    prepared = check(WEIGHT_ONLY, shard, NO_ACTIVATION, "bfloat16")
    assert prepared.tensors["gather"].numel() % 32 == 0 and (prepared.tensors["gather"] == 64).any()


def test_shards_of_an_act_order_that_are_shorter_than_a_group():
    whole = sample_weight(int_affine(4, "group", 32, "integer", index=True), 24, 128)
    check(WEIGHT_ONLY, whole.columns(32, 48), NO_ACTIVATION, "float16", rows=(1, 3))
    one = replace(whole.columns(0, 16), group_index=torch.full((16,), 2, dtype=torch.int32))
    assert check(WEIGHT_ONLY, one, NO_ACTIVATION, "float16", rows=(1, 3)).meta["group"] == 0
    spec = replace(int_affine(4, "group", 48), group_index=True)
    assert "multiples of 32" in WEIGHT_ONLY.refusal(problem_of(spec, NO_ACTIVATION, 24, 40, "float16")).reason


def test_a49_codes_of_up_to_4_bits_are_words_and_wider_ones_bytes():
    for bits in (2, 3, 4, 5, 8):
        weight = sample_weight(int_affine(bits, "group", 32), 24, 64)
        held = WEIGHT_ONLY.prepare(weight, NO_ACTIVATION).tensors["weight"]
        middle = 8 if bits <= 4 else 128
        assert held.dtype == (torch.int32 if bits <= 4 else torch.int8) and held.shape == (64, 3 if bits <= 4 else 24)
        assert torch.equal((unpack_words(held) if bits <= 4 else held).int(), weight.codes().t().int() - middle)


def test_a50_columns_that_fill_the_last_word_are_cut_off():
    weight = sample_weight(int_affine(4, "group", 32), 21, 64)
    prepared = WEIGHT_ONLY.prepare(weight, NO_ACTIVATION)
    assert prepared.tensors["weight"].shape == (64, 3) and prepared.shape == (21, 64)
    assert WEIGHT_ONLY.apply(inputs(2, 21, 64, "float16")[0], prepared, None).shape == (2, 21)


def test_a51_bias_of_bfloat16_inputs_reaches_the_operator_as_float32(monkeypatch):
    seen = []

    def call(*args, bias=None, **options):
        seen.append(None if bias is None else bias.dtype)
        return contracts_call(*args, bias=bias, **options)

    contracts_call = contracts.npu_weight_quant_batchmatmul
    monkeypatch.setattr(contracts, "npu_weight_quant_batchmatmul", call)
    for dtype in ("bfloat16", "float16"):
        check(WEIGHT_ONLY, sample_weight(int_affine(4, "group", 32, scale=dtype), 16, 64), NO_ACTIVATION, dtype, rows=(2,))
    assert seen == [None, torch.float32, None, torch.float16]


def test_a53_asymmetric_zero_points_keep_their_sign():
    codes = torch.tensor([[0, 15] * 16 + [8] * 32], dtype=torch.uint8)
    weight = IntAffineWeight.from_codes(codes, 4, torch.ones(1, 2).half(), torch.tensor([[3, 11]], dtype=torch.int16), 32)
    prepared = WEIGHT_ONLY.prepare(weight, NO_ACTIVATION)
    assert prepared.tensors["offset"][:, 0].tolist() == [5, -3]  # added to codes - 8
    x = torch.ones(1, 64, dtype=torch.float16)
    assert WEIGHT_ONLY.apply(x, prepared, None).item() == 16 * (0 - 3) + 16 * (15 - 3) + 32 * (8 - 11)


def test_a54_weights_are_turned_once_whatever_packed_them():
    weight = sample_weight(int_affine(4, "channel"), 16, 64)
    prepared = WEIGHT_ONLY.prepare(weight, NO_ACTIVATION)
    one = torch.zeros(1, 64, dtype=torch.float16)
    one[0, 5] = 1
    row = WEIGHT_ONLY.apply(one, prepared, None)[0]
    assert torch.allclose(row.float(), weight.dequantize()[:, 5], rtol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_more_columns_than_one_call_takes_are_split(monkeypatch, bits):
    monkeypatch.setattr(antiquant_layout, "WIDEST", 32)
    prepared = check(WEIGHT_ONLY, sample_weight(int_affine(bits, "group", 32, "integer"), 69, 64), NO_ACTIVATION, "float16", rows=(2,))
    assert {"weight", "weight1", "weight2"} <= set(prepared.tensors)
    check(INT8, sample_weight(int_affine(bits, "channel"), 69, 64), STATIC_ASYM, "float16", rows=(2,))


def test_zero_points_that_16_bits_cannot_add_are_refused_while_preparing():
    weight = sample_weight(int_affine(8, "group", 32, "integer"), 8, 64)
    far = replace(weight, zero=torch.full_like(weight.zero, 300))
    with pytest.raises(BadValueError, match="16 zero points beyond 128"):
        WEIGHT_ONLY.prepare(far, NO_ACTIVATION)


@pytest.mark.parametrize(
    ("spec", "activation", "dtype", "reason"),
    [
        (int_affine(4, "group", 32), NO_ACTIVATION, "float32", "float16 and bfloat16 inputs"),
        (int_affine(4, "group", 48), NO_ACTIVATION, "float16", "multiples of 32 columns, not of 48"),
        (int_affine(4, "group", 32), TOKEN, "float16", "the scheme quantizes them"),
        (replace(int_affine(4, "group", 1), row_index=True), NO_ACTIVATION, "float16", "along N"),
        (float8("fp8_e4m3fn", "channel"), NO_ACTIVATION, "float16", "not float ones"),
    ],
)
def test_weight_only_refuses_what_would_change_the_numbers(spec, activation, dtype, reason):
    assert reason in WEIGHT_ONLY.refusal(problem_of(spec, activation, 64, 96, dtype)).reason


def test_weight_only_refuses_more_rows_than_a_product_has():
    assert "sides up to" in WEIGHT_ONLY.refusal(problem_of(int_affine(4, "channel"), NO_ACTIVATION, 8, 65536, "float16")).reason


# ---- integers on both sides ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "activation",
    [TOKEN, TOKEN_TOP, replace(TOKEN, symmetric=False), ActivationSpec("int8", "tensor"), replace(TOKEN, reciprocal=True), STATIC, STATIC_ASYM, TOKEN_INT4,
     ActivationSpec("int4", "token", top=7.0, clipped=True, clip=0.9)],
    ids=lambda a: a.describe().replace(" ", "-"),
)  # fmt: skip
@pytest.mark.parametrize("scale", ["float32", "bfloat16"])
def test_w8a8_with_every_kind_of_activation(activation, dtype, scale):
    check(INT8, sample_weight(int_affine(8, "channel", scale=scale), 37, 100), activation, dtype)


@pytest.mark.parametrize("bits", [2, 4, 5])
def test_w4a8_is_held_in_bytes(bits):
    check(INT8, sample_weight(int_affine(bits, "channel"), 32, 64), TOKEN_TOP, "float16")


def test_float32_scales_are_not_cut_to_19_bits():
    weight = sample_weight(int_affine(8, "channel", scale="float32"), 32, 64)
    weight = replace(weight, scale=torch.full_like(weight.scale, (2 - 2.0**-12) * 2.0**-9))
    got = INT8.apply(torch.ones(1, 64, dtype=torch.float16), INT8.prepare(weight, replace(STATIC, scale=1.0)), None)
    want = weight.dequantize().double().sum(1)
    assert ((got.double() - want).abs() <= 2.0**-11 * want.abs()).all()


def test_whole_tiles_are_tiled_and_others_stay_plain_with_the_reason():
    for n, k, layout in ((64, 32, ["NZ"]), (40, 32, ["ND: [32, 40] is not made of whole tiles of 16 by 32"])):
        assert INT8.prepare(sample_weight(int_affine(8, "channel"), n, k), TOKEN).meta["layout"] == layout


def test_operators_quantize_only_what_they_quantize_alike(monkeypatch):
    calls = []
    for name in ("npu_dynamic_quant", "npu_quantize"):
        own = getattr(contracts, name)
        monkeypatch.setattr(contracts, name, lambda *a, own=own, name=name, **o: (calls.append(name), own(*a, **o))[1])
    weight = sample_weight(int_affine(8, "channel"), 16, 64)
    for activation, dtype in ((TOKEN_TOP, "bfloat16"), (TOKEN, "bfloat16"), (TOKEN_TOP, "float32"), (STATIC, "float32"), (replace(STATIC, reciprocal=True), "float16")):
        INT8.apply(inputs(2, 16, 64, dtype)[0], INT8.prepare(weight, activation), None)
    assert calls == ["npu_dynamic_quant", "npu_quantize"]


@pytest.mark.parametrize(
    ("spec", "activation", "reason"),
    [
        (int_affine(8, "group", 32), TOKEN, "a scale per row or for all"),
        (int_affine(8, "channel", zero="integer"), TOKEN, "one zero point"),
        (int_affine(8, "channel"), NO_ACTIVATION, "multiplies integer activations"),
        (int_affine(8, "channel"), ActivationSpec("fp8_e4m3fn", "token"), "fp8_e4m3fn token dynamic ones"),
        (int_affine(8, "channel"), ActivationSpec("int8", "group", group_size=32), "per token or for all"),
        (int_affine(8, "channel"), replace(TOKEN, outlier_threshold=2.0), "without outliers"),
    ],
)
def test_w8a8_refuses_what_integers_cannot_sum(spec, activation, reason):
    assert reason in INT8.refusal(problem_of(spec, activation, 64, 96, "float16")).reason


def test_codes_beyond_int8_are_refused_while_preparing():
    weight = IntAffineWeight.from_codes(torch.zeros(8, 64, dtype=torch.uint8), 8, torch.ones(8, 1), 0, 64)
    with pytest.raises(BadValueError, match="from 0 to 255"):
        INT8.prepare(weight, TOKEN)


# ---- 4-bit integers on both sides ----


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("n", "k"), [(64, 64), (37, 104), (8, 8)])
def test_w4a4_in_words(dtype, n, k):
    prepared = check(INT4, sample_weight(int_affine(4, "channel"), n, k), TOKEN_INT4, dtype)
    assert prepared.tensors["weight"].dtype == torch.int32 and prepared.nbytes < n * k / 2 + 40 * n + 4 * k


def test_w4a4_refuses_with_the_reason(monkeypatch):
    weight = int_affine(4, "channel")
    assert "multiples of 8, not 100" in INT4.refusal(problem_of(weight, TOKEN_INT4, 8, 100, "float16")).reason
    assert "dynamic int4" in INT4.refusal(problem_of(weight, TOKEN, 8, 64, "float16")).reason
    assert "dynamic int4" in INT4.refusal(problem_of(int_affine(8, "channel"), TOKEN_INT4, 8, 64, "float16")).reason
    assert "float16 and bfloat16" in INT4.refusal(problem_of(weight, TOKEN_INT4, 8, 64, "float32")).reason
    newest(monkeypatch)
    assert "does not multiply int4" in INT4.refusal(problem_of(weight, TOKEN_INT4, 8, 64, "float16")).reason


# ---- microscaling ----


def mx_activation(element, rule="floor"):
    return ActivationSpec(element, "group", 32, scale_type="e8m0", exponent_rule=rule)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rule", ["floor", "ceil", "even"])
@pytest.mark.parametrize(
    ("weight", "activation"), [("fp8_e4m3fn", "fp8_e4m3fn"), ("fp4_e2m1", "fp4_e2m1"), ("fp4_e2m1", "fp8_e4m3fn"), ("fp8_e5m2", "fp8_e4m3fn"), ("fp8_e5m2", "fp8_e5m2")]
)
def test_microscaled_numbers_on_both_sides(monkeypatch, weight, activation, rule, dtype):
    newest(monkeypatch)
    for n, k in ((24, 128), (17, 96), (8, 80)):
        check(MX, sample_weight(block_float_spec(weight, 32, "e8m0"), n, k), mx_activation(activation, rule), dtype, rows=(1, 5))


def test_microscaling_needs_a_device_that_has_it(monkeypatch):
    problem = problem_of(block_float_spec("fp8_e4m3fn", 32, "e8m0"), mx_activation("fp8_e4m3fn"), 64, 64, "bfloat16")
    assert MX.refusal(problem).reason == MX.state() == "the device does not multiply microscaled numbers"
    newest(monkeypatch)
    assert MX.refusal(problem) is None and "contract-tested" in MX.state()
    for spec, activation, reason in (
        (block_float_spec("fp4_e2m1", 16, "e4m3", "tensor"), mx_activation("fp4_e2m1"), "one e8m0 scale"),
        (block_float_spec("fp6_e2m3", 32, "e8m0"), mx_activation("fp8_e4m3fn"), "not fp6_e2m3"),
        (block_float_spec("fp8_e4m3fn", 32, "e8m0"), mx_activation("fp4_e2m1"), "not fp4_e2m1"),
        (block_float_spec("fp4_e2m1", 32, "e8m0"), NO_ACTIVATION, "not 16-bit"),
    ):
        assert reason in MX.refusal(problem_of(spec, activation, 64, 64, "bfloat16")).reason


# ---- fp8 ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "activation",
    [ActivationSpec("fp8_e4m3fn", "token"), ActivationSpec("fp8_e4m3fn", "tensor"), ActivationSpec("fp8_e4m3fn", "tensor", dynamic=False, scale=0.01),
     ActivationSpec("fp8_e5m2", "token", upper_bound=1.5)],
    ids=lambda a: a.describe().replace(" ", "-"),
)  # fmt: skip
@pytest.mark.parametrize(("element", "granularity"), [("fp8_e4m3fn", "channel"), ("fp8_e4m3fn", "tensor"), ("fp8_e5m2", "channel")])
def test_fp8_on_both_sides(monkeypatch, element, granularity, activation, dtype):
    newest(monkeypatch)
    check(FP8, sample_weight(float8(element, granularity), 37, 100), activation, dtype, rows=(1, 5))


def test_fp8_refuses_with_the_reason(monkeypatch):
    token = ActivationSpec("fp8_e4m3fn", "token")
    problem = problem_of(float8("fp8_e4m3fn", "channel"), token, 64, 64, "bfloat16")
    assert FP8.refusal(problem).reason == FP8.state() == "the device does not multiply fp8"
    newest(monkeypatch)
    assert FP8.refusal(problem) is None and FP8.fidelity(problem) is Fidelity.NATIVE
    assert select(problem, "npu", Policy()).kernel.name == "npu.fp8_matmul"
    for spec, activation, reason in (
        (float8("fp8_e4m3fn", "block", (128, 128)), token, "not fp8_e4m3fn block 128x128"),
        (float8("fp8_e4m3fnuz", "channel"), token, "not fp8_e4m3fnuz"),
        (float8("fp8_e4m3fn", "channel"), NO_ACTIVATION, "not 16-bit"),
        (float8("fp8_e4m3fn", "channel"), ActivationSpec("fp8_e4m3fn", "group", group_size=32), "per token or for all"),
    ):
        assert reason in FP8.refusal(problem_of(spec, activation, 64, 64, "bfloat16")).reason


# ---- all of them ----

EACH = [
    (WEIGHT_ONLY, int_affine(4, "group", 32, "integer"), NO_ACTIVATION),
    (WEIGHT_ONLY, int_affine(8, "channel", scale="float32"), NO_ACTIVATION),
    (INT8, int_affine(8, "channel"), TOKEN_TOP),
    (INT8, int_affine(8, "channel"), replace(TOKEN, symmetric=False)),
    (INT4, int_affine(4, "channel"), TOKEN_INT4),
]


@pytest.mark.parametrize(("kernel", "spec", "activation"), EACH, ids=lambda v: getattr(v, "name", ""))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_row_does_not_depend_on_the_others(kernel, spec, activation, dtype):
    prepared = kernel.prepare(sample_weight(spec, 40, 128), activation)
    x, bias = inputs(9, 40, 128, dtype)
    whole = kernel.apply(x, prepared, bias)
    assert torch.equal(kernel.apply(x, prepared, bias), whole)
    assert all(torch.equal(kernel.apply(x[row : row + 1], prepared, bias), whole[row : row + 1]) for row in (0, 4, 8))


@pytest.mark.parametrize(
    ("spec", "activation", "name", "fidelity"),
    [
        (int_affine(4, "group", 128), NO_ACTIVATION, "npu.weight_only", Fidelity.APPROXIMATE),
        (int_affine(8, "channel"), TOKEN, "npu.int8_matmul", Fidelity.NATIVE),
        (int_affine(4, "channel"), TOKEN_INT4, "npu.int4_matmul", Fidelity.NATIVE),
        (int_affine(4, "group", 24), NO_ACTIVATION, "reference.linear", Fidelity.EXACT),
    ],
)
def test_selection_takes_the_kernel_and_says_how_it_was_tested(spec, activation, name, fidelity):
    found = select(problem_of(spec, sample_activation(activation), 256, 512, "bfloat16"), "npu", Policy("fast"))
    assert found.kernel.name == name and found.fidelity is fidelity
    assert all(c.reason for c in found.candidates if c.name != name)
    if name.startswith("npu"):
        assert found.as_dict()["proof"] == "contract-tested; not run on hardware"


def test_exact_policy_leaves_rounded_weights_to_the_floor_and_says_why():
    found = select(problem_of(int_affine(4, "group", 128), NO_ACTIVATION, 256, 512, "bfloat16"), "npu", Policy())
    assert found.kernel.name == "reference.linear"
    assert next(c.reason for c in found.candidates if c.name == "npu.weight_only") == "changes the checkpoint's numerics; admitted by --fidelity fast"


def test_oldest_generation_and_unknown_ones_are_refused_with_reasons(monkeypatch):
    monkeypatch.setenv("BITGRAIN_PLATFORM", "npu:310p@host")
    assert "neither groups" in WEIGHT_ONLY.refusal(problem_of(int_affine(4, "group", 32), NO_ACTIVATION, 64, 64, "float16")).reason
    assert "no scale per token" in INT8.refusal(problem_of(int_affine(8, "channel"), TOKEN, 64, 64, "float16")).reason
    monkeypatch.setenv("BITGRAIN_PLATFORM", "npu:999@host")
    with pytest.raises(RequestError, match="999"):
        WEIGHT_ONLY.refusal(problem_of(int_affine(4, "group", 32), NO_ACTIVATION, 64, 64, "float16"))
