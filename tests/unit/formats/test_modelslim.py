"""ModelSlim: every type and storage against a naive decoder, folded biases, transforms, caches, names, refusals."""

import json
from dataclasses import replace

import pytest
import torch

import bitgrain
from bitgrain.errors import (
    BadValueError,
    BitgrainError,
    ConfigError,
    LabelMismatchError,
    MissingTensorError,
    RuleMismatchError,
    ShapeMismatchError,
)
from bitgrain.formats.base import ModuleKind, ModuleView
from bitgrain.formats.detect import detect
from bitgrain.formats.expert_stacks import ExpertStack
from bitgrain.formats.modelslim import ModelSlimConfig
from bitgrain.formats.modelslim.cache import operand_kinds
from bitgrain.formats.modelslim.description import spellings
from bitgrain.formats.modelslim.types import MXFP4, TYPES
from bitgrain.weights import NO_ACTIVATION, DenseWeight
from tests.checkpoints import HIDDEN, LAYERS, linear_shapes, llama_config, llama_tensors, write_checkpoint
from tests.golden_checks import check_golden, golden_folders
from tests.unit.formats.golden_cases import problems_of
from tests.unit.formats.synthetic import NAME, evidence, header, view

FILE = "quant_model_description.json"
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
N, K = 12, 96


@pytest.mark.parametrize("folder", golden_folders("modelslim"), ids=lambda f: f.name)
def test_golden_module_equals_golden(folder):
    assert check_golden(folder) > 0


# --- making modules: tensors, and the dense weight by the plainest formula ------------------------------------------------
def rand(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def whole(low, high, *shape):
    return torch.randint(low, high, shape, generator=GENERATOR)


GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def _seed():
    GENERATOR.manual_seed(7)


def naive(codes, scale, offset=None):
    """(q - offset) * scale, element by element."""
    k, groups = codes.shape[1], scale.shape[1]
    rows = zip(codes.tolist(), scale.tolist(), (torch.zeros_like(scale) if offset is None else offset).tolist(), strict=True)
    return torch.tensor([[(q[j] - o[j * groups // k]) * s[j * groups // k] for j in range(k)] for q, s, o in rows])


def pack_rows(codes):
    return (((codes[1::2] << 4) | (codes[0::2] & 15)) & 255).to(torch.uint8).view(torch.int8)


def pack_columns(codes):
    return (((codes[:, 1::2] << 4) | (codes[:, 0::2] & 15)) & 255).to(torch.uint8).view(torch.int8)


def integers(bits, groups=1, offset=None, pack=None, n=N, k=K):
    """(tensors, want) of an integer module."""
    half = 1 << (bits - 1)
    codes, scale = whole(-half, half, n, k), rand(n, groups).abs() + 0.01
    shift = torch.zeros(n, groups) if offset is None else offset(n, groups)
    stored = pack(codes) if pack else codes.to(torch.int8)
    return {"weight": stored, "weight_scale": scale, "weight_offset": shift}, naive(codes, scale, shift)


def two_stages(groups, pack=None):
    codes, first, second = whole(-8, 8, N, K), rand(N, 1).abs() + 0.01, whole(1, 16, N, groups).float()
    tensors = {"weight": pack(codes) if pack else codes.to(torch.int8), "weight_scale": first, "weight_offset": torch.zeros(N, 1),
               "weight_scale_second": second, "weight_offset_second": torch.zeros(N, groups), "scale_bias": rand(N, 16)}  # fmt: skip
    return tensors, naive(codes, first * second)


def static(offset=0, bias=None, wide=False, both=False, n=N, k=K):
    """A static module as its producer computes it; `bias` float32 [N]."""
    codes, own, act = whole(-127, 128, n, k), rand(n).abs() * 0.01 + 0.001, 0.05
    product = (torch.tensor(act) * own).float()
    folded = torch.round((torch.zeros(n) if bias is None else bias) / product - codes.sum(1) * offset).to(torch.int32)
    stored = product.view(torch.int32).to(torch.int64) if wide else product
    tensors = {"weight": codes.to(torch.int8), "deq_scale": stored, "quant_bias": folded, "input_scale": torch.tensor([act]), "input_offset": torch.tensor([float(offset)])}
    if both:
        tensors |= {"weight_scale": own[:, None], "weight_offset": torch.zeros(n, 1)}
    if bias is not None:
        tensors["bias"] = bias
    return tensors, naive(codes, own[:, None])


def microscaling(kind, k=K, second=0, n=N):
    exponent = whole(118, 130, n, -(-k // 32)).to(torch.uint8)
    if kind == "mxfp8":
        weight = (rand(n, k) * 60).to(torch.float8_e4m3fn)
        values = weight.float()
    else:
        codes = whole(0, 16, n, k)
        values = torch.tensor(E2M1)[codes]
        packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).to(torch.uint8)
        weight = values.to(torch.float8_e4m3fn) if kind == "unpacked" else packed
    tensors = {"weight": weight, "weight_scale": exponent}
    outer = torch.ones(n, 1)
    if second:
        outer = rand(n, -(-k // second)).abs() + 0.1
        tensors["weight_dual_scale"] = outer[:, :, None]
    rows = zip(values.tolist(), exponent.tolist(), outer.tolist(), strict=True)
    return tensors, torch.tensor([[v[j] * 2.0 ** (e[j // 32] - 127) * o[j // second if second else 0] for j in range(k)] for v, e, o in rows])


def fp8():
    weight, scale = (rand(N, K) * 100).to(torch.float8_e4m3fn), rand(N, 1).abs() + 0.01
    return {"weight": weight, "weight_scale": scale, "weight_offset": torch.zeros(N, 1)}, naive(weight.float(), scale)


def whole_offsets(n, g):
    return whole(-6, 7, n, g).float()


def broken_offsets(n, g):
    return rand(n, g)


V1 = {"version": "1.0.0"}
# id: (type, keys of the whole checkpoint, module, layout where it counts)
CASES = {
    "static": ("W8A8", V1, static),
    "static-offset": ("W8A8", V1, lambda: static(offset=-37)),
    "static-int64": ("W8A8", V1, lambda: static(offset=5, wide=True)),
    "static-bias": ("W8A8", V1, lambda: static(offset=5, bias=rand(N))),
    "static-v0-own-scales": ("W8A8", {}, lambda: static(both=True)),
    "sparse": ("W8A8S", {}, static),
    "mix": ("W8A8_MIX", V1, lambda: static(offset=3, both=True)),
    "mix-int64-bias": ("W8A8_MIX", V1, lambda: static(offset=3, both=True, bias=rand(N), wide=True)),
    "w8a8-dynamic": ("W8A8_DYNAMIC", V1, lambda: integers(8)),
    "w8a8-dynamic-group": ("W8A8_DYNAMIC", V1 | {"group_size": 32}, lambda: integers(8, 3)),
    "w8a16": ("W8A16", V1, lambda: integers(8)),
    "w8a16-asym": ("W8A16", V1, lambda: integers(8, 1, whole_offsets)),
    "w8a16-float-offset": ("W8A16", {}, lambda: integers(8, 3, broken_offsets)),
    "w4a16-v1-channel": ("W4A16", V1, lambda: integers(4, pack=pack_columns)),
    "w4a16-v1-group": ("W4A16", V1 | {"group_size": 32}, lambda: integers(4, 3, whole_offsets, pack_rows)),
    "w4a16-v0": ("W4A16", {}, lambda: integers(4, 1, whole_offsets)),
    "w4a16-v0-group": ("W4A16", {}, lambda: integers(4, 6)),
    "w4a8-rows": ("W4A8_DYNAMIC", V1, lambda: integers(4, pack=pack_rows)),
    "w4a8-v0": ("W4A8_DYNAMIC", {}, lambda: integers(4)),
    "w4a8-v0-group": ("W4A8_DYNAMIC", {}, lambda: integers(4, 3)),
    "w4a8-two-stages-v0": ("W4A8_DYNAMIC", {}, lambda: two_stages(3)),
    "w4a8-two-stages-v1": ("W4A8_DYNAMIC", V1, lambda: two_stages(3, pack_rows)),
    "w4a4": ("W4A4_DYNAMIC", V1, lambda: integers(4)),
    "w4a4-asym": ("W4A4_DYNAMIC", V1, lambda: integers(4, 1, whole_offsets)),
    "w4a4-group": ("W4A4_DYNAMIC", V1 | {"group_size": 32}, lambda: integers(4, 3)),
    "w4a4-group-asym": ("W4A4_DYNAMIC", V1 | {"group_size": 16}, lambda: integers(4, 6, whole_offsets)),
    "w4a4-packed": ("W4A4_DYNAMIC", V1, lambda: integers(4, pack=pack_rows)),
    "wfp8": ("WFP8AFP8_DYNAMIC", V1, fp8),
    "mxfp8": ("W8A8_MXFP8", V1 | {"group_size": 32}, lambda: microscaling("mxfp8")),
    "mxfp8-short-block": ("W8A8_MXFP8", V1, lambda: microscaling("mxfp8", 80)),
    "mxfp4": ("W4A4_MXFP4", V1, lambda: microscaling("mxfp4")),
    "mxfp4-unpacked": ("W4A4_MXFP4", {}, lambda: microscaling("unpacked")),
    "w4a8-mxfp": ("W4A8_MXFP", V1, lambda: microscaling("mxfp4")),
    "dual": ("W4A4_MXFP4_DUALSCALE", V1, lambda: microscaling("mxfp4", second=512)),
    "dual-several": ("W4A4_MXFP4_DUALSCALE", V1, lambda: microscaling("mxfp4", 1056, 512)),
    "dual-64": ("W4A4_MXFP4_DUALSCALE", V1, lambda: microscaling("mxfp4", 160, 64)),
}  # fmt: skip


def parse(tensors, kind, keys=V1, name=NAME, **types):
    """The configuration of a checkpoint that has one module."""
    full = {f"{name}.{local}": t for local, t in tensors.items()}
    described = {n: "FLOAT" if n.endswith(".bias") else kind for n in full} | types
    found = evidence(None, full, {FILE: {**keys, **described}})
    return ModelSlimConfig.parse(replace(found, read_small=full.__getitem__))


def choose(tensors, kind, keys=V1, shape=None, module=ModuleKind.LINEAR, **types):
    """(scheme, view) of the module, after its headers were compared."""
    seen = view(tensors, shape=shape, kind=module)
    scheme = parse(tensors, kind, keys, **types).decide(seen).scheme
    return scheme, problems_of(scheme, seen)


@pytest.mark.parametrize("case", CASES)
def test_module_decodes_to_the_plain_formula(case):
    kind, keys, make = CASES[case]
    tensors, want = make()
    scheme, problems = choose(tensors, kind, keys)
    assert problems == []
    weight = scheme.to_weight(tensors)
    assert weight.spec == scheme.weight_spec
    torch.testing.assert_close(weight.dequantize(), want, rtol=2e-6, atol=1e-7 * float(want.abs().max()))
    assert choose(tensors, kind, keys, tuple(want.shape)) == (scheme, [])


@pytest.mark.parametrize("case", CASES)
def test_any_lost_or_shortened_tensor_is_found(case):
    kind, keys, make = CASES[case]
    tensors, want = make()
    spare = {"bias", "weight_offset_second", "scale_bias", *(() if TYPES[kind].may_shift else ("weight_offset",))}
    spare |= {"weight_scale"} if case == "static-v0-own-scales" else set()
    for local, tensor in tensors.items():
        for damaged in ({k: v for k, v in tensors.items() if k != local}, tensors | {local: tensor[:-1]}):
            if local in spare and local not in damaged:
                continue
            try:
                _, problems = choose(damaged, kind, keys, tuple(want.shape), **{f"{NAME}.{local}": kind})
            except BitgrainError as problem:
                problems = [str(problem)]
            assert any(local in p for p in problems), (local, problems)


@pytest.mark.parametrize("case", CASES)
def test_a_scale_that_is_not_finite_or_negative_is_refused(case):
    kind, keys, make = CASES[case]
    tensors, want = make()
    scheme, _ = choose(tensors, kind, keys, tuple(want.shape))
    for local in [n for n in tensors if n.endswith("scale") and tensors[n].is_floating_point()]:
        for value in (float("nan"), -1.0):
            bad = tensors[local].clone()
            bad.view(-1)[0] = value
            with pytest.raises(BadValueError, match=local):
                scheme.to_weight(tensors | {local: bad})
                scheme.to_activation(tensors | {local: bad})
                assert local == "input_scale"


def test_plain_codes_outside_four_bits_are_refused():
    tensors, _ = integers(4)
    tensors["weight"][3, 5] = 9
    scheme, problems = choose(tensors, "W4A4_DYNAMIC")
    assert problems == []
    with pytest.raises(BadValueError, match="codes from -8 to 9"):
        scheme.to_weight(tensors)


def test_offsets_of_a_symmetric_type_must_be_zeros():
    tensors, _ = integers(8, 1, whole_offsets)
    scheme, _ = choose(tensors, "W8A8_DYNAMIC")
    with pytest.raises(LabelMismatchError, match="weight_offset"):
        scheme.to_weight(tensors)


def test_offsets_of_zeros_are_no_zero_points_and_large_ones_are_not_read():
    assert choose(integers(8)[0], "W8A16")[0].weight_spec.zero == "constant"
    assert choose(integers(8, 1, whole_offsets)[0], "W8A16")[0].weight_spec.zero == "integer"
    assert choose(integers(8, 1, broken_offsets)[0], "W8A16")[0].weight_spec.zero == "float"
    tall = {"weight": torch.zeros(20_000, 2, dtype=torch.int8), "weight_scale": torch.ones(20_000, 1), "weight_offset": torch.zeros(20_000, 1)}
    scheme, problems = choose(tall, "W8A16")
    assert (scheme.weight_spec.zero, problems) == ("float", [])
    assert not bool(scheme.to_weight(tall).dequantize().any())


def test_group_that_does_not_divide_the_row_needs_the_stated_size():
    tensors, _ = integers(8, 2, k=96)
    tensors |= {"weight": tensors["weight"][:, :80].clone()}
    assert choose(tensors, "W8A8_DYNAMIC", V1 | {"group_size": 64})[0].group_size == 64
    tensors |= {"weight": torch.zeros(N, 81, dtype=torch.int8)}
    with pytest.raises(ShapeMismatchError, match=r"weight_scale: 2 scales in each row of 81"):
        choose(tensors, "W8A8_DYNAMIC", V1 | {"group_size": 16})


def test_a_value_that_is_no_e2m1_number_is_refused():
    tensors, _ = microscaling("unpacked")
    scheme, _ = choose(tensors, "W4A4_MXFP4")
    tensors["weight"].view(torch.uint8)[0, 0] = torch.tensor(5.0).to(torch.float8_e4m3fn).view(torch.uint8)
    with pytest.raises(BadValueError, match="1 of 1152 values"):
        scheme.to_weight(tensors)


# --- static inputs --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wide", [False, True], ids=["float32", "int64"])
@pytest.mark.parametrize("biased", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("offset", [0, -41])
def test_static_module_computes_what_its_integers_say(wide, biased, offset):
    tensors, _ = static(offset, rand(N) if biased else None, wide)
    scheme, _ = choose(tensors, "W8A8")
    x = rand(5, K)
    codes = torch.clamp(torch.round(x / tensors["input_scale"] + offset), -128, 127).double()
    product = tensors["deq_scale"].to(torch.int32).view(torch.float32) if wide else tensors["deq_scale"]
    want = (codes @ tensors["weight"].double().t() + tensors["quant_bias"]) * product
    spec, weight, bias = scheme.to_activation(tensors), scheme.to_weight(tensors), scheme.to_bias(tensors)
    got = spec.fake_quantize(x) @ weight.dequantize().t() + bias
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    assert (spec.describe(), spec.zero) == ("int8 tensor static asym", offset)
    if biased:
        assert (bias - tensors["bias"]).abs().max() <= product.max()


def test_mix_runs_with_inputs_quantized_per_token_and_its_stored_bias():
    tensors, _ = static(7, rand(N), both=True)
    scheme, _ = choose(tensors, "W8A8_MIX")
    assert scheme.to_activation(tensors).describe() == "int8 token dynamic"
    stored = tensors.pop("bias")
    assert torch.equal(scheme.to_bias(tensors | {"bias": stored}), stored)
    scheme, _ = choose(tensors, "W8A8_MIX")
    assert (scheme.to_bias(tensors) - stored).abs().max() <= tensors["deq_scale"].max()


@pytest.mark.parametrize("both", [False, True], ids=["static", "mix"])
def test_scales_that_contradict_each_other_are_refused(both):
    tensors, _ = static(both=True)
    scheme, _ = choose(tensors, "W8A8_MIX" if both else "W8A8")
    tensors["weight_scale"][4] *= 1.5
    with pytest.raises(LabelMismatchError, match="deq_scale.*\n?.*row 4"):
        scheme.to_weight(tensors)


def test_bias_that_is_not_the_folded_one_is_refused():
    tensors, _ = static(5, rand(N))
    scheme, _ = choose(tensors, "W8A8")
    tensors["bias"] = tensors["bias"].clone()
    tensors["bias"][2] += 0.1
    with pytest.raises(LabelMismatchError, match="quant_bias"):
        scheme.to_bias(tensors)


@pytest.mark.parametrize(("local", "value"), [("input_scale", 0.0), ("input_scale", float("inf")), ("input_offset", 0.5), ("input_offset", 200.0)])
def test_impossible_static_values_are_refused(local, value):
    tensors, _ = static()
    scheme, _ = choose(tensors, "W8A8")
    with pytest.raises(BadValueError, match=local):
        scheme.to_activation(tensors | {local: torch.tensor([value])})


def test_wide_scales_beyond_32_bits_are_refused():
    tensors, _ = static(wide=True)
    tensors["deq_scale"][0] += 1 << 40
    scheme, _ = choose(tensors, "W8A8")
    with pytest.raises(BadValueError, match="deq_scale"):
        scheme.to_weight(tensors)


# --- activations ----------------------------------------------------------------------------------------------------------
def test_activation_of_each_type():
    described = {name: kind.activation.describe() for name, kind in TYPES.items()}
    assert described == {
        "FLOAT": "16-bit", "W16A16S": "16-bit", "W8A8": "int8 tensor static asym", "W8A8S": "int8 tensor static asym",
        "W8A8_MIX": "int8 token dynamic", "W8A8_DYNAMIC": "int8 token dynamic", "W8A16": "16-bit", "W4A16": "16-bit",
        "W4A8_DYNAMIC": "int8 token dynamic", "W4A4_DYNAMIC": "int4 token dynamic", "WFP8AFP8_DYNAMIC": "fp8_e4m3fn token dynamic",
        "W8A8_MXFP8": "fp8_e4m3fn g32 dynamic e8m0", "W4A8_MXFP": "fp8_e4m3fn g32 dynamic e8m0",
        "W4A4_MXFP4": "fp4_e2m1 g32 dynamic e8m0", "W4A4_MXFP4_DUALSCALE": "fp4_e2m1 g32 dynamic e8m0",
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "bits", "top"), [("W8A8_DYNAMIC", 8, 127), ("W4A8_DYNAMIC", 4, 127), ("W4A4_DYNAMIC", 4, 7)])
def test_dynamic_inputs_put_the_peak_at_the_largest_code(kind, bits, top):
    scheme, _ = choose(integers(bits)[0], kind)
    x = rand(4, K)
    codes, scale, _ = scheme.activation.quantize(x)
    assert torch.allclose(scale[:, 0], x.abs().amax(1) / top)
    assert int(codes.abs().max()) == top


def naive_e2m1(value):
    return min((abs(abs(value) - m), i % 2, m) for i, m in enumerate(E2M1[:8]))[2] * (-1 if value < 0 else 1)


def test_dual_inputs_have_a_second_scale_per_wide_group():
    tensors, _ = microscaling("mxfp4", 160, 64)
    scheme, _ = choose(tensors, "W4A4_MXFP4_DUALSCALE")
    assert scheme.activation.describe() == "fp4_e2m1 g32 dynamic e8m0 x g64 float"
    x = rand(3, 160)
    x[1, 64:128] = 0
    got = scheme.activation.fake_quantize(x)
    for row in range(3):
        for start in range(0, 160, 32):
            wide = x[row, start // 64 * 64 : start // 64 * 64 + 64].abs().max() / 6
            wide = wide if wide > 0 else torch.tensor(1.0)
            scaled = (x[row, start : start + 32] / wide).double()
            peak = scaled.abs().max()
            power = 2.0 ** (torch.floor(torch.log2(peak * 8 / 7)) - 2) if peak > 0 else 1.0
            want = torch.tensor([naive_e2m1(float(v) / float(power)) * float(power) * float(wide) for v in scaled])
            torch.testing.assert_close(got[row, start : start + 32], want, rtol=1e-6, atol=0)


def test_embedding_has_no_activation():
    scheme, problems = choose(integers(8)[0], "W8A8_DYNAMIC", module=ModuleKind.EMBEDDING)
    assert (scheme.activation, problems) == (NO_ACTIVATION, [])


# --- transforms -----------------------------------------------------------------------------------------------------------
def effective(tensors, kind, **types):
    scheme, problems = choose(tensors, kind, **types)
    assert problems == []
    assert scheme.transforms_input
    assert choose(tensors, kind, shape=scheme.shape, **types) == (scheme, [])
    weight = scheme.to_weight(tensors)
    assert weight.spec == scheme.weight_spec
    return scheme, weight.effective()


@pytest.mark.parametrize("sides", ["both", "left", "right"])
def test_flatquant_transforms_each_side(sides):
    tensors, stored = integers(4)
    left, right = rand(8, 8), rand(12, 12)
    mixing = torch.kron(left if sides != "right" else torch.eye(8), right if sides != "left" else torch.eye(12))
    tensors |= {"clip_ratio": torch.tensor([0.9])} | ({"left_trans": left} if sides != "right" else {}) | ({"right_trans": right} if sides != "left" else {})
    scheme, got = effective(tensors, "W4A4_FLATQUANT_DYNAMIC")
    # x' = x (left kron right), so W = W' (left kron right)^T
    torch.testing.assert_close(got, stored @ mixing.t(), rtol=1e-4, atol=1e-4)
    spec = scheme.to_activation(tensors)
    x = rand(2, K)
    assert torch.allclose(spec.quantize(x)[1][:, 0], x.abs().amax(1) * 0.9 / 7)


def test_flatquant_of_blocks_cuts_the_token_first():
    tensors, _ = microscaling("mxfp8")
    tensors |= {"left_trans": torch.eye(8), "right_trans": torch.eye(12), "clip_ratio": torch.tensor([0.5])}
    scheme, _ = choose(tensors, "W8A8_MXFP8_FLATQUANT")
    x = rand(3, K)
    spec = scheme.to_activation(tensors)
    low, high = x.amin(1, keepdim=True) * 0.5, x.amax(1, keepdim=True) * 0.5
    assert torch.equal(spec.fake_quantize(x), replace(spec, clipped=False, clip=None).fake_quantize(torch.clamp(x, low, high)))


@pytest.mark.parametrize("value", [0.0, 1.5, float("nan")])
def test_impossible_clip_ratio_is_refused(value):
    tensors = integers(4)[0] | {"left_trans": torch.eye(8), "clip_ratio": torch.tensor([value])}
    scheme, _ = choose(tensors, "W4A4_FLATQUANT_DYNAMIC")
    with pytest.raises(BadValueError, match="clip_ratio"):
        scheme.to_activation(tensors)


def test_flatquant_without_its_matrices_is_refused():
    with pytest.raises(MissingTensorError, match=rf"{NAME}.*left_trans or right_trans"):
        choose(integers(4)[0] | {"clip_ratio": torch.tensor([0.9])}, "W4A4_FLATQUANT_DYNAMIC")


@pytest.mark.parametrize("lost", ["clip_ratio", "right_trans"])
def test_a_described_transform_must_be_stored(lost):
    tensors = integers(4)[0] | {"left_trans": torch.eye(8), "right_trans": torch.eye(12), "clip_ratio": torch.tensor([0.9])}
    del tensors[lost]
    _, problems = choose(tensors, "W4A4_FLATQUANT_DYNAMIC", **{f"{NAME}.{lost}": "W4A4_FLATQUANT_DYNAMIC"})
    assert problems == [f"missing {lost}"]


def test_a_factor_that_does_not_divide_the_row_is_refused():
    with pytest.raises(ShapeMismatchError, match="left_trans"):
        choose(integers(4)[0] | {"left_trans": torch.eye(7), "clip_ratio": torch.tensor([0.9])}, "W4A4_FLATQUANT_DYNAMIC")


def test_online_rotations_are_applied():
    tensors, stored = integers(8)
    heads = rand(4, 4)
    _, got = effective(tensors | {"heads_rotation": heads}, "W8A8_DYNAMIC")
    torch.testing.assert_close(got, stored @ torch.kron(heads, torch.eye(24)).t(), rtol=1e-4, atol=1e-4)
    m, n = rand(12, 12), rand(8, 8)
    _, got = effective(tensors | {"kronecker_rotation_m": m, "kronecker_rotation_n": n}, "W8A8_DYNAMIC")
    torch.testing.assert_close(got, stored @ torch.kron(m, n).t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("key", ["heads_rotation", "kronecker_rotation"])
def test_a_rotation_that_the_metadata_announce_must_be_stored(key):
    keys = V1 | {"metadata": {"quarot": {"max_tp_size": 4, key: {"layers": [NAME]}}}}
    with pytest.raises(MissingTensorError, match=rf"{NAME}.*{key}"):
        choose(integers(8)[0], "W8A8_DYNAMIC", keys)


def test_half_a_kronecker_rotation_is_refused():
    _, problems = choose(integers(8)[0] | {"kronecker_rotation_n": torch.eye(8)}, "W8A8_DYNAMIC")
    assert problems == ["missing kronecker_rotation_m"]


def test_a_dense_module_may_be_rotated_and_a_rotation_of_zeros_is_refused():
    tensors = {"weight": rand(N, K).bfloat16(), "heads_rotation": rand(4, 4)}
    scheme, got = effective(tensors, "FLOAT")
    assert isinstance(scheme.to_weight(tensors).inner, DenseWeight)
    torch.testing.assert_close(got, tensors["weight"].float() @ torch.kron(tensors["heads_rotation"], torch.eye(24)).t(), rtol=1e-4, atol=1e-4)
    with pytest.raises(BadValueError, match="heads_rotation"):
        scheme.to_weight(tensors | {"heads_rotation": torch.zeros(4, 4)})


@pytest.mark.parametrize("kind", ["W4A4_MXFP4_SVD", "W8A8_SVD_DYNAMIC"])
def test_low_rank_correction_is_added(kind):
    tensors, stored = microscaling("mxfp4") if "MX" in kind else integers(8)
    down, up = rand(5, K), rand(N, 5)
    _, got = effective(tensors | {"svd_lowrank_l1": down, "svd_lowrank_l2": up}, kind)
    torch.testing.assert_close(got, stored + up @ down, rtol=1e-4, atol=1e-4)
    _, problems = choose(tensors, kind)
    assert problems == ["missing svd_lowrank_l1", "missing svd_lowrank_l2"]


@pytest.mark.parametrize("kind", ["W8A8", "W4A4_MXFP4", "FLOAT"])
def test_smoothed_module_stands_under_linear(kind):
    inner, stored = {"W8A8": static(4, rand(N)), "W4A4_MXFP4": microscaling("mxfp4"), "FLOAT": ({"weight": rand(N, K)}, None)}[kind]
    stored = inner["weight"] if stored is None else stored
    factor = rand(K).abs() + 0.5
    local = {"div.mul_scale": factor, **{f"linear.{n}": t for n, t in inner.items()}}
    config = parse(local, kind)
    assert config.split_name(f"{NAME}.linear.weight") == (NAME, "linear.weight")
    assert config.split_name(f"{NAME}.div.mul_scale") == (NAME, "div.mul_scale")
    assert config.split_name("model.other.linear.weight") == ("model.other.linear", "weight")
    scheme, got = effective(local, kind)
    torch.testing.assert_close(got, stored * factor, rtol=1e-5, atol=1e-6)
    assert (scheme.to_bias(local) is not None) == (kind == "W8A8")
    if kind != "FLOAT":
        with pytest.raises(BadValueError, match=r"linear\.weight_scale|linear\.deq_scale"):
            broken = {n: (torch.full_like(t, 255) if t.dtype == torch.uint8 else t * float("nan")) if n.endswith("_scale") and "mul" not in n else t for n, t in local.items()}
            scheme.to_weight(broken)
    _, problems = choose({n: t for n, t in local.items() if n != "div.mul_scale"}, kind, **{f"{NAME}.div.mul_scale": "FLOAT"})
    assert problems == ["missing div.mul_scale"]


# --- descriptions ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", [FILE, "quant_model_description_w8a8_dynamic.json"])
def test_the_description_file_alone_is_recognized(file, tmp_path):
    tensors, want = integers(8)
    folder = write_checkpoint(tmp_path, {f"layer.{n}": t for n, t in tensors.items()}, {})
    (folder / file).write_text(json.dumps({f"layer.{n}": "W8A8_DYNAMIC" for n in tensors} | {"model_quant_type": "FLOAT"}))
    checkpoint = bitgrain.open_checkpoint(folder)
    assert torch.equal(checkpoint.dequantize("layer.weight"), want)
    found = evidence(None, {}, {file: {}})
    assert detect(found)[0] is ModelSlimConfig and ModelSlimConfig.detect(found).score == 80
    assert ModelSlimConfig.detect(evidence(None, {}, {"quant_config.json": {}})) is None


@pytest.mark.parametrize(("kind", "said"), [("W9A9", "W9A9"), ("W8A8SC", "decompressor"), ("W8A8_TIMESTEP", "diffusion"), ("NF4", "maxima"), ("W16A16SC", "W16A16SC"), (8, "8")])
def test_unknown_and_impossible_types_are_refused_by_name(kind, said):
    with pytest.raises(ConfigError, match=rf"{NAME}.weight.*{said}"):
        parse(integers(8)[0], "W8A8", **{f"{NAME}.weight": kind})


def test_all_unknown_types_and_keys_are_reported_at_once():
    with pytest.raises(BitgrainError) as caught:
        parse(integers(8)[0], "W8A8_DYNAMIC", V1 | {"groupsize": 4, "metadata": {"quarott": {"a": 1}}}, **{"a.weight": "W8A8_DYNAMC", "b.weight": "W1A1"})
    for part in ("a.weight", "W8A8_DYNAMIC", "b.weight", "groupsize", "group_size", "quarott"):
        assert part in str(caught.value)


def test_sparse_16_bit_weights_are_dense_unless_more_is_stored():
    scheme, problems = choose({"weight": rand(N, K).half()}, "W16A16S")
    assert (scheme.label, problems) == ("dense float16", [])
    _, problems = choose({"weight": rand(N, K).half(), "scale": rand(N).half()}, "W16A16S")
    assert problems == ["undeclared scale"]


def test_integers_without_a_type_are_refused_even_when_trusted():
    tensors = integers(8)[0]
    config = parse(tensors, "FLOAT")
    with pytest.raises(RuleMismatchError, match=NAME):
        config.decide(view(tensors))
    config.trust_tensors = True
    with pytest.raises(RuleMismatchError, match=NAME):
        config.decide(view(tensors))


def test_a_type_on_a_dense_tensor_is_found():
    _, problems = choose({"weight": rand(N, K)}, "W8A8_DYNAMIC")
    assert problems == ["missing weight_scale", "dtype weight"]


def test_ignored_modules_are_dense_and_must_be():
    config = parse({"weight": rand(N, K)}, "FLOAT", V1 | {"ignore": ["down_proj", "nothing"]})
    assert config.decide(view({"weight": rand(N, K)})).why == "excluded by the rule 'down_proj'"
    assert config.matched_rules == {"down_proj"} and set(config.rules()) == {"down_proj", "nothing"}
    with pytest.raises(RuleMismatchError, match=NAME):
        parse(integers(8)[0], "W8A8_DYNAMIC", V1 | {"ignore": ["down_proj"]}).decide(view(integers(8)[0]))


@pytest.mark.parametrize(
    ("stored", "described"),
    [
        ("model.layers.0.mlp.experts.1.gate_proj.weight", "model.layers.0.block_sparse_moe.experts.1.w1.weight"),
        ("model.layers.0.block_sparse_moe.experts.1.w2.weight", "model.layers.0.mlp.experts.1.down_proj.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_a_module_is_found_under_the_name_that_another_tool_gives_it(stored, described):
    assert described in spellings(stored)
    tensors = integers(8)[0]
    module = stored.removesuffix(".weight")
    full = {f"{module}.{n}": t for n, t in tensors.items()}
    config = ModelSlimConfig.parse(evidence(None, full, {FILE: {described: "W8A8_DYNAMIC"}}))
    assert config.decide(view(tensors, module)).why == "described as W8A8_DYNAMIC"


def test_stacked_16_bit_experts_are_divided():
    stack = ExpertStack(2, hidden=8, size=4)
    full = {"model.layers.0.mlp.experts.gate_up_proj": rand(2, 8, 8), "model.layers.0.mlp.experts.down_proj": rand(2, 8, 4)}
    config = ModelSlimConfig.parse(evidence(None, full, {FILE: dict.fromkeys(full, "FLOAT")}))
    parts = config.parts({n: header(n, t) for n, t in full.items()}, stack)
    assert sorted(n.rpartition("experts.")[2] for n in parts) == [f"{e}.{p}_proj.weight" for e in (0, 1) for p in ("down", "gate", "up")]
    one = parts["model.layers.0.mlp.experts.1.up_proj.weight"]
    seen = ModuleView("model.layers.0.mlp.experts.1.up_proj", ModuleKind.EXPERT, {"weight": one.header}, (4, 8))
    assert config.get_moe_scheme(seen).scheme.label == "dense float32"
    assert torch.equal(one.of(full[one.source]), full[one.source][1, 4:])


def test_a_described_bias_must_be_stored_unless_another_tensor_holds_it():
    with pytest.raises(MissingTensorError, match=f"{NAME}.bias"):
        parse(integers(8)[0], "W8A8_DYNAMIC", **{f"{NAME}.bias": "FLOAT"})
    scheme, problems = choose(static(5)[0], "W8A8", **{f"{NAME}.bias": "FLOAT"})
    assert problems == [] and scheme.holds_bias


# --- caches ---------------------------------------------------------------------------------------------------------------
ATTENTION = "model.layers.0.self_attn"
C8 = [f"{p}_proj.kv_cache_{t}" for p in "kv" for t in ("scale", "offset")]


def cache_of(locals_, keys, types):
    full = {f"{ATTENTION}.{n}": torch.ones(4, 1) for n in locals_}
    config = ModelSlimConfig.parse(evidence(None, full, {FILE: {**keys, **{f"{ATTENTION}.{n}": t for n, t in types.items()}}}))
    return config.get_kv_cache_scheme(ModuleView(ATTENTION, ModuleKind.ATTENTION, {n: header(n, t) for n, t in full.items()}))


def test_int8_cache_has_scales_and_offsets_per_channel():
    cache = cache_of(C8, {"kv_cache_type": "C8", "kv_quant_type": "C8"}, dict.fromkeys(C8, "C8"))
    assert (cache.element, cache.granularity, cache.symmetric) == ("int8", "channel", False)
    assert {name.removeprefix(f"{ATTENTION}."): which for name, which in cache.scales} == dict(zip(C8, ("k", "k_zero", "v", "v_zero"), strict=True))


@pytest.mark.parametrize("lost", C8)
def test_a_lost_tensor_of_an_int8_cache_is_named(lost):
    with pytest.raises(MissingTensorError, match=lost.rpartition("_")[0]):
        cache_of([n for n in C8 if n != lost], {"kv_cache_type": "C8"}, dict.fromkeys(C8, "C8"))


def test_a_cache_that_is_announced_and_nowhere_described_is_refused():
    with pytest.raises(ConfigError, match="kv_cache_type"):
        cache_of([], {"kv_cache_type": "C8"}, {})
    assert cache_of([], {}, {}).element == "none"


FA = [f"fa_{p}.{t}" for p in "qkv" for t in ("scale", "offset")]


@pytest.mark.parametrize(("kind", "element"), [("INT8", "int8"), (None, "int8"), ("FP8", "fp8_e4m3fn"), ("Q_FP8_DYNAMIC_KV_INT8", "int8")])
def test_quantized_attention_gives_a_cache_per_head(kind, element):
    cache = cache_of(FA, {"fa_quant_type": "FAKQuant"}, dict.fromkeys(FA, "FAQuant") | ({"quant_type": kind} if kind else {}))
    assert (cache.element, cache.granularity, cache.dynamic) == (element, "head", False)
    assert [which for _, which in cache.scales] == ["k_zero", "k", "q_zero", "q", "v_zero", "v"]


def test_dynamic_attention_and_caches_of_two_types():
    assert (cache_of([], {}, {"quant_type": "INT8_DYNAMIC"}).element, cache_of([], {}, {"quant_type": "FP8_DYNAMIC"}).dynamic) == ("int8", True)
    assert cache_of(["fa_q.scale", "fa_q.offset"], {}, {"quant_type": "Q_INT8"}).element == "none"
    with pytest.raises(ConfigError, match="keys and values of one type"):
        cache_of(FA, {}, {"quant_type": "QK_INT8_V_FP8"})
    with pytest.raises(MissingTensorError, match="fa_v.scale"):
        cache_of(["fa_k.scale"], {}, {"quant_type": "INT8"})
    assert operand_kinds("FP8_DYNAMIC_KV_FP8", "x") == {"Q": ("fp8_e4m3fn", True), "K": ("fp8_e4m3fn", False), "V": ("fp8_e4m3fn", False)}
    with pytest.raises(ConfigError, match="INT7"):
        operand_kinds("INT7", "x")


# --- whole models ---------------------------------------------------------------------------------------------------------
def llama(folder, change=lambda tensors, types: None):
    """A small Llama in W8A8_DYNAMIC (down_proj in W4A8_DYNAMIC), and the dense Llama of the same numbers."""
    dense = {n: t.float() for n, t in llama_tensors(dtype=torch.float32).items()}
    stored, types = dict(dense), dict.fromkeys(dense, "FLOAT")
    for name, (n, k) in linear_shapes().items():
        four = name.endswith("down_proj")
        tensors, dense[f"{name}.weight"] = integers(4 if four else 8, pack=pack_rows if four else None, n=n, k=k)
        tensors["weight_scale"] *= 0.002
        dense[f"{name}.weight"] *= 0.002
        stored |= {f"{name}.{local}": t for local, t in tensors.items()}
        types |= dict.fromkeys((f"{name}.{local}" for local in tensors), "W4A8_DYNAMIC" if four else "W8A8_DYNAMIC")
    change(stored, types)
    made = write_checkpoint(folder / "made", stored, llama_config())
    (made / FILE).write_text(json.dumps(types | V1 | {"model_quant_type": "W8A8_DYNAMIC", "group_size": 0, "metadata": {}, "optional": {}}))
    return made, write_checkpoint(folder / "dense", dense, llama_config())


def logits(folder, activations="none"):
    return bitgrain.load_model(folder, device="cpu", dtype=torch.float32, activations=activations).logits(torch.tensor([1, 5, 9, 2, 40]))


def test_whole_model_computes_what_its_dense_twin_does(tmp_path):
    made, dense = llama(tmp_path)
    torch.testing.assert_close(logits(made), logits(dense), rtol=1e-4, atol=1e-4)
    difference = (logits(made, "scheme") - logits(dense)).norm() / logits(dense).norm()
    assert 1e-5 < difference < 0.05


def test_norm_biases_are_added_and_their_duplicates_left_out(tmp_path):
    bias = torch.linspace(-1, 1, HIDDEN)

    def shift(stored, types):
        for i in range(LAYERS):
            norm = f"model.layers.{i}.input_layernorm"
            new = {f"{norm}.bias": bias.clone(), f"{norm}.module.bias": bias.clone(), f"{norm}.module.weight": stored[f"{norm}.weight"].clone()}
            stored |= new
            types |= dict.fromkeys(new, "W8A8_DYNAMIC") | {f"{norm}.bias": "FLOAT"}

    made, dense = llama(tmp_path, shift)
    assert (logits(made) - logits(dense)).norm() > 0.1 * logits(dense).norm()
    plan = bitgrain.open_checkpoint(made).plan
    assert plan.ignored["model.layers.0.input_layernorm.module.weight"] == "the older tool stores model.layers.0.input_layernorm.weight twice"


def test_a_stored_head_counts_though_the_configuration_ties_it(tmp_path):
    made, _ = llama(tmp_path)
    untied = logits(made)
    (made / "config.json").write_text(json.dumps(llama_config(tie_word_embeddings=True)))
    assert torch.equal(logits(made), untied)


def test_stray_tensor_beside_a_quantized_module_is_named(tmp_path):
    stray = "model.layers.0.self_attn.q_proj.input_rotation"
    made, _ = llama(tmp_path, lambda stored, types: stored.update({stray: torch.eye(4)}))
    with pytest.raises(BitgrainError, match=stray):
        bitgrain.open_checkpoint(made)


def test_inputs_of_mx_types_round_the_peak_first():
    # 1.75 and above round up to 2 in e2m1, so the block's power of two is the next one
    x = torch.zeros(2, 32)
    x[0, 0], x[1, 0] = 1.74, 1.75
    assert MXFP4.quantize(x)[1].flatten().tolist() == [0.25, 0.5]
