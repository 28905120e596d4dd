"""Four-bit stores, channel scales and biases against naive arithmetic."""

import pytest
import torch

from bitgrain.errors import LayoutError, RequestError
from bitgrain.kvcache.cache import SequenceCache
from bitgrain.kvcache.choice import make_stores
from bitgrain.kvcache.packed_stores import pack_nibbles
from bitgrain.kvcache.spec import KVCacheSpec

E4M3 = "fp8_e4m3fn"
FP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def rows(count, heads=2, dim=32, seed=0):
    return torch.randn(count, heads, dim, generator=torch.Generator().manual_seed(seed))


def stored(element, k_scale, **more):
    return KVCacheSpec(element, k_scale, k_scale, "checkpoint", **more)


def round_trip(spec, x, dtype=torch.float32):
    keys, _ = make_stores(spec, 1000)
    keys.append(x)
    return keys.read(dtype)


def naive_nvfp4(x, second):
    """One block of 16 after another; `second` is one number, or None for one of each row."""
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            row = x[t, h]
            over = second if second is not None else float(row.abs().max()) / (6 * 448)
            for start in range(0, len(row), 16):
                block = row[start : start + 16]
                scale = (
                    float(torch.tensor(float(block.abs().max()) / 6 / over if over else 0.0).clamp(max=448).to(torch.float8_e4m3fn)) * over
                )
                for i, value in enumerate(block.tolist()):
                    if scale == 0:
                        continue
                    distance = (FP4_VALUES - abs(value) / scale).abs()
                    nearest = (distance == distance.min()).nonzero().flatten().tolist()
                    code = next((c for c in nearest if c % 2 == 0), nearest[0])
                    out[t, h, start + i] = FP4_VALUES[code] * scale * (1 if value >= 0 else -1)
    return out


# ---- nvfp4 ----


@pytest.mark.parametrize("dim", [16, 32, 24, 7])
@pytest.mark.parametrize("second", [None, 0.01, 1.0])
def test_nvfp4_store_equals_the_naive_blocks(dim, second):
    x = rows(5, dim=dim, seed=dim) * torch.tensor([1e-3, 1.0, 3.0, 0.0, 40.0]).view(5, 1, 1)
    spec = KVCacheSpec("nvfp4", source="computed") if second is None else stored("nvfp4", (second,))
    torch.testing.assert_close(round_trip(spec, x), naive_nvfp4(x, second), rtol=1e-6, atol=1e-9)


def test_nvfp4_keeps_its_own_values_and_ties_go_to_even():
    grid = torch.cat([FP4_VALUES, -FP4_VALUES]).view(1, 1, 16)
    assert torch.equal(round_trip(stored("nvfp4", (0.5,)), grid), grid)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] + [0.0] * 8).view(1, 1, 16)
    assert round_trip(stored("nvfp4", (1.0,)), ties).flatten().tolist()[:8] == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]


def test_nvfp4_saturates_beyond_the_stored_range_and_keeps_nan_in_its_block():
    x = torch.zeros(1, 1, 48)
    x[0, 0, 0], x[0, 0, 16], x[0, 0, 32] = 1e9, float("nan"), 3.0
    found = round_trip(stored("nvfp4", (0.01,)), x)[0, 0]
    assert float(found[0]) == pytest.approx(6 * 448 * 0.01)
    assert found[16:32].isnan().all()
    assert float(found[32]) == pytest.approx(3.0, rel=0.07) and not found[:16].isnan().any()


def test_nvfp4_scales_per_head_are_applied_to_their_heads():
    x = torch.full((2, 2, 16), 100.0)
    found = round_trip(stored("nvfp4", (1.0, 0.01)), x)
    assert float(found[0, 0, 0]) == pytest.approx(100.0, rel=0.07) and float(found[0, 1, 0]) == pytest.approx(26.88)


def test_computed_nvfp4_error_is_within_half_a_step_of_its_block():
    x = rows(100, dim=64, seed=3)
    found = round_trip(KVCacheSpec("nvfp4", source="computed"), x)
    top = x.unflatten(-1, (-1, 16)).abs().amax(-1).repeat_interleave(16, -1)
    # the widest gap of E2M1 is 2 of 6, and the block scale itself is rounded by at most a sixteenth
    assert ((found - x).abs() <= top / 6 * 1.07).all() and not torch.equal(found, x)


# ---- int4 ----


def test_computed_int4_is_asymmetric_per_token_and_head():
    x = rows(20, seed=5) + 1.0
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    want = ((x / scale).round() + zero).clamp(0, 15).sub(zero).mul(scale)
    found = round_trip(KVCacheSpec("int4", source="computed"), x)
    assert ((found - want).abs() <= 1.001 * scale).all() and ((found - x).abs() <= 0.76 * scale).all()


def test_computed_int4_keeps_zeros_whole_codes_and_nan_rows():
    x = torch.zeros(3, 1, 16)
    x[1, 0] = torch.arange(-5.0, 11.0)
    x[2, 0, 4] = float("nan")
    found = round_trip(KVCacheSpec("int4", source="computed"), x)
    assert torch.equal(found[:2], x[:2]) and found[2].isnan().all()


def test_stored_int4_scales_and_zero_points_make_the_codes():
    spec = stored("int4", (0.5,), k_zero=(2.0,), v_zero=(2.0,))
    x = torch.tensor([-5.5, -5.0, 0.0, 0.3, 2.5, 9.0]).view(1, 1, 6)
    assert round_trip(spec, x).flatten().tolist() == [-5.0, -5.0, 0.0, 0.5, 2.5, 2.5]


def test_even_columns_lie_in_low_nibbles():
    codes = torch.tensor([[[1, 2, 3]]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [[[0x21, 0x03]]]


# ---- scales per channel, biases ----


@pytest.mark.parametrize(("element", "low", "high"), [("int8", -128, 127), ("int4", -8, 7)])
def test_channel_scales_and_offsets_belong_to_a_head_and_column(element, low, high):
    x = rows(4, heads=2, dim=3, seed=8)
    scale = torch.tensor([[0.02, 0.05, 0.1], [0.2, 0.5, 1.0]]).view(2, 3)
    zero = torch.tensor([[0.0, 1.0, -2.0], [0.25, 3.0, -1.5]]).view(2, 3)
    spec = KVCacheSpec(element, tuple(scale.flatten().tolist()), tuple(scale.flatten().tolist()), "checkpoint",
                       tuple(zero.flatten().tolist()), tuple(zero.flatten().tolist()), channel=True)  # fmt: skip
    want = ((x / scale + zero).clamp(low, high).round() - zero) * scale
    torch.testing.assert_close(round_trip(spec, x), want)
    assert (spec.granularity, spec.describe()) == ("channel", f"{element} channel, scales from the checkpoint")


def test_fp8_channel_scales_are_applied():
    x = torch.tensor([[[1.0, 100.0], [0.5, -3.0]]])
    scale = (0.01, 1.0, 0.005, 0.03)
    want = (x / torch.tensor(scale).view(2, 2)).to(torch.float8_e4m3fn).float() * torch.tensor(scale).view(2, 2)
    assert torch.equal(round_trip(stored(E4M3, scale, channel=True), x), want)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_channel_scales_of_another_count_are_refused(count):
    with pytest.raises(LayoutError, match=f"{count} scales for 2 heads of 3"):
        round_trip(stored("int8", (0.1,) * count, channel=True), rows(1, dim=3))


@pytest.mark.parametrize(("bias", "shape"), [((5.0,), (1, 1)), ((1.0, -2.0), (2, 1)), ((1.0, 2.0, 3.0), (1, 3)), (tuple(range(6)), (2, 3))])
@pytest.mark.parametrize("element", [E4M3, "nvfp4"])
def test_bias_is_subtracted_before_rounding_and_added_after(element, bias, shape):
    x = rows(3, dim=3) + 7
    moved = torch.tensor(bias, dtype=torch.float32).view(shape)
    spec = KVCacheSpec(element, (0.01,), (0.01,), "checkpoint", k_bias=tuple(float(b) for b in bias))
    plain = stored(element, (0.01,))
    assert torch.equal(round_trip(spec, x), round_trip(plain, x - moved) + moved)
    assert "with biases" in spec.describe()
    other = KVCacheSpec(element, (0.01,), (0.01,), "checkpoint", v_bias=spec.k_bias)
    for made, want in ((spec, round_trip(plain, x)), (other, round_trip(spec, x))):
        values = make_stores(made, 10)[1]
        values.append(x)
        assert torch.equal(values.read(torch.float32), want)


def test_bias_of_another_count_is_refused():
    with pytest.raises(LayoutError, match="4 biases for 2 heads of 3"):
        round_trip(KVCacheSpec(E4M3, (1.0,), (1.0,), "checkpoint", k_bias=(1.0,) * 4), rows(1, dim=3))


# ---- growth, bytes, specification ----

SPECS = {
    "nvfp4": KVCacheSpec("nvfp4", source="computed"),
    "nvfp4 stored": stored("nvfp4", (0.01,)),
    "int4": KVCacheSpec("int4", source="computed"),
    "int4 stored": stored("int4", (0.3,)),
    "biased": KVCacheSpec(E4M3, (0.01,), (0.01,), "checkpoint", k_bias=(1.0,), v_bias=(2.0,)),
}


@pytest.mark.parametrize("name", SPECS)
def test_parts_and_truncation_leave_what_one_append_leaves(name):
    x = rows(150)
    whole, parts = (make_stores(SPECS[name], len(x))[0] for _ in range(2))
    whole.append(x)
    for part in x[:90].split([1, 62, 27]):
        parts.append(part)
    parts.append(x[:30] * 9)
    parts.truncate(90)
    parts.append(x[90:])
    assert parts.length == 150 and torch.equal(parts.read(torch.float32), whole.read(torch.float32))
    assert parts.read(torch.bfloat16).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("name", "per_token_head"), [("nvfp4", 16 + 2 + 4), ("nvfp4 stored", 16 + 2), ("int4", 16 + 4 + 1), ("int4 stored", 16), ("biased", 32)]
)
def test_bytes_are_those_of_codes_and_scales(name, per_token_head):
    cache = SequenceCache([SPECS[name]], 10)
    x = rows(10)
    cache.append(0, x, x)
    assert cache.nbytes == 10 * 2 * 2 * per_token_head


@pytest.mark.parametrize(
    "arguments",
    [
        {"element": "nvfp4"}, {"element": "nvfp4", "source": "unscaled by choice"}, {"element": "int4", "source": "checkpoint"},
        {"element": "nvfp4", "source": "checkpoint", "k_scale": (1.0,), "v_scale": (1.0,), "k_zero": (1.0,)},
        {"element": "int4", "source": "checkpoint", "k_scale": (1.0,), "v_scale": (1.0,), "k_zero": (9.0,)},
        {"element": "int8", "source": "checkpoint", "k_scale": (1.0,) * 4, "v_scale": (1.0,) * 4, "k_zero": (200.0,) * 4, "channel": True},
        {"k_bias": (1.0,)}, {"element": E4M3, "source": "unscaled by choice", "v_bias": (float("inf"),)},
    ],
)  # fmt: skip
def test_specification_that_is_not_one_is_refused(arguments):
    with pytest.raises(RequestError, match="KV cache"):
        KVCacheSpec(**arguments)
