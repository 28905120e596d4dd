"""What the stores keep, and how closely it is read back."""

import pytest
import torch

from bitgrain.errors import BitgrainError, LayoutError, RequestError
from bitgrain.kvcache.cache import SequenceCache
from bitgrain.kvcache.choice import make_stores
from bitgrain.kvcache.spec import KVCacheSpec
from bitgrain.kvcache.stores import FIRST_CAPACITY

E4M3, E5M2 = "fp8_e4m3fn", "fp8_e5m2"


def stored(element, k_scale, v_scale=None):
    return KVCacheSpec(element, k_scale, v_scale or k_scale, "checkpoint")


def rows(count, heads=2, dim=8, seed=0, dtype=torch.float32):
    return torch.randn(count, heads, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def round_trip(spec, x, dtype=torch.float32):
    keys, _ = make_stores(spec, 1000)
    keys.append(x)
    return keys.read(dtype)


# ---- specification ----


@pytest.mark.parametrize(
    "arguments",
    [
        {"element": "fp4"}, {"element": E4M3}, {"element": E4M3, "source": "checkpoint"}, {"element": E4M3, "source": "computed"},
        {"element": "int8"}, {"element": "int8", "source": "checkpoint", "k_scale": (1.0,), "v_scale": (1.0,), "k_zero": (0.5,)},
        {"element": E4M3, "source": "checkpoint", "k_scale": (1.0,), "v_scale": (1.0,), "v_zero": (1.0,)},
        {"element": "none", "source": "unscaled by choice"}, {"element": "none", "k_scale": (1.0,)},
        {"element": E4M3, "source": "checkpoint", "k_scale": (0.0,), "v_scale": (1.0,)},
        {"element": E4M3, "source": "checkpoint", "k_scale": (1.0,), "v_scale": (float("nan"),)},
        {"element": E4M3, "source": "checkpoint", "k_scale": (-1.0,), "v_scale": (1.0,)},
        {"element": E4M3, "source": "unscaled by choice", "v_scale": (1.0,)},
    ],
)  # fmt: skip
def test_specification_that_is_not_one_is_refused(arguments):
    with pytest.raises(RequestError, match="KV cache"):
        KVCacheSpec(**arguments)


@pytest.mark.parametrize(
    ("spec", "granularity", "words"),
    [
        (KVCacheSpec(), "none", "16-bit"),
        (stored(E4M3, (0.5,)), "tensor", "fp8_e4m3fn tensor, scales from the checkpoint"),
        (stored(E4M3, (0.5,), (0.5, 0.25)), "head", "fp8_e4m3fn head, scales from the checkpoint"),
        (KVCacheSpec("int8", source="computed"), "token_head", "int8 token_head, scales computed at write"),
        (KVCacheSpec(E5M2, source="unscaled by choice"), "none", "fp8_e5m2, unscaled by choice"),
    ],
)
def test_specification_says_what_it_is(spec, granularity, words):
    assert (spec.granularity, spec.describe()) == (granularity, words)


# ---- numbers ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_store_returns_what_it_was_given(dtype):
    x = rows(5, dtype=dtype)
    found = round_trip(KVCacheSpec(), x, dtype)
    assert found.dtype is dtype and torch.equal(found, x)


@pytest.mark.parametrize(("element", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)])
@pytest.mark.parametrize("scale", [0.25, 0.0371])
def test_fp8_store_keeps_every_representable_value(element, dtype, scale):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    values = codes[torch.isfinite(codes.float())].float() * scale
    x = values[: len(values) // 8 * 8].reshape(-1, 1, 8)
    assert torch.equal(round_trip(stored(element, (scale,)), x), x)


def test_fp8_store_divides_by_the_scale_and_rounds_to_even():
    # with scale 0.5 the codes hold 2 x: 17 lies between 16 and 18, and 16 has the even mantissa; 25 -> 24 likewise
    x = torch.tensor([8.5, 12.5, 0.0, -8.5]).reshape(1, 1, 4)
    assert round_trip(stored(E4M3, (0.5,)), x).flatten().tolist() == [8.0, 12.0, 0.0, -8.0]


@pytest.mark.parametrize(("element", "bound"), [(E4M3, 2**-4), (E5M2, 2**-3)])
def test_fp8_error_is_at_most_half_a_step(element, bound):
    x = rows(200, seed=4)
    found = round_trip(stored(element, (0.01,)), x)
    # relative for normal numbers; half the smallest subnormal below them
    assert ((found - x).abs() <= bound * x.abs() + 0.01 * 2**-10).all()
    assert not torch.equal(found, x)


@pytest.mark.parametrize(("element", "limit"), [(E4M3, 448.0), (E5M2, 57344.0)])
def test_fp8_saturates_at_the_largest_value(element, limit):
    x = torch.tensor([1e9, -1e9, float("inf"), float("-inf")]).reshape(1, 1, 4)
    assert round_trip(stored(element, (2.0,)), x).flatten().tolist() == [2 * limit, -2 * limit, 2 * limit, -2 * limit]
    assert torch.isnan(round_trip(stored(element, (2.0,)), torch.full((1, 1, 4), float("nan")))).all()


def test_fp8_scales_per_head_are_applied_to_their_heads():
    x = torch.full((3, 2, 4), 100.0)
    found = round_trip(stored(E4M3, (1.0, 0.1)), x)
    assert (found[:, 0] == 96).all() or (found[:, 0] == 104).all()  # 100 lies between them
    assert torch.allclose(found[:, 1], torch.tensor(44.8))  # 448 * 0.1: saturated


def test_keys_and_values_have_scales_of_their_own():
    keys, values = make_stores(stored(E4M3, (1.0,), (0.01,)), 10)
    for store in (keys, values):
        store.append(torch.full((1, 2, 4), 100.0))
    assert float(keys.read(torch.float32).max()) > 90
    assert torch.allclose(values.read(torch.float32), torch.tensor(4.48))


def test_scales_for_another_number_of_heads_are_refused():
    with pytest.raises(LayoutError, match="3 scales for 2 heads"):
        round_trip(stored(E4M3, (1.0, 1.0, 1.0)), rows(1))


def test_unscaled_fp8_stores_numbers_as_they_are():
    x = torch.tensor([1.0, 500.0, 0.15625, -3.0]).reshape(1, 1, 4)
    assert round_trip(KVCacheSpec(E4M3, source="unscaled by choice"), x).flatten().tolist() == [1.0, 448.0, 0.15625, -3.0]


def test_int8_scale_is_the_largest_of_a_token_and_head():
    x = rows(50, seed=2) * torch.logspace(-3, 3, 50)[:, None, None]
    found = round_trip(KVCacheSpec("int8", source="computed"), x)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((found - x).abs() <= 0.5001 * step).all()
    assert torch.allclose(found.abs().amax(-1), x.abs().amax(-1))


def test_stored_int8_scales_and_zero_points_make_the_codes():
    spec = KVCacheSpec("int8", (0.5,), (0.5,), "checkpoint", (10.0,), (10.0,))
    x = torch.tensor([-69.0, -68.5, 0.0, 0.3, 58.5, 100.0]).view(1, 1, 6)
    # codes reach from -128 to 127: values below -69 and above 58.5 are cut
    assert round_trip(spec, x).flatten().tolist() == [-69.0, -68.5, 0.0, 0.5, 58.5, 58.5]


def test_int8_keeps_zeros_and_whole_codes():
    x = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [127.0, -3.0, 64.0, -127.0]]])
    assert torch.equal(round_trip(KVCacheSpec("int8", source="computed"), x), x)


# ---- growth ----

SPECS = {"16-bit": KVCacheSpec(), "fp8": stored(E4M3, (0.02,)), "int8": KVCacheSpec("int8", source="computed")}


@pytest.mark.parametrize("name", SPECS)
def test_appending_in_parts_equals_appending_at_once(name):
    x = rows(3 * FIRST_CAPACITY)
    whole, parts = (make_stores(SPECS[name], len(x))[0] for _ in range(2))
    whole.append(x)
    for part in x.split([1, 62, 1, 1, 60, 67]):
        parts.append(part)
    assert parts.length == len(x)
    assert torch.equal(parts.read(torch.float32), whole.read(torch.float32))


@pytest.mark.parametrize("name", SPECS)
def test_truncated_store_forgets_the_rest(name):
    store = make_stores(SPECS[name], 100)[0]
    x = rows(20)
    store.append(x)
    store.truncate(7)
    store.append(x[12:])
    fresh = make_stores(SPECS[name], 100)[0]
    fresh.append(torch.cat([x[:7], x[12:]]))
    assert torch.equal(store.read(torch.float32), fresh.read(torch.float32))
    store.truncate(99)
    assert store.length == 15


def test_buffers_double_and_stop_at_the_limit():
    cache = SequenceCache([KVCacheSpec()] * 3, 5 * FIRST_CAPACITY)
    sizes = []
    token = torch.zeros(1, 2, 8)
    for _ in range(5 * FIRST_CAPACITY):
        for layer in range(3):
            cache.append(layer, token, token)
        sizes.append(cache.nbytes // (3 * 2 * 2 * 8 * 4))
    assert sorted(set(sizes)) == [FIRST_CAPACITY, 2 * FIRST_CAPACITY, 4 * FIRST_CAPACITY, 5 * FIRST_CAPACITY]
    with pytest.raises(RequestError, match=f"at most {5 * FIRST_CAPACITY}"):
        cache.append(0, token, token)


@pytest.mark.parametrize(("name", "per_token"), [("16-bit", 2 * 2 * 2 * 8), ("fp8", 2 * 2 * 8), ("int8", 2 * 2 * (8 + 4))])
def test_bytes_are_those_of_codes_and_scales(name, per_token):
    cache = SequenceCache([SPECS[name]], 10)
    assert cache.nbytes == 0
    x = rows(10, dtype=torch.bfloat16)
    cache.append(0, x, x)
    assert cache.nbytes == 10 * per_token


def test_length_counts_tokens_that_every_layer_has():
    cache = SequenceCache([KVCacheSpec()] * 2, 10)
    x = rows(3)
    cache.append(0, x, x)
    assert cache.length == 0
    cache.append(1, x, x)
    assert cache.length == 3
    cache.truncate(2)
    assert cache.length == 2 and len(cache.read(1, torch.float32)[1]) == 2


def test_requests_without_sense_are_refused():
    for wrong in (
        lambda: SequenceCache([KVCacheSpec()], 0),
        lambda: SequenceCache([KVCacheSpec()], 4).truncate(-1),
        lambda: SequenceCache([KVCacheSpec()], 4).read(0, torch.float32),
    ):
        with pytest.raises(BitgrainError, match="KV cache"):
            wrong()
