"""Linear modules in Triton, on host tensors in its interpreter: interpreter only, not run on hardware."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bitgrain.conformance.cases import Case
from bitgrain.conformance.checks import check
from bitgrain.conformance.grid import float8, int_affine
from bitgrain.conformance.tolerances import allowed
from bitgrain.errors import BadValueError, RunError
from bitgrain.kernels.base import Fidelity, LinearProblem
from bitgrain.kernels.registry import candidates, kernel_entries
from bitgrain.kernels.triton import availability, tuning
from bitgrain.kernels.triton.experts import sort_rows
from bitgrain.kernels.triton.linear import TritonLinear
from bitgrain.kernels.triton.packed import FLOATS, FP8, INT8, quantized
from bitgrain.kernels.triton.units import columns_of, deal, lay_out, pack_units, unpack_units
from bitgrain.numerics.bitpack import PLANES
from bitgrain.platforms.base import Platform
from bitgrain.platforms.probe import PlatformRequest, described
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, FloatWeight, IntAffineWeight
from bitgrain.weights.block_float import block_float_spec
from bitgrain.weights.synthetic import sample_weight

# of planned devices: sm90 multiplies e4m3fn, gfx942 e4m3fnuz, xe2 no 8-bit floats
SM90, GFX942, XE2 = TritonLinear("cuda"), TritonLinear("hip"), TritonLinear("xpu")
WHY = availability.missing() or ("" if availability.interpreted() else "triton compiles for a device here: TRITON_INTERPRET is not 1")
needs_triton = pytest.mark.skipif(bool(WHY), reason=WHY or "present")

INT8_TOKEN, INT8_ASYM = ActivationSpec("int8", "token"), ActivationSpec("int8", "token", symmetric=False)
INT8_STATIC = ActivationSpec("int8", "tensor", symmetric=False, dynamic=False, scale=0.031, zero=-7)
FP8_TOKEN, FP8_STATIC = ActivationSpec("fp8_e4m3fn", "token"), ActivationSpec("fp8_e4m3fn", "tensor", dynamic=False, scale=0.01)
ROW_INDEXED = replace(int_affine(4, "group", 1, "float", scale="float32"), row_index=True)

# name: (kernel, weight, activation, (M, N, K), dtype, arithmetic)
CASES = {
    **{f"int{bits}-g32": (SM90, int_affine(bits, "group", 32, zero), NO_ACTIVATION, (3, 37, 100), dtype, FLOATS)
       for bits, zero, dtype in ((1, "constant", "bfloat16"), (2, "integer", "float16"), (3, "float", "float32"), (5, "integer", "float16"), (6, "float", "bfloat16"), (7, "constant", "float32"))},
    "int4-g128": (SM90, int_affine(4, "group", 128), NO_ACTIVATION, (17, 80, 264), "float16", FLOATS),
    "int4-g12-odd": (SM90, int_affine(4, "group", 12, "integer"), NO_ACTIVATION, (40, 19, 50), "bfloat16", FLOATS),
    "int4-g5-columns": (SM90, int_affine(4, "group", 5, "integer"), NO_ACTIVATION, (3, 33, 43), "float16", FLOATS),
    "int4-act-order": (SM90, int_affine(4, "group", 32, "integer", index=True), NO_ACTIVATION, (5, 40, 100), "float16", FLOATS),
    "int4-row-index": (SM90, ROW_INDEXED, NO_ACTIVATION, (3, 24, 70), "float32", FLOATS),
    "int8-tensor-scale": (SM90, int_affine(8, "tensor", scale="float32"), NO_ACTIVATION, (3, 37, 100), "bfloat16", FLOATS),
    "int8-float-zero": (SM90, int_affine(8, "channel", zero="float"), NO_ACTIVATION, (3, 37, 100), "float32", FLOATS),
    "w8a8-token": (SM90, int_affine(8, "channel"), INT8_TOKEN, (17, 80, 264), "float32", INT8),
    "w8a8-tensor-dynamic": (SM90, int_affine(8, "channel", zero="integer"), ActivationSpec("int8", "tensor"), (3, 37, 100), "float32", INT8),
    "w8a8-asym-both": (SM90, int_affine(8, "group", 32, "integer"), INT8_ASYM, (3, 37, 100), "float32", INT8),
    "w8a8-static-asym": (SM90, int_affine(8, "channel"), INT8_STATIC, (5, 37, 300), "bfloat16", INT8),
    "w4a8-act-order-asym": (SM90, int_affine(4, "group", 32, "integer", index=True), INT8_ASYM, (3, 24, 96), "float32", INT8),
    "w4a8-groups": (SM90, int_affine(4, "group", 64), ActivationSpec("int8", "group", group_size=32, symmetric=False), (3, 24, 130), "float32", INT8),
    "w4a4": (SM90, int_affine(4, "channel"), ActivationSpec("int4", "token", top=7.0, clipped=True, clip=0.9), (3, 24, 70), "float16", INT8),
    "w8a8-float-zero": (SM90, int_affine(8, "group", 32, "float"), INT8_ASYM, (3, 24, 70), "bfloat16", FLOATS),
    "int4-fp8-input": (SM90, int_affine(4, "group", 32), ActivationSpec("fp8_e4m3fn", "group", group_size=64), (3, 24, 130), "float16", FLOATS),
    "fp8-tensor": (SM90, float8("fp8_e5m2", "tensor"), NO_ACTIVATION, (3, 37, 100), "float16", FLOATS),
    "fp8-block-odd": (SM90, float8("fp8_e4m3fn", "block", (16, 24)), NO_ACTIVATION, (3, 37, 100), "bfloat16", FLOATS),
    "fp8-fnuz": (SM90, float8("fp8_e4m3fnuz", "channel"), NO_ACTIVATION, (3, 37, 100), "float32", FLOATS),
    "fp8-native": (SM90, float8("fp8_e4m3fn", "channel"), FP8_TOKEN, (17, 37, 100), "float32", FP8),
    "fp8-native-static": (SM90, float8("fp8_e4m3fn", "tensor"), FP8_STATIC, (3, 37, 100), "float16", FP8),
    "fp8-native-block": (SM90, float8("fp8_e4m3fn", "block", (32, 64)), ActivationSpec("fp8_e4m3fn", "group", group_size=32), (3, 80, 200), "float32", FP8),
    "fp8-other-native": (GFX942, float8("fp8_e4m3fn", "channel"), FP8_TOKEN, (3, 37, 100), "float32", FP8),
    "fp8-emulated": (XE2, float8("fp8_e4m3fn", "channel"), FP8_TOKEN, (3, 37, 100), "float32", FLOATS),
    "fp8-mixed": (SM90, float8("fp8_e5m2", "channel"), FP8_TOKEN, (3, 37, 100), "float16", FLOATS),
}  # fmt: skip


def problem(spec, activation, shape, dtype):
    return LinearProblem(spec, activation.without_values(), *shape[1:], dtype)


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_definition(case):
    kernel, spec, activation, shape, dtype, arithmetic = CASES[case]
    posed = problem(spec, activation, shape, dtype)
    assert kernel.refusal(posed) is None
    outcome = check(kernel, Case(posed, shape[0], activation, {"bias": shape[0] != 3}, shape[0]), "cpu")
    assert not outcome.problem
    assert kernel.prepare(sample_weight(spec, *shape[1:]), activation).meta["layout"].dot == arithmetic
    exact = Fidelity.EXACT if activation.is_none else Fidelity.EMULATED if arithmetic == FLOATS else Fidelity.NATIVE
    assert kernel.fidelity(posed) is exact


@needs_triton
def test_no_rows_give_no_rows():
    prepared = SM90.prepare(sample_weight(int_affine(4, "group", 32), 24, 64), NO_ACTIVATION)
    y = SM90.apply(torch.zeros(0, 64).half(), prepared, None)
    assert y.shape == (0, 24) and y.dtype == torch.float16


@needs_triton
@pytest.mark.parametrize(
    "spec,activation,k", [(int_affine(4, "group", 64), NO_ACTIVATION, 512), (int_affine(8, "channel"), INT8_TOKEN, 1024)], ids=["w4a16", "w8a8"]
)
def test_a_row_has_the_same_bits_alone_among_few_and_among_many(spec, activation, k):
    prepared = SM90.prepare(sample_weight(spec, 20, k), activation)
    assert tuning.tiles_for(prepared.meta["layout"], 20, k, 1, torch.float32, prepared.meta["platform"]).splits > 1
    x = torch.randn(70, k, generator=torch.Generator().manual_seed(1))
    many = SM90.apply(x, prepared, None)
    for rows in (1, 17):
        assert torch.equal(SM90.apply(x[:rows], prepared, None), many[:rows]), rows
    # programs of their own for each run of columns, or one that adds up all runs
    few = tuning.Tiles(32, 16, 64, 4, 4, 2)
    assert torch.equal(*(_launched(prepared, x[:3], activation, few, cores) for cores in (1, 1000)))


def _launched(prepared, x, activation, tiles, cores):
    from bitgrain.kernels.triton.linear_kernel import launch

    out = torch.empty(x.shape[0], prepared.shape[0])
    launch(*quantized(prepared.meta["layout"], activation, x), prepared.tensors, prepared.meta["layout"], None, out, tiles, cores)
    return out


@needs_triton
def test_programs_that_stay_take_every_tile():
    weight = sample_weight(int_affine(4, "group", 32), 70, 64)
    prepared, x = SM90.prepare(weight, NO_ACTIVATION), torch.randn(40, 64, generator=torch.Generator().manual_seed(2))
    got = _launched(prepared, x, NO_ACTIVATION, tuning.Tiles(16, 16, 32, 1, 4, 2, waves=1), 4)
    want = x @ weight.dequantize().T
    assert torch.allclose(got, want, rtol=0, atol=2e-5 * want.abs().max().item())


@needs_triton
@pytest.mark.parametrize("zero", [0, 7, 255, -300, 5000])
@pytest.mark.parametrize("activation", [NO_ACTIVATION, INT8_ASYM], ids=["16-bit", "int8"])
def test_any_whole_zero_point_is_exact(zero, activation):
    """Where the difference does not fit the type that multiplies, the zero point joins after the product."""
    sampled = sample_weight(int_affine(8, "channel"), 17, 70)
    for weight in (replace(sampled, zero=zero), replace(sampled, zero=torch.full_like(sampled.scale, zero, dtype=torch.int16))):
        x = torch.randn(3, 70, generator=torch.Generator().manual_seed(3)).bfloat16()
        got = SM90.apply(x, SM90.prepare(weight, activation), None)
        want = activation.fake_quantize(x).double() @ weight.dequantize().double().T
        assert ((got.double() - want).abs() / want.abs().amax(1, keepdim=True)).max() <= allowed("bfloat16", "exact")


@needs_triton
def test_groups_of_act_order_may_have_any_length():
    sampled = sample_weight(int_affine(3, "group", 32, "integer", index=True), 24, 96)
    index = torch.tensor([0] * 50 + [2] * 46)[torch.randperm(96, generator=torch.Generator().manual_seed(4))]
    weight = replace(sampled, group_index=index.to(torch.int32))
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(5))
    want = x @ weight.dequantize().T
    assert torch.allclose(SM90.apply(x, SM90.prepare(weight, NO_ACTIVATION), None), want, rtol=0, atol=2e-5 * want.abs().max().item())


@needs_triton
def test_rows_that_share_scales_by_an_index_in_segments():
    sampled = sample_weight(int_affine(4, "group", 32, "integer", scale="float32"), 24, 96)
    index = torch.randint(0, 5, (24,), generator=torch.Generator().manual_seed(6)).to(torch.int32)
    weight = IntAffineWeight(sampled.packed, 4, 96, sampled.scale[:5].contiguous(), sampled.zero[:5].contiguous(), 32, row_index=index)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(7))
    for activation, limit in ((NO_ACTIVATION, 2e-5), (INT8_ASYM, 2e-6)):
        want = activation.fake_quantize(x).double() @ weight.dequantize().double().T
        got = SM90.apply(x, SM90.prepare(weight, activation), None).double()
        assert ((got - want).abs() / want.abs().amax(1, keepdim=True)).max() <= limit


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("unit", [16, 32, 64])
def test_units_hold_every_code(bits, unit):
    codes = torch.randint(0, 1 << bits, (5, 3 * unit), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed = pack_units(codes, bits, unit)
    assert packed.shape == (5, 3 * unit * bits // 8) and torch.equal(unpack_units(packed, bits, unit), codes)


@pytest.mark.parametrize("k,segment,unit,width", [(256, 128, 64, 128), (100, 100, 16, 112), (60, 12, 16, 16), (4097, 4097, 64, 4160), (96, 32, 32, 32)])
def test_slots_hold_every_column_once(k, segment, unit, width):
    slots, gather = lay_out(k, segment, 16)
    assert (slots.unit, slots.width, gather) == (unit, width, None)
    columns = columns_of(slots, k, gather, torch.device("cpu"))
    assert torch.equal(columns[columns >= 0], torch.arange(k)) and slots.even(k) == (len(columns) == k)
    codes = torch.arange(k).remainder(251).to(torch.uint8)[None] + 1
    assert int((deal(codes, columns) == 0).sum()) == len(columns) - k


@pytest.mark.parametrize(
    ("kernel", "spec", "activation", "k", "reason"),
    [
        (SM90, block_float_spec("fp4_e2m1", 32, "e8m0"), NO_ACTIVATION, 64, "not block_float ones"),
        (SM90, int_affine(8, "channel"), ActivationSpec("int8", "token", outlier_threshold=2.0), 64, "stays as it is"),
        (SM90, int_affine(8, "channel"), INT8_TOKEN, 65_537, "enough for K up to 65536"),
        (SM90, int_affine(8, "channel"), INT8_ASYM, 32_769, "enough for K up to 32768"),
        (SM90, int_affine(4, "group", 24), ActivationSpec("int8", "group", group_size=32), 96, "divide each other"),
        (SM90, int_affine(4, "group", 32, index=True), ActivationSpec("int8", "group", group_size=32), 96, "act-order"),
    ],
    ids=["block-float", "outliers", "long", "long-asym", "groups", "act-order-groups"],
)
def test_what_it_cannot_do_is_refused_with_the_reason(kernel, spec, activation, k, reason):
    assert reason in kernel.refusal(problem(spec, activation, (1, 32, k), "float16")).reason


@needs_triton
@pytest.mark.parametrize("dtype,bad", [(torch.float8_e4m3fn, 0x7F), (torch.float8_e5m2, 0xFC), (torch.float8_e4m3fnuz, 0x80)])
def test_nan_codes_are_refused(dtype, bad):
    codes = torch.zeros(8, 8, dtype=torch.uint8)
    codes[3, 2] = bad
    with pytest.raises(BadValueError, match="1 NaN or infinite"):
        SM90.prepare(FloatWeight(codes.view(dtype), torch.ones(1, 1), (8, 8)), NO_ACTIVATION)


@needs_triton
@pytest.mark.parametrize("kernel", [SM90, GFX942], ids=["sm90", "gfx942"])
def test_every_finite_e4m3_value_is_multiplied_as_it_is(kernel):
    every = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    weight = FloatWeight(every[None].view(torch.float8_e4m3fn), torch.ones(1, 1), (1, len(every)))
    one = torch.eye(len(every)) * 448  # one row per column, which its own scale maps to the largest value
    prepared = kernel.prepare(weight, FP8_TOKEN)
    assert prepared.meta["layout"].dot == FP8
    if kernel is GFX942:  # the byte of -0 is a NaN on such a device, which the interpreter does not know
        assert not (prepared.tensors["codes"] == 0x80).any()
        values, _, _ = quantized(prepared.meta["layout"], FP8_TOKEN, torch.tensor([[-0.0, 1.0, -1.0]]).expand(1, 3))
        assert values.tolist()[0][0] == 0 and not (values == 0x80).any()
    rows = slice(0, None, 7)
    assert torch.equal(kernel.apply(one[rows], prepared, None)[:, 0], weight.dequantize()[0, rows] * 448)


class _Waits(TorchDispatchMode):
    """Fails where the host would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "is_nonzero", "unique_dim"), name
        assert not (name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])), "a mask as index"
        return func(*args, **(kwargs or {}))


@needs_triton
@pytest.mark.parametrize("activation", [NO_ACTIVATION, INT8_ASYM, INT8_STATIC, ActivationSpec("int8", "tensor")], ids=lambda a: a.describe().replace(" ", "-"))
def test_a_launch_does_not_wait_for_the_device(activation):
    prepared = SM90.prepare(sample_weight(int_affine(8, "channel"), 24, 64), activation)
    with _Waits():
        SM90.apply(torch.ones(2, 64), prepared, None)
        sort_rows(torch.tensor([[0, 1], [2, -1]]), 3)


# ---- tiles


LAYOUT = SM90.prepare(sample_weight(int_affine(4, "group", 128), 64, 4096), NO_ACTIVATION).meta["layout"]
DEVICE = Platform("cuda", "cuda", frozenset({"sm90", "fp8_dot", "int8_dot"}), 132, 1 << 37, generation="sm90")


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    monkeypatch.setenv("BITGRAIN_CACHE", str(tmp_path))
    tuning._measured.cache_clear()
    tuning._chosen.cache_clear()
    yield tmp_path / "triton-tiles.json"
    tuning._measured.cache_clear()
    tuning._chosen.cache_clear()


def test_the_order_of_sums_does_not_depend_on_the_number_of_rows(own_table):
    for n in (64, 1024, 4096, 14336):
        tiles = [tuning.tiles_for(LAYOUT, n, 4096, m, torch.bfloat16, DEVICE) for m in (1, 3, 16, 17, 64, 200, 5000)]
        assert len({(t.block_k, t.splits) for t in tiles}) == 1
    # few tiles leave cores without work: columns are split; many do not
    splits = [tuning.tiles_for(LAYOUT, n, 4096, 1, torch.bfloat16, DEVICE).splits for n in (64, 4096, 64 * 132 * 4)]
    assert splits == [8, 2, 1]


@pytest.mark.parametrize("generation", ["sm80", "sm90", "sm100", "gfx942", "default"])
def test_every_table_has_every_shape_and_says_that_it_is_untuned(generation):
    table = tuning._table(generation)
    assert "untuned" in table["note"] and set(table["shapes"]) == {"float16", "float32", "int8", "fp8"}
    for shapes in table["shapes"].values():
        assert [int(b) for b in shapes] == list(tuning.BUCKETS)
        assert all(n >= 16 and m >= 16 and warps in (4, 8) and stages >= 2 and waves >= 1 for n, m, warps, stages, waves in shapes.values())
        assert all(m <= max(16, int(b)) for b, (_, m, *_) in shapes.items())
    platforms = [described(PlatformRequest(key, name)) for key, names in (("cuda", ("sm80", "sm90", "sm100", "sm89")), ("hip", ("gfx942",))) for name in names]
    assert [tuning.generation_of(p) for p in platforms] == ["sm80", "sm90", "sm100", "default", "gfx942"]


def test_tuning_keeps_the_fastest_and_the_first_plan(own_table):
    before = tuning.tiles_for(LAYOUT, 4096, 4096, 1, torch.bfloat16, DEVICE)

    def measure(tiles):
        if tiles.stages > 3:
            raise RuntimeError("out of shared memory")
        return abs(tiles.block_n - 128) + abs(tiles.splits - 4) + tiles.warps + abs(tiles.block_k - 64) + 1.0 / tiles.stages + tiles.block_m / 1e4

    best, seconds = tuning.tune(measure, LAYOUT, 4096, 4096, 1, torch.bfloat16, DEVICE)
    assert (best.block_n, best.splits, best.warps, best.stages, best.block_m) == (128, 4, 4, 3, 16) and seconds == measure(best)
    assert tuning.tiles_for(LAYOUT, 4096, 4096, 1, torch.bfloat16, DEVICE) == best != before
    more, _ = tuning.tune(lambda tiles: -tiles.splits + abs(tiles.block_m - 64), LAYOUT, 4096, 4096, 64, torch.bfloat16, DEVICE)
    assert (more.block_k, more.splits, more.block_m) == (best.block_k, best.splits, 64)
    assert list(json.loads(own_table.read_text())["sm90"]) == [tuning.key_of(LAYOUT, 4096, 4096, torch.bfloat16)]
    assert tuning.tiles_for(LAYOUT, 4096, 2048, 1, torch.bfloat16, DEVICE).block_n == before.block_n, "another product has tiles of its own"


def test_tuning_needs_the_device(own_table):
    with pytest.raises(RunError, match="simulated"):
        tuning.tune(lambda tiles: 1.0, LAYOUT, 64, 4096, 1, torch.bfloat16, replace(DEVICE, state="simulated"))

    def fails(tiles):
        raise RuntimeError("does not fit")

    with pytest.raises(RunError, match="no tiles run"):
        tuning.tune(fails, LAYOUT, 64, 4096, 1, torch.bfloat16, DEVICE)
    assert not own_table.exists()


def test_a_damaged_table_is_as_none(own_table):
    own_table.write_text("{")
    assert tuning.tiles_for(LAYOUT, 64, 4096, 1, torch.bfloat16, DEVICE).block_m == 16


# ---- triton absent, broken, too old, or imported for something else


PROBE = """
import sys
{before}
from bitgrain.kernels.base import LinearProblem
from bitgrain.kernels.triton.linear import TritonLinear
from bitgrain.platforms.probe import counting_on
from bitgrain.conformance.grid import int_affine
from bitgrain.weights import NO_ACTIVATION
kernel = TritonLinear("cuda")
for platform in ("cuda:sm80", "cuda@host"):
    with counting_on(platform):
        refusal = kernel.refusal(LinearProblem(int_affine(4, "group", 32), NO_ACTIVATION, 16, 32, "float16"))
    print(refusal.reason if refusal else "takes it")
with counting_on("cuda@host"):
    print(kernel.state())
"""
ABSENT = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)"
BROKEN = "sys.path.insert(0, {folder!r})"
OLD = "import os; os.environ['TRITON_INTERPRET'] = '1'; import triton; del triton.language.dot; del triton.knobs"
COMPILED = "import triton"


@pytest.mark.parametrize(
    ("before", "answer"),
    [
        (ABSENT, "triton is not installed"),
        (BROKEN, "triton is broken: ImportError: half a package"),
        pytest.param(OLD, "lacks knobs.runtime, language.dot: it is too old, or too new", marks=needs_triton),
        pytest.param(COMPILED, "triton was imported for devices before its interpreter was asked for", marks=needs_triton),
        pytest.param("", "takes it", marks=needs_triton),
    ],
    ids=["absent", "broken", "old", "compiled", "unset"],
)
def test_a_simulated_platform_says_what_is_wrong_with_triton_and_a_planned_one_does_not_ask(before, answer, tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('half a package')")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = PROBE.format(before=before.format(folder=str(tmp_path)))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    planned, simulated, state = result.stdout.strip().splitlines()
    assert planned == "takes it" and answer in simulated
    assert availability.PROOF in state if not before else answer in state


def test_a_present_device_is_not_run_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(availability, "target", lambda key: DEVICE)
    assert "TRITON_INTERPRET=1 is set" in availability.missing("cuda") or WHY


def test_registered_for_the_devices_of_three_vendors_and_says_how_it_was_tested():
    assert {p for o, p, k in kernel_entries() if k.name == "triton.linear"} == {"cuda", "hip", "xpu"}
    assert "triton.linear" not in [k.name for k in candidates("linear", "cpu")]
    assert SM90.proof == availability.PROOF
