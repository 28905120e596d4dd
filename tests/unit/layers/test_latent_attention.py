"""The dense copy that latent attention multiplies by, and what it cannot stand for."""

import pytest
import torch

from bitgrain.errors import RequestError
from bitgrain.kvcache.cache import SequenceCache
from bitgrain.kvcache.spec import KVCacheSpec
from bitgrain.layers.cache_choice import of_latents
from bitgrain.layers.latent_attention import DenseCopy
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, ChannelScale, DenseWeight, LowRank, Transformed

INT8 = ActivationSpec("int8", "token")


class Served:
    """A builder that serves one module."""

    def __init__(self, weight, activation=NO_ACTIVATION, bias=None):
        self.module = weight, activation, bias

    def matrix(self, names):
        assert names == ("kv_b",)
        return self.module

    def moved_bias(self, bias):
        return bias


def parts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight, scale, x = (torch.randn(*shape, generator=generator) for shape in ((12, 8), (8,), (5, 8)))
    return weight, scale.abs() + 0.5, x


def test_maps_of_the_input_are_part_of_the_matrix_where_nothing_is_quantized_behind_them():
    weight, scale, x = parts()
    low = LowRank(torch.randn(2, 8), torch.randn(12, 2))
    stored = Transformed(DenseWeight(weight), (ChannelScale(scale),), low)
    copy = DenseCopy.of(Served(stored), "kv_b")
    assert copy.mapped(x) is x
    mapped = stored.inputs[0].apply(x)
    torch.testing.assert_close(x @ copy.weight.t(), mapped @ weight.t() + low.apply(mapped), rtol=1e-4, atol=1e-4)


def test_a_quantized_input_is_mapped_first():
    weight, scale, x = parts()
    stored = Transformed(DenseWeight(weight), (ChannelScale(scale),))
    copy = DenseCopy.of(Served(stored, INT8), "kv_b")
    assert torch.equal(copy.weight, weight)
    assert torch.equal(copy.mapped(x), INT8.fake_quantize(stored.inputs[0].apply(x)))
    assert not torch.equal(copy.mapped(x), stored.inputs[0].apply(x))
    assert copy.mapped(x.bfloat16()).dtype is torch.bfloat16
    assert copy.nbytes == (12 * 8 + 8) * 4


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        (Transformed(DenseWeight(torch.ones(12, 8)), (), LowRank(torch.ones(2, 8), torch.ones(12, 2))), INT8),
        (Transformed(DenseWeight(torch.ones(12, 8)), (), None, (ChannelScale(torch.ones(12)),)), INT8),
        (DenseWeight(torch.ones(12, 8)), ActivationSpec("int8", "tensor", dynamic=False, scale=0.1, output=0.2)),
    ],
    ids=["low-rank", "mapped-output", "quantized-output"],
)
def test_what_a_matrix_cannot_stand_for_is_refused_by_name(weight, activation):
    with pytest.raises(RequestError, match="kv_b"):
        DenseCopy.of(Served(weight, activation), "kv_b")


def test_latents_are_stored_as_asked_and_rotated_keys_as_they_come():
    cache = SequenceCache([of_latents("attention", KVCacheSpec("int8", source="computed"))], 16)
    keys, latents = torch.randn(5, 1, 8), torch.randn(5, 1, 32)
    cache.append(0, keys, latents)
    found_keys, found_latents = cache.read(0, torch.float32)
    assert torch.equal(found_keys, keys)
    assert 0 < (found_latents - latents).abs().max() < 0.02 * latents.abs().max()


def test_scales_of_keys_and_values_are_refused():
    with pytest.raises(RequestError, match=r"layers\.3\.self_attn"):
        of_latents("model.layers.3.self_attn", KVCacheSpec("fp8_e4m3fn", (0.5,), (0.5,), "checkpoint"))
