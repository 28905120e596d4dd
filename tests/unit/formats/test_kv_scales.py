"""Names of KV-cache scales."""

import pytest

from bitgrain.checkpoint.headers import TensorHeader
from bitgrain.formats.base import ModuleKind, ModuleView
from bitgrain.formats.kv_scales import kv_scale_of, kv_scales_in

ATTENTION = "model.layers.3.self_attn"
SPELLINGS = {
    "k_scale": "k", "v_scale": "v", "q_scale": "q", "kv_scale": "kv", "k_zero_point": "k_zero", "v_zero_point": "v_zero",
    "k_proj.k_scale": "k", "v_proj.v_scale": "v", "q_proj.q_scale": "q", "qkv_proj.k_scale": "k", "qkv_proj.v_scale": "v",
    "attn.k_scale": "k", "attn.v_scale": "v", "attn.q_scale": "q", "attn.kv_scale": "kv", "attn.k_zero_point": "k_zero",
    "k_cache.scale": "k", "v_cache.scale": "v", "q.scale": "q", "k.scale": "k",
    "k_proj.output_scale": "k", "v_proj.output_scale": "v", "q_proj.output_scale": "q",
}  # fmt: skip


@pytest.mark.parametrize(("local", "which"), SPELLINGS.items())
def test_spelling_gives_attention_module_and_which(local, which):
    assert kv_scale_of(f"{ATTENTION}.{local}") == (ATTENTION, which)


def test_mixer_projection_gives_the_mixer():
    assert kv_scale_of("backbone.layers.0.mixer.k_proj.k_scale") == ("backbone.layers.0.mixer", "k")


@pytest.mark.parametrize(
    "name",
    [
        f"{ATTENTION}.k_proj.weight_scale", f"{ATTENTION}.k_proj.input_scale", f"{ATTENTION}.o_proj.output_scale", "model.layers.0.mlp.down_proj.output_scale",
        f"{ATTENTION}.k_proj.weight", "k_scale", "model.norm.scale", f"{ATTENTION}.rotary.scale", f"{ATTENTION}.k_norm.weight", "q.weight",
    ],
)  # fmt: skip
def test_other_tensor_is_none(name):
    assert kv_scale_of(name) is None


def test_view_with_local_or_full_names_gives_the_same_scales():
    header = TensorHeader("x", "F32", (1,), "f", 0, 4)
    local = ModuleView(ATTENTION, ModuleKind.ATTENTION, {"v_scale": header, "k_proj.output_scale": header})
    full = ModuleView(ATTENTION, ModuleKind.ATTENTION, {local.full_name(n): header for n in local.tensors})
    assert kv_scales_in(local) == kv_scales_in(full) == ((f"{ATTENTION}.k_proj.output_scale", "k"), (f"{ATTENTION}.v_scale", "v"))
