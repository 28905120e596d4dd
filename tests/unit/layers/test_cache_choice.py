"""Which cache an attention module gets: the checkpoint's word, the user's wish, and what is refused."""

import pytest

from bitgrain.errors import MissingTensorError, RequestError
from bitgrain.formats.attention_schemes import KVCacheScheme
from bitgrain.kvcache.spec import KVCacheSpec
from bitgrain.layers.cache_choice import choose_cache

FP8 = KVCacheScheme("fp8_e4m3fn", scales=(("a.k_scale", "k"), ("a.v_scale", "v")))
INT8 = KVCacheScheme("int8", symmetric=False)
SCALES = {"k": (0.5,), "v": (0.25,)}


def test_auto_follows_the_checkpoint():
    assert choose_cache("a", None, {}, "auto") == KVCacheSpec()
    assert choose_cache("a", FP8, SCALES, "auto") == KVCacheSpec("fp8_e4m3fn", (0.5,), (0.25,), source="checkpoint")
    assert choose_cache("a", FP8, {"kv": (0.5,)}, "auto").v_scale == (0.5,)


def test_stored_int8_scales_and_zero_points_are_used():
    spec = choose_cache("a", INT8, {**SCALES, "k_zero": (3.0,), "v_zero": (-4.0,)}, "auto")
    assert spec == KVCacheSpec("int8", (0.5,), (0.25,), "checkpoint", (3.0,), (-4.0,))


def test_sixteen_bits_can_always_be_asked_for():
    assert choose_cache("a", FP8, SCALES, "16bit") == KVCacheSpec()


def test_asked_type_without_stored_scales_says_where_its_scales_come_from():
    assert choose_cache("a", None, {}, "fp8").source == "unscaled by choice"
    assert choose_cache("a", FP8, SCALES, "fp8_e5m2").source == "unscaled by choice"
    assert choose_cache("a", FP8, SCALES, "int8").source == "computed"


@pytest.mark.parametrize("scales", [{}, {"k": (0.5,)}, {"k": (0.5,), "v": (0.0,)}, {"k": (-1.0,), "v": (0.5,)}])
def test_announced_scales_that_are_absent_or_unset_are_an_error(scales):
    with pytest.raises(MissingTensorError, match="k_scale, v_scale"):
        choose_cache("a", FP8, scales, "auto")


def test_dynamic_int8_is_computed_and_dynamic_fp8_is_refused():
    assert choose_cache("a", KVCacheScheme("int8", dynamic=True), {}, "auto").source == "computed"
    with pytest.raises(RequestError, match="16bit"):
        choose_cache("a", KVCacheScheme("fp8_e4m3fn", dynamic=True), {}, "auto")
    with pytest.raises(RequestError, match="int3"):
        choose_cache("a", KVCacheScheme("int3"), SCALES, "auto")


@pytest.mark.parametrize("element", ["int4", "nvfp4"])
def test_four_bit_caches_use_stored_scales_or_compute_their_own(element):
    assert choose_cache("a", KVCacheScheme(element), SCALES, "auto") == KVCacheSpec(element, (0.5,), (0.25,), "checkpoint")
    assert choose_cache("a", KVCacheScheme(element, dynamic=True), {}, "auto").source == "computed"
    # scales of an fp8 cache are not those of another
    for scheme in (None, FP8):
        assert choose_cache("a", scheme, SCALES if scheme else {}, element) == KVCacheSpec(element, source="computed")
    with pytest.raises(MissingTensorError, match="k_scale, v_scale"):
        choose_cache("a", KVCacheScheme(element), {}, "auto")


def test_channel_scales_biases_and_fixed_scales_reach_the_specification():
    channel = choose_cache(
        "a", KVCacheScheme("int8", "channel"), {"k": (0.5,) * 4, "v": (0.25,) * 4, "k_zero": (1.5,) * 4, "v_zero": (0.0,) * 4}, "auto"
    )
    assert (channel.channel, channel.granularity, channel.k_zero) == (True, "channel", (1.5,) * 4)
    biased = choose_cache("a", FP8, {**SCALES, "k_bias": (1.0, 2.0), "v_bias": (3.0,)}, "auto")
    assert (biased.k_bias, biased.v_bias) == ((1.0, 2.0), (3.0,))
    assert choose_cache("a", KVCacheScheme("nvfp4", fixed_scale=1.0), {}, "auto") == KVCacheSpec("nvfp4", (1.0,), (1.0,), "checkpoint")


@pytest.mark.parametrize(("word", "element"), [("int8_per_token_head", "int8"), ("int4_per_token_head", "int4"), ("nvfp4", "nvfp4")])
def test_names_of_other_engines_are_accepted(word, element):
    assert choose_cache("a", None, {}, word).element == element


def test_unknown_cache_type_is_refused():
    with pytest.raises(RequestError, match="int3"):
        choose_cache("a", None, {}, "int3")
