"""Quark: golden modules of the producer, every storage against packers and decoders written bit by bit, and refusals of data."""

import math

import pytest
import torch

from bitgrain.errors import BadValueError, ConfigError, LabelMismatchError, ShapeMismatchError
from bitgrain.formats.quark import QuarkConfig
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, BlockFloatWeight, IntAffineWeight, Transformed
from tests.golden_checks import check_golden, golden_folders
from tests.unit.formats.golden_cases import problems_of
from tests.unit.formats.synthetic import NAME, evidence, view

RANGES = {"int2": (-2, 1), "uint2": (0, 3), "int3": (-4, 3), "int4": (-8, 7), "uint4": (0, 15), "int8": (-128, 127), "uint8": (0, 255)}
BITS = {name: int(name[-1]) for name in RANGES}
REORDER = [0, 2, 4, 6, 1, 3, 5, 7]
FLOATS = {"fp4": (2, 1, 1), "fp6_e2m3": (2, 3, 1), "fp6_e3m2": (3, 2, 3)}  # exponent bits, mantissa bits, bias


def spec(dtype, qscheme, **more):
    """One tensor specification as the producer writes it."""
    axis = {"per_channel": 0, "per_group": -1}.get(qscheme)
    return {"dtype": dtype, "qscheme": qscheme, "ch_axis": axis, "group_size": None, "symmetric": True, "is_dynamic": False, **more}


def layer(weight, inputs=None, **more):
    return {"weight": weight, "input_tensors": inputs, "output_tensors": None, "bias": None, "target_device": None, **more}


def parse(weight, inputs=None, pack_method="reorder", **more):
    export = {"pack_method": pack_method, "weight_format": "real_quantized", "kv_cache_group": [], "min_kv_scale": 0.0, "weight_merge_groups": None}
    section = {"quant_method": "quark", "global_quant_config": layer(weight, inputs), "exclude": ["lm_head"], "export": export, "version": "0.13", **more}
    return QuarkConfig.parse(evidence(section))


def decode(config, tensors, shape=None):
    """(weight, scheme) of a module whose headers fit its scheme, with the architecture's shape and, where it shows, without."""
    module = view(tensors, shape=shape)
    scheme = config.decide(module).scheme
    assert problems_of(scheme, module) == []
    weight = scheme.to_weight(tensors)
    assert weight.spec == scheme.weight_spec
    assert scheme.transforms_input == isinstance(weight, Transformed)
    return weight, scheme


# --- packers, one value at a time ---------------------------------------------------------------------------------


def signed32(word):
    return word - (1 << 32) if word >= 1 << 31 else word


def pack_row(values, dtype, reorder):
    """The stored elements of one row of codes."""
    mask = (1 << BITS[dtype]) - 1
    if BITS[dtype] == 4:
        order = REORDER if reorder else range(8)
        padded = [*values, *[0] * (-len(values) % 8)]
        return [signed32(sum((padded[c + j] & mask) << (4 * i) for i, j in enumerate(order))) for c in range(0, len(padded), 8)]
    if dtype == "int3":
        words = [sum((v & 7) << (3 * i) for i, v in enumerate(values[c : c + 8])) for c in range(0, len(values), 8)]
        return [(word >> shift) & 255 for word in words for shift in (0, 8, 16)]
    if dtype == "uint2":
        return [sum(v << (6 - 2 * i) for i, v in enumerate(values[c : c + 4])) for c in range(0, len(values), 4)]
    return list(values)


def pack(matrix, dtype, reorder=True):
    stored = {"int8": torch.int8, "uint8": torch.uint8, "int3": torch.uint8, "uint2": torch.uint8}.get(dtype, torch.int32)
    return torch.tensor([pack_row(row, dtype, reorder) for row in matrix.tolist()], dtype=stored)


def int_module(dtype, granularity, n=40, k=96, group=32, *, symmetric=False, reorder=True, float_zero=False, seed=0):
    """(tensors, the weight that they mean)."""
    torch.manual_seed(seed)
    low, high = RANGES[dtype]
    rows, groups = {"tensor": (1, 1), "channel": (n, 1), "group": (n, -(-k // group))}[granularity]
    codes = torch.randint(low, high + 1, (n, k))
    scale = (torch.rand(rows, groups) * 0.02 + 0.001).bfloat16()
    zero = torch.zeros(rows, groups, dtype=torch.int64) if symmetric else torch.randint(low, high + 1, (rows, groups))
    per_column = [min(c // group, groups - 1) for c in range(k)]
    weight = torch.stack([(codes[:, c] - zero[:, g]).float() * scale[:, g].float() for c, g in enumerate(per_column)], dim=1)
    turned = granularity == "group" and dtype != "int3"
    tensors = {"weight": pack(codes.t() if turned else codes, dtype, reorder)}
    tensors["weight_scale"] = {"tensor": scale[0, 0], "channel": scale[:, 0], "group": scale.t().contiguous()}[granularity]
    small = {"int8": torch.int8, "uint8": torch.uint8}.get(dtype, torch.int32)
    if granularity == "tensor":
        tensors["weight_zero_point"] = zero[0, 0].to(small)
    elif float_zero:
        tensors["weight_zero_point"] = (zero.t() if granularity == "group" else zero[:, 0]).int().contiguous()
    elif granularity == "channel":
        tensors["weight_zero_point"] = pack(zero.t(), dtype, reorder)[0]
    else:
        tensors["weight_zero_point"] = pack(zero if dtype == "int3" else zero.t(), dtype, reorder)
    return tensors, weight


def int_spec(dtype, granularity, group=32, symmetric=False, **more):
    return spec(dtype, f"per_{granularity}", group_size=group if granularity == "group" else None, symmetric=symmetric, **more)


def naive_float(code, dtype):
    exponent_bits, mantissa_bits, bias = FLOATS[dtype]
    mantissa, exponent = code % (1 << mantissa_bits), (code >> mantissa_bits) % (1 << exponent_bits)
    value = (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias) if exponent else mantissa / 2**mantissa_bits * 2.0 ** (1 - bias)
    return -value if code >> (exponent_bits + mantissa_bits) else value


def float_codes(dtype, n, k, seed=0):
    """(codes, their values)."""
    torch.manual_seed(seed)
    codes = torch.randint(0, 16 if dtype == "fp4" else 64, (n, k))
    return codes, torch.tensor([[naive_float(c, dtype) for c in row] for row in codes.tolist()])


def pack_floats(codes, dtype):
    """Pairs with the even column low, or four six-bit codes in three bytes with the first one lowest."""
    per, size = (2, 4) if dtype == "fp4" else (4, 6)
    rows = []
    for row in codes.tolist():
        words = [sum(c << (size * i) for i, c in enumerate(row[at : at + per])) for at in range(0, len(row), per)]
        rows.append([(word >> shift) & 255 for word in words for shift in range(0, per * size, 8)])
    return torch.tensor(rows, dtype=torch.uint8)


# --- golden ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", golden_folders("quark"), ids=lambda p: p.name)
def test_golden_module_dequantizes_to_the_producers_values(folder):
    assert check_golden(folder) >= 1


# --- integers ----------------------------------------------------------------------------------------------------


# the producer cannot pack a single zero point of int3 or uint2
KINDS = [(d, g) for d in RANGES for g in ("tensor", "channel", "group") if g != "tensor" or d not in ("int3", "uint2")]


@pytest.mark.parametrize(("dtype", "granularity"), KINDS)
def test_integers_of_every_type_and_granularity_decode_exactly(dtype, granularity):
    group = 12 if dtype == "int3" else 32  # eight groups, since their zero points are packed in eights
    tensors, want = int_module(dtype, granularity, group=group)
    weight, _ = decode(parse(int_spec(dtype, granularity, group)), tensors)
    assert isinstance(weight, IntAffineWeight)
    assert torch.equal(weight.dequantize(), want)
    known, _ = decode(parse(int_spec(dtype, granularity, group)), tensors, shape=(40, 96))
    assert torch.equal(known.dequantize(), want)


@pytest.mark.parametrize("granularity", ["channel", "group"])
@pytest.mark.parametrize("reorder", [True, False], ids=["reorder", "order"])
@pytest.mark.parametrize("n", [37, 40, 41])
def test_four_bit_rows_that_end_inside_a_word_decode_exactly_in_both_orders(reorder, granularity, n):
    tensors, want = int_module("uint4", granularity, n=n, k=64, reorder=reorder)
    config = parse(int_spec("uint4", granularity), pack_method="reorder" if reorder else "order")
    for shape in (None, (n, 64)):
        assert torch.equal(decode(config, tensors, shape)[0].dequantize(), want)
    other = parse(int_spec("uint4", granularity), pack_method="order" if reorder else "reorder")
    assert not torch.equal(decode(other, tensors)[0].dequantize(), want)


def test_odd_number_of_columns_decodes_exactly_where_the_architecture_gives_it():
    tensors, want = int_module("int4", "channel", n=24, k=83)
    assert torch.equal(decode(parse(int_spec("int4", "channel")), tensors, (24, 83))[0].dequantize(), want)


def test_symmetric_zero_points_are_constant_may_be_absent_and_must_be_zero():
    tensors, want = int_module("int4", "group", symmetric=True)
    config = parse(int_spec("int4", "group", symmetric=True))
    weight, _ = decode(config, tensors)
    assert weight.zero == 8 and torch.equal(weight.dequantize(), want)
    stored = tensors.pop("weight_zero_point")
    assert torch.equal(decode(config, tensors)[0].dequantize(), want)
    with pytest.raises(LabelMismatchError, match="weight_zero_point"):
        decode(config, tensors | {"weight_zero_point": stored + 1})


@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_zero_points_called_float_are_stored_one_by_one(granularity):
    tensors, want = int_module("uint4", granularity, float_zero=True)
    weight, _ = decode(parse(int_spec("uint4", granularity, zero_point_type="float32")), tensors)
    assert weight.zero.dtype == torch.float32 and torch.equal(weight.dequantize(), want)
    tensors["weight_zero_point"] = tensors["weight_zero_point"].float() + 0.5
    got = decode(parse(int_spec("uint4", granularity, zero_point_type="float32")), tensors)[0].dequantize()
    assert not torch.equal(got, want) and torch.allclose(got, want, atol=0.011)


def test_group_of_minus_one_is_the_whole_row():
    tensors, want = int_module("int4", "group", n=16, k=64, group=64)
    assert torch.equal(decode(parse(int_spec("int4", "group", group=-1)), tensors)[0].dequantize(), want)


def test_oldest_writers_may_leave_scales_per_group_untransposed():
    tensors, want = int_module("int4", "group", symmetric=True)
    tensors["weight_scale"] = tensors["weight_scale"].t().contiguous()
    assert torch.equal(decode(parse(int_spec("int4", "group", symmetric=True), version=None), tensors)[0].dequantize(), want)
    scheme = parse(int_spec("int4", "group", symmetric=True)).decide(view(tensors)).scheme
    assert any("weight_scale" in str(p) for p in problems_of(scheme, view(tensors)))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_two_stages_multiply_both_scales(granularity):
    tensors, want = int_module("int4", granularity)
    staged = {f"{name}_2" if name != "weight" else name: t for name, t in tensors.items()} | {"weight_scale": torch.tensor(0.25)}
    weight, _ = decode(parse([spec("fp8_e4m3", "per_tensor"), int_spec("int4", granularity)]), staged)
    assert torch.equal(weight.dequantize(), want * 0.25)
    channel = torch.linspace(0.5, 2, 40)
    weight, _ = decode(parse([spec("fp8_e4m3", "per_channel"), int_spec("int4", granularity)]), staged | {"weight_scale": channel})
    torch.testing.assert_close(weight.dequantize(), want * channel[:, None], rtol=1e-6, atol=0)


def test_codes_outside_their_type_are_refused():
    tensors, _ = int_module("int2", "channel")
    tensors["weight"][3, 5] = 2
    with pytest.raises(BadValueError, match="weight: values from -2 to 2"):
        decode(parse(int_spec("int2", "channel")), tensors)


def test_rows_that_cannot_be_packed_are_refused_by_name():
    tensors, _ = int_module("uint2", "group", n=40)
    with pytest.raises(ShapeMismatchError, match=f"{NAME}.weight: N = 42"):
        parse(int_spec("uint2", "group")).decide(view(tensors, shape=(42, 96)))


@pytest.mark.parametrize(("value", "found"), [(math.nan, "NaN or infinite"), (-1.0, "negative scales"), (0.0, "every scale is zero")])
def test_impossible_scales_are_refused(value, found):
    tensors, _ = int_module("int8", "channel")
    tensors["weight_scale"] = torch.full_like(tensors["weight_scale"], value)
    with pytest.raises(BadValueError, match=f"weight_scale: .*{found}"):
        decode(parse(int_spec("int8", "channel")), tensors)


# --- eight-bit floats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "stored"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
@pytest.mark.parametrize(
    ("more", "scale"),
    [({"qscheme": "per_tensor"}, ()), ({"qscheme": "per_channel"}, (40,)), ({"qscheme": "per_group", "group_size": 32}, (40, 3)), ({"qscheme": "per_block", "block_size": [16, 64]}, (3, 2))],
    ids=["tensor", "channel", "group", "block"],
)  # fmt: skip
def test_eight_bit_floats_multiply_the_scale_of_their_cell(dtype, stored, more, scale):
    codes = (torch.randn(40, 96) * 40).to(stored)
    scales = torch.rand(scale) * 0.01 + 0.001
    rows, columns = {(): (40, 96), (40,): (1, 96), (40, 3): (1, 32), (3, 2): (16, 64)}[scale]
    grid = scales.reshape(-(-40 // rows), -(-96 // columns))
    want = torch.tensor([[float(codes[i, j].float() * grid[i // rows, j // columns]) for j in range(96)] for i in range(40)])
    weight, _ = decode(parse(spec(dtype, **more)), {"weight": codes, "weight_scale": scales})
    assert torch.equal(weight.dequantize(), want)


def test_block_scales_may_be_powers_of_two_in_one_byte():
    codes = torch.randn(32, 64).to(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale": torch.tensor([[125, 126], [127, 128]], dtype=torch.uint8).view(torch.float8_e8m0fnu)}
    weight, _ = decode(parse(spec("fp8_e4m3", "per_block", block_size=[16, 32], scale_type="float8_e8m0fnu")), tensors)
    factor = torch.tensor([[0.25, 0.5], [1.0, 2.0]]).repeat_interleave(16, 0).repeat_interleave(32, 1)
    assert torch.equal(weight.dequantize(), codes.float() * factor)


# --- blocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", ["e8m0", "e5m3", "float"])
def test_blocks_of_small_floats_decode_exactly_with_every_kind_of_scale(dtype, scale):
    codes, values = float_codes(dtype, 24, 96)
    stored = torch.randint(100, 140, (24, 3), dtype=torch.uint8)
    exponent, mantissa = (stored.int() >> 3) - 15, (stored.int() & 7) / 8
    factor = {"e8m0": torch.exp2(stored.double() - 127), "e5m3": torch.exp2(exponent.double()) * (1 + mantissa), "float": stored.double() / 1024}[scale].float()
    more = {"scale_format": scale} if scale != "float" else {"scale_format": "float32"}
    tensors = {"weight": pack_floats(codes, dtype), "weight_scale": factor if scale == "float" else stored}
    weight, _ = decode(parse(spec(dtype, "per_group", group_size=32, symmetric=None, **more)), tensors)
    assert isinstance(weight, BlockFloatWeight)
    assert torch.equal(weight.dequantize(), values * factor.repeat_interleave(32, 1))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("joint", [True, False], ids=["joint", "split"])
def test_older_blocks_hold_plain_exponents_and_their_own_six_bit_order(dtype, joint):
    codes, values = float_codes(dtype, 6, 64)
    exponents = torch.tensor([[-9, 3], [0, -1], [127, -127], [5, -5], [1, 2], [-3, -4]], dtype=torch.int8)
    rows = []
    for row, signed in zip(codes.tolist(), exponents.tolist(), strict=True):
        stored = []
        for block, e in enumerate(signed):
            stored += [e & 255] if joint else []
            elements = row[32 * block : 32 * block + 32]
            if dtype == "fp4":
                stored += [elements[i] | elements[i + 1] << 4 for i in range(0, 32, 2)]
            else:
                for a, b, c, d in (elements[i : i + 4] for i in range(0, 32, 4)):
                    stored.append((a >> 4) << 6 | (b >> 4) << 4 | (c >> 4) << 2 | d >> 4)
                    stored += [(a & 15) << 4 | b & 15, (c & 15) << 4 | d & 15]
        rows.append(stored)
    tensors = {"weight": torch.tensor(rows, dtype=torch.uint8)} | ({} if joint else {"weight_scale": exponents.view(torch.uint8)})
    config = parse({"dtype": "mx", "mx_element_dtype": dtype, "ch_axis": -1, "group_size": 32, "is_dynamic": False})
    weight, _ = decode(config, tensors)
    assert torch.equal(weight.dequantize(), values * torch.exp2(exponents.double()).float().repeat_interleave(32, 1))
    damaged = tensors["weight"].clone() if joint else exponents.clone()
    damaged[0, 0] = 128 if joint else -128
    with pytest.raises(BadValueError, match="exponents of -128"):
        decode(config, tensors | {"weight" if joint else "weight_scale": damaged})


def test_two_level_scales_multiply_and_the_inputs_second_scale_is_read():
    codes, values = float_codes("fp4", 16, 64)
    scale = (torch.rand(16, 4) * 200 + 20).to(torch.float8_e4m3fn)
    tensors = {"weight": pack_floats(codes, "fp4"), "weight_scale": scale, "weight_scale_2": torch.tensor(0.001), "input_scale_2": torch.tensor(0.002)}
    stages = [spec("fp4", "per_group", group_size=16, scale_format="float32"), spec("fp8_e4m3", "per_tensor", is_scale_quant=True)]
    dynamic = [stages[0] | {"is_dynamic": True}, stages[1]]
    weight, scheme = decode(parse(stages, dynamic), tensors)
    torch.testing.assert_close(weight.dequantize(), values * scale.float().repeat_interleave(16, 1) * 0.001, rtol=1e-6, atol=0)
    activation = scheme.to_activation(tensors)
    assert (activation.element, activation.group_size, activation.scale_type, activation.second_scale) == ("fp4_e2m1", 16, "e4m3", "static")
    assert activation.second == pytest.approx(0.002)
    assert decode(parse(stages), {k: v for k, v in tensors.items() if k != "input_scale_2"})[1].activation == NO_ACTIVATION


# --- inputs ------------------------------------------------------------------------------------------------------

EVEN = {"scale_format": "e8m0", "scale_calculation_mode": "even"}
INPUTS = {
    "fp8-static": (spec("fp8_e4m3", "per_tensor"), ActivationSpec("fp8_e4m3fn", "tensor", dynamic=False)),
    "fp8-dynamic": (spec("fp8_e4m3", "per_tensor", is_dynamic=True), ActivationSpec("fp8_e4m3fn", "tensor")),
    "e5m2-token": (spec("fp8_e5m2", "per_channel", ch_axis=1, is_dynamic=True), ActivationSpec("fp8_e5m2", "token")),
    "fp8-group": (spec("fp8_e4m3", "per_group", group_size=128, is_dynamic=True), ActivationSpec("fp8_e4m3fn", "group", 128, exponent_rule="even")),
    "int8-asym": (spec("int8", "per_tensor", symmetric=False, is_dynamic=True), ActivationSpec("int8", "tensor", symmetric=False, reciprocal=True)),
    "int4-group": (spec("int4", "per_group", group_size=64, is_dynamic=True), ActivationSpec("int4", "group", 64, exponent_rule="even", reciprocal=True)),
    "mxfp4": (spec("fp4", "per_group", group_size=32, is_dynamic=True, **EVEN), ActivationSpec("fp4_e2m1", "group", 32, scale_type="e8m0", exponent_rule="even")),
    "mxfp6-ceil": (spec("fp6_e3m2", "per_group", group_size=32, is_dynamic=True, **EVEN | {"scale_calculation_mode": "ceil"}), ActivationSpec("fp6_e3m2", "group", 32, scale_type="e8m0", exponent_rule="top")),
    "amdfp4": (spec("fp4", "per_group", group_size=16, is_dynamic=True, scale_format="e5m3", scale_type="float8_e5m3"), ActivationSpec("fp4_e2m1", "group", 16, scale_type="e5m3", exponent_rule="even")),
    "bfloat16": ({"dtype": "bfloat16"}, NO_ACTIVATION),
    "none": (None, NO_ACTIVATION),
}  # fmt: skip


@pytest.mark.parametrize(("inputs", "want"), INPUTS.values(), ids=INPUTS.keys())
def test_input_quantization_is_what_the_specification_says(inputs, want):
    tensors, _ = int_module("int4", "channel", symmetric=True)
    config = parse(int_spec("int4", "channel", symmetric=True), inputs)
    assert config.decide(view(tensors)).scheme.activation == want


def test_static_zero_points_of_inputs_move_to_the_signed_domain():
    tensors, _ = int_module("int8", "tensor")
    signed = tensors | {"input_scale": torch.tensor(0.5), "input_zero_point": torch.tensor(-3, dtype=torch.int8)}
    scheme = decode(parse(int_spec("int8", "tensor"), spec("int8", "per_tensor", symmetric=False)), signed)[1]
    assert (scheme.to_activation(signed).scale, scheme.to_activation(signed).zero) == (0.5, -3)
    unsigned = tensors | {"input_scale": torch.tensor(0.5), "input_zero_point": torch.tensor(131, dtype=torch.uint8)}
    scheme = decode(parse(int_spec("int8", "tensor"), spec("uint8", "per_tensor", symmetric=False)), unsigned)[1]
    assert scheme.to_activation(unsigned).zero == 3


def test_missing_input_scale_is_named():
    tensors, _ = int_module("int8", "tensor", symmetric=True)
    module = view(tensors)
    scheme = parse(int_spec("int8", "tensor", symmetric=True), spec("int8", "per_tensor")).decide(module).scheme
    assert any("input_scale" in str(p) for p in problems_of(scheme, module))


REFUSED_INPUTS = {
    "static-token": spec("fp8_e4m3", "per_channel", ch_axis=1),
    "features": spec("fp8_e4m3", "per_channel", ch_axis=-1, is_dynamic=True),
    "unsigned-symmetric": spec("uint8", "per_tensor", is_dynamic=True),
    "fp4-tensor": spec("fp4", "per_tensor", is_dynamic=True),
    "int3": spec("int3", "per_tensor", is_dynamic=True),
    "two-of-one-kind": [spec("fp8_e4m3", "per_tensor"), spec("int8", "per_tensor")],
}


@pytest.mark.parametrize("inputs", REFUSED_INPUTS.values(), ids=REFUSED_INPUTS.keys())
def test_inputs_of_unknown_meaning_are_refused_by_name(inputs):
    with pytest.raises(ConfigError, match=r"global_quant_config\.input_tensors: .*"):
        parse(int_spec("int8", "tensor"), inputs)
