"""The models of the NPU operators: numbers against float64, and the errors of calls that break a contract."""

import sys
from types import SimpleNamespace

import pytest
import torch

from bitgrain.errors import LayoutError
from bitgrain.kernels.base import LinearProblem
from bitgrain.kernels.npu import contracts as npu
from bitgrain.kernels.npu import operators as lookup
from bitgrain.kernels.npu.contract_checks import pack_words, unpack_words
from bitgrain.kernels.npu.int8_matmul import NpuInt8Linear
from bitgrain.platforms.base import Platform, ProbeReport
from bitgrain.weights import ActivationSpec, WeightSpec

M, K, N = 5, 64, 24


def ints(*shape, low=-128, high=128, dtype=torch.int8, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def floats(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got, want, steps=1.0):
    """Equal up to `steps` roundings of the output's dtype."""
    size = torch.finfo(got.dtype).eps * want.abs().max().item()
    assert (got.double() - want).abs().max().item() <= steps * size


X1, X2 = ints(M, K), ints(K, N, seed=1)
SCALE, TOKEN = floats(N).abs() * 0.01 + 1e-3, floats(M, seed=2).abs() * 0.01 + 1e-3
EXACT = X1.double() @ X2.double()


# ---- int8 products ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int32_bias_joins_before_the_scales_and_a_float_one_after(dtype):
    whole, real = ints(N, low=-9000, high=9000, dtype=torch.int32), floats(N)
    call = {"pertoken_scale": TOKEN, "output_dtype": dtype}
    close(npu.npu_quant_matmul(X1, X2, SCALE, bias=whole, **call), (EXACT + whole.double()) * SCALE.double() * TOKEN.double()[:, None])
    close(npu.npu_quant_matmul(X1, X2, SCALE, bias=real, **call), EXACT * SCALE.double() * TOKEN.double()[:, None] + real.double())
    assert torch.equal(npu.npu_quant_matmul(X1, X2.t().contiguous().t(), SCALE, **call), npu.npu_quant_matmul(X1, X2, SCALE, **call))


def test_int32_output_is_the_plain_sum_and_int8_output_adds_the_offset():
    bias = ints(N, low=-50, high=50, dtype=torch.int32)
    assert torch.equal(npu.npu_quant_matmul(X1, X2, SCALE, bias=bias, output_dtype=torch.int32).double(), EXACT + bias.double())
    power, offset = torch.full((1,), 2.0**-11), torch.full((1,), 3.0)
    want = (EXACT * 2.0**-11 + 3).round().clamp(-128, 127)
    assert torch.equal(npu.npu_quant_matmul(X1, X2, power, offset=offset).double(), want)


def test_float32_scale_without_a_scale_per_token_is_cut_to_its_19_upper_bits():
    scale = torch.full((N,), 1 + 2.0**-10 + 2.0**-11) * 2.0**-12  # the last bit is the first of those cut
    cut = EXACT * (1 + 2.0**-10) * 2.0**-12
    close(npu.npu_quant_matmul(X1, X2, scale, output_dtype=torch.float16), cut, 0.5)
    assert (npu.npu_quant_matmul(X1, X2, scale, output_dtype=torch.float16).double() - EXACT * scale.double()).abs().max() > (cut - EXACT * scale.double()).abs().max() / 2
    ones = torch.ones(M)
    close(npu.npu_quant_matmul(X1, X2, scale, pertoken_scale=ones, output_dtype=torch.float16), EXACT * scale.double(), 0.5)
    close(npu.npu_quant_matmul(X1, X2, scale, output_dtype=torch.bfloat16), EXACT * scale.double(), 0.5)


def test_stored_quantization_parameter_is_the_upper_bits_and_a_mark():
    param = npu.npu_trans_quant_param(torch.tensor([1.0, -2.5, 1 + 2.0**-11]))
    assert param.tolist() == [(1 << 46) | 0x3F800000, (1 << 46) | 0xC0200000, (1 << 46) | 0x3F800000]
    half = torch.full((N,), 0.5)
    call = {"output_dtype": torch.float16}
    assert torch.equal(npu.npu_quant_matmul(X1, X2, npu.npu_trans_quant_param(half), **call), npu.npu_quant_matmul(X1, X2, half, **call))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x1": X1.to(torch.int32)}, "int8, or int32"),
        ({"x1": X1.half()}, "int8, or int32"),
        ({"x2": ints(K - 1, N)}, "one K"),
        ({"x2": ints(K, 2 * N)[:, ::2]}, "without gaps|contiguous"),
        ({"x1": X1[:0]}, "empty x1"),
        ({"x1": X1[None]}, "two matrices"),
        ({"x1": ints(1, 65536), "x2": ints(65536, 1)}, "65535"),
        ({"scale": SCALE.half()}, "scale of torch.float16"),
        ({"scale": SCALE[:-1]}, "scale"),
        ({"pertoken_scale": TOKEN[:, None]}, "pertoken_scale"),
        ({"pertoken_scale": TOKEN.half()}, "pertoken_scale"),
        ({"bias": floats(N, dtype=torch.bfloat16), "output_dtype": torch.float16}, "bias of torch.bfloat16"),
        ({"bias": floats(1, N)}, "bias"),
        ({"offset": torch.ones(1)}, "int8 outputs only"),
        ({"output_dtype": torch.float32}, "output torch.float32"),
        ({"output_dtype": torch.int32}, "output torch.int32"),
        ({"group_sizes": [1, 1, 32]}, "group_sizes"),
    ],
)
def test_int8_call_that_breaks_the_contract_is_an_error(change, reason):
    call = {"x1": X1, "x2": X2, "scale": SCALE, "pertoken_scale": TOKEN, "output_dtype": torch.bfloat16} | change
    with pytest.raises(LayoutError, match=reason):
        npu.npu_quant_matmul(call.pop("x1"), call.pop("x2"), call.pop("scale"), **call)


# ---- 4-bit words ----


def test_eight_nibbles_to_a_word_the_first_lowest():
    row = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [-8, -7, -6, -5, -4, -3, -2, -1]], dtype=torch.int32)
    words = npu.npu_convert_weight_to_int4pack(row)
    assert words.dtype == torch.int32 and [w % (1 << 32) for w in words.flatten().tolist()] == [0x76543210, 0xFEDCBA98]


def test_a52_words_unpack_to_centred_values_along_either_axis():
    values = ints(16, 24, low=-8, high=8)
    assert torch.equal(unpack_words(pack_words(values)), values)
    assert torch.equal(unpack_words(pack_words(values.t().contiguous())).t(), values)
    assert torch.equal(npu.npu_convert_weight_to_int4pack(values.int()[None]), pack_words(values)[None])


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (ints(4, 12, low=-8, high=8, dtype=torch.int32), "multiple of 8"),
        (torch.full((4, 8), 8, dtype=torch.int32), "beyond 4 bits"),
        (ints(4, 8, low=-8, high=8), "weight of torch.int8"),
        (ints(8, 4, low=-8, high=8, dtype=torch.int32).t(), "without gaps"),
        (torch.zeros(0, 8, dtype=torch.int32), "empty"),
    ],
)
def test_what_cannot_be_packed_is_an_error(weight, reason):
    with pytest.raises(LayoutError, match=reason):
        npu.npu_convert_weight_to_int4pack(weight)


def test_a50_output_is_eight_times_as_wide_only_where_words_run_along_n():
    x, w = ints(M, K, low=-8, high=8), ints(K, N, low=-8, high=8, seed=1)
    along_n, along_k = pack_words(w), pack_words(w.t().contiguous()).t()
    assert along_n.shape == (K, N // 8) and along_k.shape == (K // 8, N)
    outputs = [npu.npu_quant_matmul(pack_words(x), words, SCALE, pertoken_scale=TOKEN, output_dtype=torch.bfloat16) for words in (along_n, along_k)]
    assert outputs[0].shape == outputs[1].shape == (M, N) and torch.equal(*outputs)
    close(outputs[0], x.double() @ w.double() * SCALE.double() * TOKEN.double()[:, None])
    bytes_wide = npu.npu_quant_matmul(x, w, SCALE, pertoken_scale=TOKEN, output_dtype=torch.bfloat16)
    assert bytes_wide.shape == (M, w.shape[1]) and torch.equal(bytes_wide, outputs[0])
    half, scale = floats(M, K, dtype=torch.float16), SCALE.half()[None]
    assert npu.npu_weight_quant_batchmatmul(half, along_n, scale).shape == npu.npu_weight_quant_batchmatmul(half, w, scale).shape == (M, N)


def test_int4_products_take_no_bias_and_no_float32_output():
    x, w = pack_words(ints(M, K, low=-8, high=8)), pack_words(ints(K, N, low=-8, high=8))
    with pytest.raises(LayoutError, match="bias given"):
        npu.npu_quant_matmul(x, w, SCALE, pertoken_scale=TOKEN, bias=floats(N), output_dtype=torch.bfloat16)
    with pytest.raises(LayoutError, match="output torch.int32 of int4"):
        npu.npu_quant_matmul(x, w, SCALE, output_dtype=torch.int32)


# ---- weights decoded inside the product ----

XH = {dtype: floats(M, K, dtype=dtype) for dtype in (torch.float16, torch.bfloat16)}


@pytest.mark.parametrize("dtype", XH)
@pytest.mark.parametrize("group", [0, 32])
def test_a53_the_offset_is_added_to_the_weight(dtype, group):
    rows = K // group if group else 1
    w, scale, offset = ints(K, N, low=-8, high=8), (floats(rows, N).abs() + 0.1).to(dtype), ints(rows, N, low=-8, high=8, seed=3).to(dtype)
    spread = (lambda t: t.double().repeat_interleave(group, 0)) if group else lambda t: t.double()
    decoded = ((w.double() + spread(offset)) * spread(scale)).to(dtype)
    for weight in (w, pack_words(w), pack_words(w.t().contiguous()).t()):
        close(npu.npu_weight_quant_batchmatmul(XH[dtype], weight, scale, offset, antiquant_group_size=group), XH[dtype].double() @ decoded.double())
    wrong = XH[dtype].double() @ ((w.double() - spread(offset)) * spread(scale))
    got = npu.npu_weight_quant_batchmatmul(XH[dtype], w, scale, offset, antiquant_group_size=group).double()
    assert (got - wrong).abs().max() > 1


def test_a54_both_orientations_of_packed_weights_mean_one_matrix():
    w, scale, x = ints(K, N, low=-8, high=8), SCALE.half()[None], XH[torch.float16]
    straight = npu.npu_weight_quant_batchmatmul(x, pack_words(w), scale)
    assert torch.equal(straight, npu.npu_weight_quant_batchmatmul(x, pack_words(w.t().contiguous()).t(), scale))
    with pytest.raises(LayoutError, match="one K"):  # words along K that nobody turned
        npu.npu_weight_quant_batchmatmul(x, pack_words(w.t().contiguous()), SCALE.half()[:1])


def test_a51_a_bfloat16_bias_must_become_float32():
    w, bias = ints(K, N), floats(N)
    scale = SCALE.to(torch.bfloat16)
    call = npu.npu_weight_quant_batchmatmul
    want = XH[torch.bfloat16].double() @ (w.double() * scale.double()).to(torch.bfloat16).double() + bias.double()
    close(call(XH[torch.bfloat16], w, scale, bias=bias), want)
    with pytest.raises(LayoutError, match=r"bias of torch.bfloat16"):
        call(XH[torch.bfloat16], w, scale, bias=bias.to(torch.bfloat16))
    with pytest.raises(LayoutError, match=r"bias of torch.float32"):
        call(XH[torch.float16], w, SCALE.half(), bias=bias)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": floats(M, K)}, "x of torch.float32"),
        ({"x": XH[torch.float16][:0]}, "empty x"),
        ({"weight": ints(K, N, dtype=torch.int16)}, "weight of torch.int16"),
        ({"weight": ints(K, N // 4, dtype=torch.int32)[:, ::2]}, "with gaps"),
        ({"antiquant_scale": SCALE[None]}, "antiquant_scale of torch.float32"),
        ({"antiquant_scale": SCALE.bfloat16()[None]}, "antiquant_scale of torch.bfloat16"),
        ({"antiquant_offset": SCALE.half()}, "antiquant_offset"),
        ({"antiquant_offset": SCALE[None]}, "antiquant_offset of torch.float32"),
        ({"antiquant_scale": SCALE.half().expand(4, -1), "antiquant_group_size": 16}, "a multiple of 32"),
        ({"antiquant_scale": SCALE.half()[None], "antiquant_group_size": K}, "from 32 to K - 1"),
        ({"antiquant_group_size": 32}, "antiquant_scale"),
        ({"quant_scale": torch.ones(1)}, "quant_scale"),
    ],
)
def test_weight_only_call_that_breaks_the_contract_is_an_error(change, reason):
    call = {"x": XH[torch.float16], "weight": ints(K, N), "antiquant_scale": SCALE.half()[None]} | change
    with pytest.raises(LayoutError, match=reason):
        npu.npu_weight_quant_batchmatmul(**call)


def test_tiles_are_whole_or_refused():
    whole = ints(32, 64)
    assert npu.npu_format_cast(whole, 29) is whole
    for wrong in (ints(24, 64), ints(32, 48), ints(64, 32).t(), floats(32, 64)):
        with pytest.raises(LayoutError, match="npu_format_cast"):
            npu.npu_format_cast(wrong, 29)
    with pytest.raises(LayoutError, match="FRACTAL_NZ"):
        npu.npu_format_cast(whole, 2)


# ---- activations ----


def test_dynamic_quantization_takes_each_row_to_127():
    x = torch.tensor([[1.0, -2.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float16)
    codes, scale = npu.npu_dynamic_quant(x)
    assert codes.tolist() == [[64, -127, 32, 0], [0, 0, 0, 0]]  # 63.5 and 31.75, ties to even
    assert scale.dtype == torch.float32 and torch.equal(scale, torch.tensor([2.0 / 127, 0.0]))
    words, small = npu.npu_dynamic_quant(floats(3, 16, dtype=torch.bfloat16), dst_type=torch.quint4x2)
    assert words.shape == (3, 2) and words.dtype == torch.int32 and unpack_words(words).abs().amax(1).tolist() == [7, 7, 7]
    assert torch.equal(small, floats(3, 16, dtype=torch.bfloat16).float().abs().amax(1) / 7)


def test_dynamic_quantization_is_the_schemes_own():
    x = floats(7, 40, dtype=torch.bfloat16)
    codes, scale, _ = ActivationSpec("int8", "token", top=127.0).quantize(x)
    got = npu.npu_dynamic_quant(x)
    assert torch.equal(got[0], codes) and torch.equal(got[1], scale[:, 0])


@pytest.mark.parametrize(
    ("x", "options"), [(floats(3, 16), {}), (floats(16, dtype=torch.float16), {}), (floats(0, 16, dtype=torch.float16), {}), (floats(3, 12, dtype=torch.float16), {"dst_type": torch.quint4x2})]
)
def test_what_dynamic_quantization_does_not_take_is_an_error(x, options):
    with pytest.raises(LayoutError, match="npu_dynamic_quant"):
        npu.npu_dynamic_quant(x, **options)


def test_static_quantization_divides_and_adds_the_zero_point():
    x, scale, zero = torch.tensor([[1.0, -1.0, 90.0]]), torch.tensor([0.5]), torch.tensor([-7], dtype=torch.int32)
    assert npu.npu_quantize(x, scale, zero, torch.qint8, 1, True).tolist() == [[-5, -9, 127]]
    assert npu.npu_quantize(x, scale, None, torch.qint8).tolist() == [[2, -2, 127]]
    wide, spec = floats(4, 33, dtype=torch.float16), ActivationSpec("int8", "tensor", symmetric=False, dynamic=False, scale=0.031, zero=-7)
    assert torch.equal(npu.npu_quantize(wide, torch.tensor([0.031]), zero, torch.qint8), spec.quantize(wide)[0])


@pytest.mark.parametrize(
    "change",
    [{"div_mode": False}, {"dtype": torch.quint8}, {"scales": torch.ones(2)}, {"scales": torch.ones(1).half()}, {"zero_points": torch.zeros(1)}, {"axis": 3}],
)
def test_what_static_quantization_does_not_take_is_an_error(change):
    call = {"tensor": floats(2, 3), "scales": torch.ones(1), "zero_points": None, "dtype": torch.qint8} | change
    with pytest.raises(LayoutError, match="npu_quantize"):
        npu.npu_quantize(**call)


# ---- microscaling ----

MX = {torch.float8_e4m3fn: "fp8_e4m3fn", torch.float8_e5m2: "fp8_e5m2", npu.float4_e2m1fn_x2: "fp4_e2m1"}


@pytest.mark.parametrize("kind", MX, ids=lambda k: MX[k])
@pytest.mark.parametrize("k", [32, 64, 96, 80])
def test_microscaled_activations_are_the_schemes_own(kind, k):
    x = floats(3, k, dtype=torch.bfloat16) * 3
    codes, scales = npu.npu_dynamic_mx_quant(x, dst_type=kind)
    spec = ActivationSpec(MX[kind], "group", 32, scale_type="e8m0", exponent_rule="floor")
    values, wide, _ = spec.quantize(x)
    assert scales.shape == (3, -(-k // 64), 2) and scales.dtype == torch.uint8
    assert torch.equal(torch.exp2(scales.flatten(1)[:, : wide.shape[1]].float() - 127), wide)
    if kind == npu.float4_e2m1fn_x2:
        assert codes.shape == (3, k // 2)
        codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()]
    assert torch.equal(codes.float(), values)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, npu.float4_e2m1fn_x2], ids=["fp8", "fp4"])
def test_microscaled_product_against_float64(kind):
    x, w, k = floats(4, 96, dtype=torch.bfloat16), floats(10, 96, dtype=torch.bfloat16, seed=1), 96
    (a, sa), (b, sb) = (npu.npu_dynamic_mx_quant(v, dst_type=kind) for v in (x, w))
    types = {} if kind != npu.float4_e2m1fn_x2 else {"x1_dtype": kind, "x2_dtype": kind}
    call = {"scale_dtype": npu.float8_e8m0fnu, "pertoken_scale_dtype": npu.float8_e8m0fnu, "output_dtype": torch.float32, "group_sizes": [1, 1, 32], **types}
    spec = ActivationSpec(MX[kind], "group", 32, scale_type="e8m0", exponent_rule="floor")
    bias = floats(10)
    want = spec.fake_quantize(x).double() @ spec.fake_quantize(w).double().T + bias.double()
    got = npu.npu_quant_matmul(a, b.t(), sb.transpose(0, 1), pertoken_scale=sa, bias=bias, **call)
    assert got.shape == (4, 10) and (got.double() - want).abs().max() < 1e-6 * want.abs().max()
    wrong = [
        ({"scale": sb}, "scale"), ({"pertoken_scale": sa[:, :1]}, "pertoken_scale"), ({"pertoken_scale": None}, "e8m0 on both sides"),
        ({"group_sizes": [1, 1, 16]}, "group_sizes"), ({"bias": bias.bfloat16()}, "bias"), ({"output_dtype": torch.int8}, "output"),
        ({"scale": sb.transpose(0, 1).contiguous()}, "different orders"), ({"scale_dtype": torch.uint8}, "e8m0"), ({"x2": b.t()[: k // 4]}, "one K|another order|scale"),
    ]  # fmt: skip
    for change, reason in wrong:
        options = {"x2": b.t(), "scale": sb.transpose(0, 1), "pertoken_scale": sa, "bias": bias, **call} | change
        with pytest.raises(LayoutError, match=reason):
            npu.npu_quant_matmul(a, options.pop("x2"), options.pop("scale"), **options)


def test_fp8_product_with_scales_per_token():
    a, b = floats(M, K).to(torch.float8_e4m3fn), floats(K, N, seed=1).to(torch.float8_e5m2)
    want = a.double() @ b.double() * SCALE.double() * TOKEN.double()[:, None]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        close(npu.npu_quant_matmul(a, b, SCALE, pertoken_scale=TOKEN, output_dtype=dtype), want)
    for change, reason in (({"bias": floats(N)}, "bias"), ({"pertoken_scale": None}, "one of each row"), ({"output_dtype": torch.int8}, "output"), ({"pertoken_scale": TOKEN[:1]}, "pertoken_scale")):
        with pytest.raises(LayoutError, match=reason):
            npu.npu_quant_matmul(a, b, SCALE, **({"pertoken_scale": TOKEN, "output_dtype": torch.float32} | change))
    with pytest.raises(LayoutError, match="fp8 on both sides"):
        npu.npu_quant_matmul(a, X2, SCALE, pertoken_scale=TOKEN, output_dtype=torch.float32)


def test_what_microscaling_does_not_take_is_an_error():
    for x, options in ((floats(2, 64), {}), (floats(2, 33, dtype=torch.float16), {}), (floats(2, 64, dtype=torch.float16), {"block_size": 16}), (floats(2, 64, dtype=torch.float16), {"scale_alg": 1})):
        with pytest.raises(LayoutError, match="npu_dynamic_mx_quant"):
            npu.npu_dynamic_mx_quant(x, **options)


# ---- groups of rows ----

ENDS = torch.tensor([2, 2, 5])
ROWS = [slice(0, 2), slice(2, 2), slice(2, 5)]
GROUPED = {"split_item": 3, "group_type": 0}


def by_group(x, weights):
    return torch.cat([x[rows].double() @ w.double() for rows, w in zip(ROWS, weights, strict=True)])


def test_int8_groups_give_sums_or_scaled_sums():
    weights = [ints(K, N, seed=s) for s in range(3)]
    exact = by_group(X1, weights)
    plain = npu.npu_grouped_matmul([X1], weights, group_list=ENDS, output_dtype=torch.int32, **GROUPED)[0]
    assert plain.dtype == torch.int32 and torch.equal(plain.double(), exact)
    stacked = npu.npu_grouped_matmul([X1], [torch.stack(weights)], group_list=torch.tensor([2, 0, 3]), group_list_type=1, output_dtype=torch.int32, **GROUPED)[0]
    assert torch.equal(stacked, plain)
    scales = [SCALE * (s + 1) for s in range(3)]
    factor = torch.cat([scales[i].double().expand(rows.stop - rows.start, -1) for i, rows in enumerate(ROWS)])
    scaled = npu.npu_grouped_matmul([X1], weights, scale=scales, per_token_scale=[TOKEN], group_list=ENDS, output_dtype=torch.float16, **GROUPED)[0]
    close(scaled, exact * factor * TOKEN.double()[:, None])


@pytest.mark.parametrize("dtype", XH)
@pytest.mark.parametrize("groups", [0, 2])
def test_decoded_groups_add_the_offset(dtype, groups):
    shape = (groups, N) if groups else (N,)
    weights = [ints(K, N, low=-8, high=8, seed=s) for s in range(3)]
    scale, offset = [(floats(*shape, seed=s).abs() + 0.1).to(dtype) for s in range(3)], [ints(*shape, low=-8, high=8, seed=s + 5).to(dtype) for s in range(3)]
    bias = [floats(N, seed=s).to(torch.float16 if dtype == torch.float16 else torch.float32) for s in range(3)]

    def spread(t):
        return t.double().repeat_interleave(K // groups, 0) if groups else t.double()

    decoded = [((w.double() + spread(o)) * spread(s)).to(dtype) for w, o, s in zip(weights, offset, scale, strict=True)]
    want = by_group(XH[dtype], decoded) + torch.cat([bias[i].double().expand(rows.stop - rows.start, -1) for i, rows in enumerate(ROWS)])
    call = {"antiquant_scale": scale, "antiquant_offset": offset, "bias": bias, "group_list": ENDS, **GROUPED}
    close(npu.npu_grouped_matmul([XH[dtype]], [pack_words(w) for w in weights], **call)[0], want)
    if not groups:
        close(npu.npu_grouped_matmul([XH[dtype]], weights, **call)[0], want)
        return
    with pytest.raises(LayoutError, match="of 4-bit integers"):
        npu.npu_grouped_matmul([XH[dtype]], weights, **call)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"group_list": torch.tensor([2, 1, 5])}, "sizes that add up"),
        ({"group_list": torch.tensor([2, 2, 4])}, "sizes that add up"),
        ({"group_list": torch.tensor([2, 5])}, "one per weight"),
        ({"group_list": torch.tensor([2, 2, 5], dtype=torch.int32)}, "int64"),
        ({"group_list": None}, "group_list"),
        ({"split_item": 0}, "split_item 2 or 3"),
        ({"group_type": 2}, "group_type 0"),
        ({"act_type": 5}, "no activation"),
        ({"x": [X1, X1]}, "one matrix"),
        ({"weight": [ints(K, N)] * 2 + [ints(K, N + 1)]}, "one shape"),
        ({"weight": [ints(K, N)] * 129, "group_list": torch.full((129,), M)}, "at most 128"),
        ({"scale": [SCALE]}, "one tensor per weight"),
        ({"scale": [SCALE] * 3, "output_dtype": torch.bfloat16}, "scale of torch.float32"),
        ({"output_dtype": torch.float16}, "with a scale"),
        ({"bias": [floats(N)] * 3}, "bias of int8 x"),
        ({"antiquant_scale": [SCALE.half()] * 3}, "antiquant_scale given"),
        ({"x": [XH[torch.float16]], "output_dtype": None}, "a scale or an offset is missing"),
        ({"x": [XH[torch.float16]], "antiquant_scale": [SCALE.half()] * 3, "antiquant_offset": [SCALE.half()] * 3, "bias": [floats(N)] * 3, "output_dtype": None}, "bias of torch.float32"),
    ],
)
def test_grouped_call_that_breaks_the_contract_is_an_error(change, reason):
    call = {"x": [X1], "weight": [ints(K, N, seed=s) for s in range(3)], "group_list": ENDS, "output_dtype": torch.int32, **GROUPED} | change
    with pytest.raises(LayoutError, match=reason):
        npu.npu_grouped_matmul(call.pop("x"), call.pop("weight"), **call)


def test_sizes_of_one_group_must_be_cumulative():
    with pytest.raises(LayoutError, match="1 for several groups"):
        npu.npu_grouped_matmul([X1], [X2], group_list=torch.tensor([M]), group_list_type=1, output_dtype=torch.int32, **GROUPED)


# ---- where operators come from ----


def on(monkeypatch, state, *features):
    platform = Platform("npu", "npu", frozenset(features), 1, 1, state)
    monkeypatch.setattr(lookup, "target", lambda key: platform)


def test_a_device_gets_the_packages_operators_and_everything_else_the_models(monkeypatch):
    package = SimpleNamespace(name="the package")
    monkeypatch.setitem(sys.modules, "torch_npu", package)
    on(monkeypatch, "present")
    assert lookup.operators("npu") is package
    for state in ("simulated", "planned"):
        on(monkeypatch, state)
        assert lookup.operators("npu") is npu


def test_operator_that_is_not_registered_is_refused_by_name(monkeypatch):
    on(monkeypatch, "present", "op:npu::npu_quant_matmul")
    assert lookup.missing("npu", "npu_quant_matmul") == ""
    assert lookup.missing("npu", "npu_quant_matmul", "npu_other") == "operators that are not registered: npu_other"
    on(monkeypatch, "simulated")
    assert lookup.missing("npu", *npu.__all__) == ""
    assert "no model of npu_other" in lookup.missing("npu", "npu_other")
    assert lookup.state("npu", "npu_quant_matmul") == "available (contract-tested; not run on hardware)"
    problem = LinearProblem(WeightSpec("int_affine", "uint8", 8, "channel", zero="constant", scale_dtype="float16"), ActivationSpec("int8", "token"), 8, 8, "float16")
    on(monkeypatch, "present", "int8_dot", "op:npu::npu_quant_matmul")
    monkeypatch.setattr("bitgrain.kernels.npu.integer_input.features", lambda key: frozenset({"int8_dot"}))
    assert NpuInt8Linear("npu").refusal(problem).reason == "operators that are not registered: npu_quantize, npu_dynamic_quant, npu_format_cast"


def test_without_a_device_the_state_says_what_the_probe_found(monkeypatch):
    on(monkeypatch, "planned")
    monkeypatch.setattr(lookup, "probe", lambda key: ProbeReport(key, "broken: no such library"))
    assert lookup.state("npu", "npu_quant_matmul") == "the device is broken: no such library"
