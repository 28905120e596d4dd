"""Weights in blocks through the native library: every type, exact packing, exact products, rows and threads that do not matter."""

from dataclasses import replace

import pytest
import torch

from bitgrain.conformance.grid import int_affine
from bitgrain.errors import BadValueError
from bitgrain.kernels.base import Fidelity, LinearProblem
from bitgrain.kernels.block_layouts import PLANES, SUPER_LAYOUTS, BlockLayout, BlockParts
from bitgrain.kernels.cpu import block_packing, library
from bitgrain.kernels.cpu.super_block import SuperBlockInt8Linear, SuperBlockLinear
from bitgrain.kernels.selection import Policy, select
from bitgrain.numerics.super_blocks import decode_blocks, write_block_scales
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, IntAffineWeight, SuperBlockWeight
from bitgrain.weights.block_float import block_float_spec
from bitgrain.weights.super_block import super_block_spec
from bitgrain.weights.synthetic import sample_weight

SETS = library.available_sets()
pytestmark = pytest.mark.skipif(not SETS, reason=library.missing() or "no instruction set")

SPECS = {
    **{kind.lower(): super_block_spec(kind) for kind in SUPER_LAYOUTS},
    **{name: int_affine(bits, "group", group) for name, bits, group in (("q4_0", 4, 32), ("q5_0", 5, 32), ("q8_0", 8, 32), ("q2_0", 2, 64), ("tq2_0", 2, 256), ("g512", 4, 512))},
    "channel": int_affine(5, "channel"),
    "tensor": int_affine(4, "tensor"),
    **{f"points-{bits}": int_affine(bits, "group", 64, zero="integer", scale="bfloat16") for bits in (2, 3, 4, 8)},
    "points-channel": int_affine(4, "channel", zero="integer"),
    "fractions": int_affine(4, "group", 64, zero="float"),
    "wide-scales": int_affine(4, "group", 128, zero="integer", scale="float32"),
    "mxfp4": block_float_spec("fp4_e2m1", 32, "e8m0"),
    "nvfp4": block_float_spec("fp4_e2m1", 16, "e4m3", "tensor"),
    "nvfp4-stacked": block_float_spec("fp4_e2m1", 16, "e4m3", "channel"),
}
EXACT, FAST = SuperBlockLinear(), SuperBlockInt8Linear()
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def widths(spec):
    """In features: whole records of 256, and a last one that is short where the type allows it."""
    block = spec.group_size if spec.kind == "super_block" else 32
    return sorted({-(-k // block) * block for k in (32, 512, 736)})


def inputs(rows, k, dtype, seed=1):
    """Numbers of a model's kind: most of order 1, a few a hundred times as large, a mean."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator) + 0.1
    x[torch.rand(rows, k, generator=generator) < 0.005] *= 100
    return x.to(dtype)


def relative_error(y, want):
    return ((y.double() - want).abs() / want.abs().amax(1, keepdim=True)).max().item()


@pytest.fixture(params=SETS)
def instruction_set(request):
    before = library.instruction_set()
    library.choose_instruction_set(request.param)
    yield request.param
    library.choose_instruction_set(before)


@pytest.mark.parametrize("name", SPECS)
def test_packed_weights_decode_to_the_definition_bit_for_bit(name):
    for k in widths(SPECS[name]):
        weight = sample_weight(SPECS[name], 37, k)
        assert torch.equal(EXACT.unpack(EXACT.prepare(weight, NO_ACTIVATION)), weight.dequantize())


@pytest.mark.parametrize("name", SPECS)
def test_packed_weights_take_what_the_checkpoint_takes(name):
    weight = sample_weight(SPECS[name], 64, 1024)
    if name != "tq1_0":  # five digits in a byte become two bits each
        assert EXACT.prepare(weight, NO_ACTIVATION).tensors["packed"].numel() <= 1.07 * weight.nbytes


@pytest.mark.parametrize("code", PLANES)
def test_packed_blocks_hold_what_they_were_given(code):
    top, generator = 1 << sum(width for width, _ in PLANES[code]), torch.Generator().manual_seed(code)
    for n, k, span in ((32, 96, 96), (37, 544, 32), (5, 800, 128)):
        layout = BlockLayout(code, 16, span, sub=1, minimum=2)  # sub-scales and minima of both levels
        codes = torch.randint(0, top, (n, k), dtype=torch.uint8, generator=generator)
        scale, minima = torch.randn(2, n, -(-k // span), generator=generator).half()
        sub, sub_minima = torch.randint(0, 256, (2, n, k // 16), dtype=torch.uint8, generator=generator)
        parts = block_packing.unpack(layout, block_packing.pack(layout, BlockParts(codes, scale, minima, None, sub, sub_minima), k), torch.float16, None, n, k)
        for got, want in ((parts.codes, codes), (parts.scale, scale), (parts.minima, minima), (parts.sub, sub), (parts.sub_minima, sub_minima)):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", SPECS)
def test_products_agree_with_the_definition(name, instruction_set):
    for k in widths(SPECS[name]):
        weight = sample_weight(SPECS[name], 37, k)
        prepared, bias = EXACT.prepare(weight, NO_ACTIVATION), torch.randn(37, generator=torch.Generator().manual_seed(2))
        for rows in (1, 3, 40):
            for dtype, limit in LIMITS.items():
                x, shift = inputs(rows, k, dtype), bias.to(dtype) if rows != 3 else None
                want = x.double() @ weight.dequantize().double().T + (0 if shift is None else shift.double())
                y = EXACT.apply(x, prepared, shift)
                assert y.dtype == dtype
                assert relative_error(y, want) <= limit, (k, rows, dtype)


def rounded(x, top):
    """x as the fast kernel sees it: integers up to `top` times a scale per token and 32 in features."""
    groups = x.float().unflatten(1, (-1, 32))
    largest = groups.abs().amax(2, keepdim=True)
    return ((groups * (top / largest)).round().double() * (largest / top).double()).flatten(1)


@pytest.mark.parametrize("name", SPECS)
def test_fast_products_are_those_of_inputs_rounded_to_int8(name, instruction_set):
    # codes of eight bits are multiplied as words by this instruction set
    wide = instruction_set == "avx2" and name in ("q8_0", "points-8", "iq4_nl", "iq4_xs")
    for k in widths(SPECS[name]):
        weight = sample_weight(SPECS[name], 37, k)
        prepared = FAST.prepare(weight, NO_ACTIVATION)
        for rows, dtype in ((1, torch.float32), (3, torch.bfloat16), (40, torch.float32), (34, torch.float16)):
            x = inputs(rows, k, dtype)
            want = rounded(x, 32767.0 if wide else 127.0) @ weight.dequantize().double().T
            assert relative_error(FAST.apply(x, prepared, None), want) <= 2 * LIMITS[dtype], (k, rows, dtype)


@pytest.mark.parametrize("rows", [2, 5, 31, 32, 33, 64, 130])
def test_every_number_of_rows_gives_each_row_its_own_result(rows, instruction_set):
    weight = sample_weight(SPECS["q4_k"], 83, 256)
    prepared, x = EXACT.prepare(weight, NO_ACTIVATION), inputs(130, 256, torch.float32)
    alone = torch.cat([EXACT.apply(x[i : i + 1], prepared, None) for i in range(rows)])
    assert torch.equal(EXACT.apply(x[:rows], prepared, None), alone)


def test_rows_that_the_last_cache_does_not_hold_at_once_have_the_same_results():
    weight = sample_weight(SPECS["q4_0"], 83, 8192)
    prepared, x, bias = EXACT.prepare(weight, NO_ACTIVATION), inputs(150, 8192, torch.bfloat16), torch.randn(83).bfloat16()
    whole = EXACT.apply(x, prepared, bias)
    for first, last in ((0, 1), (63, 65), (64, 128), (128, 150)):
        assert torch.equal(EXACT.apply(x[first:last], prepared, bias), whole[first:last])


@pytest.mark.parametrize("kernel", [EXACT, FAST], ids=lambda k: k.name)
@pytest.mark.parametrize("name", SPECS)
def test_rows_that_need_other_numbers_of_digits_change_no_bit_of_each_other(name, kernel, instruction_set):
    """Rows that share registers are multiplied with as many digits as the longest of them has."""
    k = widths(SPECS[name])[-1]
    prepared, x = kernel.prepare(sample_weight(SPECS[name], 37, k), NO_ACTIVATION), inputs(16, k, torch.float32)
    x[0::4] = x[0::4].clamp(-4, 4).round()  # one digit
    x[1::4] = x[1::4].bfloat16()  # two or three
    x[2] = 0
    x[5, :40] = 0
    x[7, 3] = float("inf")
    alone = torch.cat([kernel.apply(x[i : i + 1], prepared, None) for i in range(16)])
    for start, stop in ((0, 16), (1, 16), (2, 9), (3, 6), (4, 6)):
        assert torch.allclose(kernel.apply(x[start:stop], prepared, None), alone[start:stop], rtol=0, atol=0, equal_nan=True), (start, stop)


@pytest.mark.parametrize("kernel", [EXACT, FAST], ids=lambda k: k.name)
@pytest.mark.parametrize("name", ["q4_0", "q6_k", "q8_0", "iq4_xs", "nvfp4"])
def test_threads_and_neighbours_change_no_bit(name, kernel, instruction_set):
    prepared, x = kernel.prepare(sample_weight(SPECS[name], 200, 512), NO_ACTIVATION), inputs(40, 512, torch.bfloat16)
    whole, threads = kernel.apply(x, prepared, None), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(kernel.apply(x, prepared, None), whole)
    finally:
        torch.set_num_threads(threads)
    for start, stop in ((0, 1), (39, 40), (7, 12)):
        assert torch.equal(kernel.apply(x[start:stop], prepared, None), whole[start:stop])


def test_the_long_shares_of_one_row_cover_every_out_feature(instruction_set):
    """82 panels: ten, five or four at a time, by the number of threads; the last share is short."""
    prepared, x, threads = EXACT.prepare(sample_weight(SPECS["q4_0"], 1301, 64), NO_ACTIVATION), inputs(2, 64, torch.bfloat16), torch.get_num_threads()
    whole = EXACT.apply(x, prepared, None)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(EXACT.apply(x[:1], prepared, None), whole[:1])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("huge", [1023.0, -1.0, 511.75])
def test_neighbours_of_a_huge_number_keep_their_bits(bits, huge, instruction_set):
    """A huge number meets weights of zero: its neighbours, 2^-20 and below of it, are summed without loss."""
    zero = 1 << (bits - 1)
    codes = torch.full((3, 64), zero + 1, dtype=torch.uint8)
    codes[:, 0] = zero
    codes[1, 1:] = 0
    weight = IntAffineWeight.from_codes(codes, bits, torch.ones(3, 2, dtype=torch.float16), zero, 32)
    x = torch.full((1, 64), abs(huge) * 2.0**-22 if huge < 0 else 2.0**-20)
    x[0, 0] = huge
    y = EXACT.apply(x, EXACT.prepare(weight, NO_ACTIVATION), None)
    assert torch.equal(y[0].double(), weight.dequantize().double()[:, 1:] @ x[0, 1:].double())


@pytest.mark.parametrize("dtype", LIMITS)
def test_every_code_is_read_as_the_definition_reads_it(dtype, instruction_set):
    """Columns of the identity read the weights one by one: all codes, sub-scales and minima of random blocks."""
    for name, spec in SPECS.items():
        k = max(256, widths(spec)[0])
        weight = sample_weight(spec, 33, k)
        y = EXACT.apply(torch.eye(k, dtype=dtype), EXACT.prepare(weight, NO_ACTIVATION), None)
        want = weight.dequantize().T
        if name in ("q4_1", "q5_1", "q2_k", "q4_k", "q5_k", "fractions", "wide-scales"):
            # scale * code - minimum rounds once here and twice there, or the other way round
            assert torch.allclose(y.float(), want, rtol=2 * LIMITS[dtype], atol=1e-6 * want.abs().max().item()), name
        elif name.startswith("nvfp4"):
            # two scales, in another order
            assert torch.allclose(y, want.to(dtype), rtol=2 * LIMITS[dtype], atol=0), name
        else:
            assert torch.equal(y, want.to(dtype)), name


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "q8_0", "q6_k"])
def test_what_is_not_finite_stays_in_its_row(name, instruction_set):
    weight = sample_weight(SPECS[name], 40, 512)
    prepared, x = EXACT.prepare(weight, NO_ACTIVATION), inputs(5, 512, torch.float32)
    clean = EXACT.apply(x, prepared, None)
    x[1, 300], x[3, 40] = float("nan"), float("-inf")
    y = EXACT.apply(x, prepared, None)
    assert torch.equal(y[[0, 2, 4]], clean[[0, 2, 4]])
    assert y[1].isnan().all() and not y[3].isfinite().any()
    zeros = EXACT.apply(torch.zeros(2, 512), prepared, None)
    assert torch.equal(zeros, torch.zeros(2, 40))


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30])
def test_tiny_and_large_inputs_scale(scale, instruction_set):
    weight = sample_weight(SPECS["q5_k"], 20, 256)
    prepared, x = EXACT.prepare(weight, NO_ACTIVATION), inputs(2, 256, torch.float32) * scale
    want = x.double() @ weight.dequantize().double().T
    assert (EXACT.apply(x, prepared, None).double() - want).abs().max() <= 2e-6 * want.abs().max() + 1e-37
    assert (FAST.apply(x, prepared, None).double() - want).abs().max() <= 3e-2 * want.abs().max() + 1e-37


def test_no_rows_give_no_rows():
    prepared = EXACT.prepare(sample_weight(SPECS["q4_k"], 32, 256), NO_ACTIVATION)
    assert tuple(EXACT.apply(torch.empty(0, 256), prepared, None).shape) == (0, 32)


@pytest.mark.parametrize("name", ["q4_k", "q6_k", "q4_1"])
def test_stacked_weights_are_the_parts_side_by_side(name):
    parts = [sample_weight(SPECS[name], n, 512, seed=n) for n in (24, 7, 50)]
    x = inputs(3, 512, torch.float32)
    whole = EXACT.apply(x, EXACT.prepare(type(parts[0]).concat(parts), NO_ACTIVATION), None)
    assert torch.equal(whole, torch.cat([EXACT.apply(x, EXACT.prepare(p, NO_ACTIVATION), None) for p in parts], dim=1))


def test_selection_takes_the_exact_kernel_and_the_rough_one_only_when_asked():
    problem = LinearProblem(SPECS["q4_k"], NO_ACTIVATION, 64, 256, "bfloat16")
    exact = select(problem, "cpu", Policy())
    assert exact.kernel.name == EXACT.name and exact.fidelity is Fidelity.EXACT
    assert "--fidelity fast" in {c.name: c.reason for c in exact.candidates}[FAST.name]
    fast = select(problem, "cpu", Policy(fidelity="fast"))
    assert fast.kernel.name == FAST.name and fast.fidelity is Fidelity.APPROXIMATE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("zero", ["constant", "integer", "float"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_have_a_fast_form_whatever_their_scales_and_zero_points(bits, zero, dtype):
    for granularity, group in (("group", 64), ("channel", 0), ("tensor", 0)):
        problem = LinearProblem(int_affine(bits, granularity, group, zero, scale=dtype), NO_ACTIVATION, 64, 256, "bfloat16")
        assert select(problem, "cpu", Policy(fidelity="fast")).kernel.name == FAST.name


def test_zero_points_that_are_no_bytes_are_kept_as_numbers():
    codes = torch.randint(0, 256, (20, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))
    scale = torch.rand(20, 2, generator=torch.Generator().manual_seed(10)).bfloat16()
    for zero, width in ((torch.tensor([0, 255]), 1), (torch.tensor([0, 256]), 2), (torch.tensor([-3, 7]), 2), (torch.tensor([257, 1]), 4), (torch.tensor([0.5, 3]), 2), (torch.tensor([0.1, 3]), 4)):
        held = zero.to(torch.int16 if zero.dtype == torch.int64 else torch.float32).expand(20, 2).contiguous()
        weight = IntAffineWeight.from_codes(codes, 8, scale, held, 32)
        prepared, x = EXACT.prepare(weight, NO_ACTIVATION), inputs(3, 64, torch.float32)
        beside = prepared.tensors["packed"].numel() - 32 * 64
        assert beside == 32 * 2 * (max(width, 2) + width)  # scales, and the points in a byte or as wide as the scales
        assert torch.equal(EXACT.unpack(prepared), weight.dequantize())
        assert relative_error(EXACT.apply(x, prepared, None), x.double() @ weight.dequantize().double().T) <= 2e-6


@pytest.mark.parametrize(
    ("spec", "k", "act", "reason"),
    [
        (super_block_spec("IQ2_XXS"), 256, NO_ACTIVATION, "not iq2_xxs"),
        (int_affine(5, "group", 24), 96, NO_ACTIVATION, "multiple of 32"),
        (int_affine(5, "group", 96), 96, NO_ACTIVATION, "groups of 96"),
        (int_affine(5, "group", 32, index=True), 96, NO_ACTIVATION, "in order"),
        (block_float_spec("fp4_e2m1", 32, "e8m0"), 96, NO_ACTIVATION, "cpu.block_float"),
        (int_affine(5, "group", 32), 72, NO_ACTIVATION, "multiples of 32"),
        (block_float_spec("fp8_e4m3fn", 32, "e8m0"), 64, NO_ACTIVATION, "four-bit floats"),
        (block_float_spec("fp4_e2m1", 16, "e4m3", "group"), 64, NO_ACTIVATION, "per channel or tensor"),
        (int_affine(5, "group", 32), 64, ActivationSpec("int8", "token"), "activations"),
    ],
)
def test_refusals_give_the_reason(spec, k, act, reason):
    assert reason in EXACT.refusal(LinearProblem(spec, act, 16, k, "float32")).reason


@pytest.mark.parametrize("name", sorted(SPECS))
def test_rows_come_out_of_the_panels_to_the_bit(name):
    index = torch.tensor([36, 0, 17, 17, 3, 16, *range(5, 25)])
    for k in widths(SPECS[name]):
        weight = sample_weight(SPECS[name], 37, k)
        for some in (index, index[:1], index[:0]):
            assert torch.equal(EXACT.rows(EXACT.prepare(weight, NO_ACTIVATION), some), weight.dequantize()[some])


@pytest.mark.parametrize("dtype, name", [("bfloat16", "amx"), ("bfloat16", "avx512bf16"), ("bfloat16", "avx512"), ("float16", "amx"), ("float32", "amx")])
def test_weights_go_where_bfloat16_products_are_exact_and_fast(monkeypatch, dtype, name):
    monkeypatch.setattr("bitgrain.kernels.cpu.super_block.instruction_set", lambda: name)
    has_products = dtype == "bfloat16" and name != "avx512"
    for spec, other, refused in (
        (int_affine(4, "group", 32), "cpu.int_affine", has_products),
        (int_affine(8, "group", 32), "cpu.int_affine", has_products),
        (int_affine(5, "group", 32), "cpu.int_affine", False),
        (SPECS["mxfp4"], "cpu.block_float", has_products or dtype == "float32"),
        (SPECS["nvfp4"], "cpu.block_float", has_products or dtype == "float32"),
    ):
        found = EXACT.refusal(LinearProblem(spec, NO_ACTIVATION, 16, 96, dtype))
        assert (found is not None and other in found.reason) is refused, spec


def test_scales_that_are_no_numbers_are_refused():
    for name, code in (("mxfp4", 255), ("nvfp4", 127)):
        weight = sample_weight(SPECS[name], 16, 64)
        weight.scale[3, 1] = code
        with pytest.raises(BadValueError, match="1 block scales"):
            EXACT.prepare(weight, NO_ACTIVATION)


def test_the_smallest_exponent_is_read():
    for least, has_factor in ((2, False), (1, True), (0, True)):
        weight = sample_weight(SPECS["mxfp4"], 20, 64)
        weight.scale[3, 1] = least
        prepared = EXACT.prepare(weight, NO_ACTIVATION)
        assert ("factor" in prepared.tensors) is has_factor
        assert torch.equal(EXACT.unpack(prepared), weight.dequantize())


def test_blocks_with_zero_and_negative_scales_are_read():
    packed = torch.randint(0, 256, (16, 144), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    write_block_scales(packed, "Q4_K", torch.linspace(-1, 1, 16).round(decimals=1))
    weight, x = SuperBlockWeight(packed, "Q4_K"), inputs(2, 256, torch.float32)
    want = x.double() @ decode_blocks(packed, "Q4_K").double().T
    assert relative_error(EXACT.apply(x, EXACT.prepare(weight, NO_ACTIVATION), None), want) <= 2e-6


def test_fake_tensors_carry_shapes_through_the_operator():
    from torch._subclasses.fake_tensor import FakeTensorMode

    prepared = EXACT.prepare(sample_weight(SPECS["q6_k"], 48, 256), NO_ACTIVATION)
    with FakeTensorMode() as mode:
        held = {name: mode.from_tensor(tensor) for name, tensor in prepared.tensors.items()}
        y = EXACT.apply(torch.empty(7, 256, dtype=torch.bfloat16), replace(prepared, tensors=held), None)
    assert tuple(y.shape) == (7, 48) and y.dtype == torch.bfloat16
