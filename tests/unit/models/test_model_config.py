"""config.json to ModelConfig: both spellings, defaults, and everything wrong at once."""

import pytest

from bitgrain.errors import BitgrainError, ConfigError, ConflictingConfigError, ManyProblemsError
from bitgrain.layers.activation import ClampedGate, Gated
from bitgrain.layers.rotary import DynamicRope, LinearRope, Llama3Rope, LongRope, Rope, YarnRope
from bitgrain.models.config import ModelConfig
from bitgrain.models.registry import architecture_of
from tests.unit.models.tiny_models import FAMILIES, GPT_OSS, LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE


def parse(config, **changes):
    merged = {**config, **changes}
    return ModelConfig.from_dict({k: v for k, v in merged.items() if v is not ...}, "config.json")


def problems(config, **changes):
    with pytest.raises(BitgrainError) as caught:
        parse(config, **changes)
    found = caught.value
    return list(found.problems) if isinstance(found, ManyProblemsError) else [found]


def test_sizes_are_read_under_their_names():
    config = parse(LLAMA)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (96, 64, 112, 2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    assert (config.rms_norm_eps, config.hidden_act, config.architecture) == (1e-5, "silu", "LlamaForCausalLM")
    assert config.max_context == 64


def test_absent_keys_have_the_meaning_that_transformers_gives_them():
    config = parse(LLAMA, num_key_value_heads=..., hidden_act=..., rms_norm_eps=..., tie_word_embeddings=..., rope_theta=...)
    assert config.num_key_value_heads == 4
    assert (config.hidden_act, config.rms_norm_eps, config.tie_word_embeddings) == ("silu", 1e-6, False)
    assert config.rope == Rope(10000.0, 16)
    assert parse(QWEN3, head_dim=...).head_dim == parse(QWEN3, head_dim=..., hidden_size=66).head_dim == 128
    assert config.eos_token_ids == () and config.dtype is None


def test_every_problem_is_reported_at_once():
    found = problems(LLAMA, vocab_size=..., hidden_size=-1, hidden_act="mish", tie_word_embeddings="yes", head_dim=7)
    text = "\n".join(str(p) for p in found)
    assert {type(p) for p in found} == {ConfigError}
    for key in ("vocab_size", "hidden_size", "hidden_act", "tie_word_embeddings", "head_dim"):
        assert f"config.json: {key}" in text


@pytest.mark.parametrize("value", [True, "64", 64.0, 0])
def test_a_size_that_is_no_positive_integer_is_refused(value):
    assert "vocab_size" in problems(LLAMA, vocab_size=value)[0].where


@pytest.mark.parametrize(("value", "ids"), [(2, (2,)), ([3, 4], (3, 4)), (None, ())])
def test_end_tokens_are_one_or_several(value, ids):
    assert parse(LLAMA, eos_token_id=value).eos_token_ids == ids


def test_end_token_that_is_no_id_is_refused():
    assert "eos_token_id" in problems(LLAMA, eos_token_id=["</s>"])[0].where


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "torch.float32", "torch_dtype": "float16"}, "float32"),
    ],
)
def test_dtype_is_read_in_both_spellings(keys, name):
    assert parse(LLAMA, **keys).dtype == name


def test_heads_that_do_not_divide_are_refused():
    assert "num_key_value_heads" in problems(LLAMA, num_key_value_heads=3)[0].where
    assert "hidden_size" in problems(LLAMA, hidden_size=66)[0].where


@pytest.mark.parametrize(
    "change",
    [
        {"partial_rotary_factor": 0.5}, {"final_logit_softcapping": 30.0}, {"clip_qkv": 8.0}, {"residual_multiplier": 0.2}, {"is_causal": False},
        {"num_experts": 8}, {"shared_expert_intermediate_size": 64}, {"per_layer_config": {"0": {"head_dim": 32}}}, {"no_rope_layers": [0, 1]},
    ],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_a_key_that_would_change_numbers_is_refused_by_name(change):
    found = problems(LLAMA, **change)
    assert [next(iter(change)) in p.where for p in found] == [True]


def test_neutral_values_of_such_keys_pass():
    neutral = {
        "partial_rotary_factor": 1.0,
        "final_logit_softcapping": None,
        "is_causal": True,
        "pretraining_tp": 2,
        "per_layer_config": {},
    }
    assert parse(LLAMA, **neutral) == parse(LLAMA)


def test_biases_follow_the_configuration_and_the_architecture():
    assert [(c.qkv_bias, c.o_bias, c.mlp_bias) for c in (parse(LLAMA), parse(LLAMA, attention_bias=True), parse(LLAMA, mlp_bias=True))] == [
        (False, False, False),
        (True, True, False),
        (False, False, True),
    ]
    assert (parse(QWEN2).qkv_bias, parse(QWEN2).o_bias) == (True, False)


# ---- rotary ----

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
FACTORS = [1.0 + 0.1 * i for i in range(8)]


@pytest.mark.parametrize(
    ("section", "rope", "reach"),
    [
        ({"type": "linear", "factor": 4}, LinearRope(10000.0, 16, 4.0), 256),
        ({"type": "dynamic", "factor": 2.0}, DynamicRope(10000.0, 16, 2.0, 64), 128),
        (LLAMA3, Llama3Rope(10000.0, 16, 8.0, 1.0, 4.0, 32), 64),
        ({"type": "yarn", "factor": 4.0}, YarnRope(10000.0, 16, 4.0, 64), 256),
        (
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "truncate": False,
                "attention_factor": 1.3,
                "beta_fast": 16,
            },
            YarnRope(10000.0, 16, 4.0, 16, 1.3, 16.0, 1.0, truncate=False),
            64,
        ),
        (
            {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1], "original_max_position_embeddings": 32},
            LongRope(10000.0, 16, tuple(FACTORS), tuple(FACTORS[::-1]), 32, 2.0),
            64,
        ),
    ],
    ids=["linear", "dynamic", "llama3", "yarn", "yarn-full", "longrope"],
)
def test_rope_scaling_is_read_in_both_spellings(section, rope, reach):
    old = parse(LLAMA, rope_scaling=section)
    new = parse(LLAMA, rope_theta=..., rope_parameters={"rope_theta": 10000.0, **section})
    assert old.rope == new.rope == rope
    assert old.max_context == reach


def test_rope_stated_twice_and_differently_is_refused():
    found = problems(LLAMA, rope_parameters={"rope_theta": 5000.0, "rope_type": "default"})
    assert [type(p) for p in found] == [ConflictingConfigError] and "rope_theta" in found[0].where


@pytest.mark.parametrize(
    ("section", "word"),
    [
        ({"rope_type": "mrope", "mrope_section": [2, 3, 3]}, "rope_type"),
        ({"rope_type": "linear", "factor": 2.0, "alpha": 1000.0}, "alpha"),
        ({"rope_type": "default", "factor": 2.0}, "factor"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": -1.0}, "factor"),
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}, "original_max_position_embeddings"),
        ({**LLAMA3, "original_max_position_embeddings": None}, "original_max_position_embeddings"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor"),
        ({"rope_type": "yarn", "factor": 4.0, "extrapolation_factor": 0.5}, "extrapolation_factor"),
        (
            {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[:3], "original_max_position_embeddings": 32},
            "long_factor",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
    ],
)
def test_rope_that_is_not_understood_is_refused_by_name(section, word):
    assert any(word in str(p) for p in problems(LLAMA, rope_parameters=section))


# ---- sliding windows ----


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({**MISTRAL}, (7, 7)),
        ({**MISTRAL, "sliding_window": None}, (None, None)),
        ({**MISTRAL, "sliding_window": ...}, (4096, 4096)),
        ({**LLAMA, "sliding_window": 8, "use_sliding_window": False}, (None, None)),
        ({**QWEN2, "sliding_window": 8, "max_window_layers": 1}, (None, None)),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (None, 8)),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 8}, (None, None)),
        ({**QWEN3, "use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, (8, None)),
        ({**QWEN3_MOE, "use_sliding_window": True, "sliding_window": 8}, (8, 8, 8)),
        ({**QWEN3_MOE, "use_sliding_window": False, "sliding_window": 8, "max_window_layers": 48}, (None, None, None)),
    ],
)
def test_windows_per_layer(config, windows):
    assert parse(config).windows == windows


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({**LLAMA, "sliding_window": 8}, "sliding_window"),
        ({**MISTRAL, "use_sliding_window": False}, "use_sliding_window"),
        ({**MISTRAL, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({**QWEN2, "layer_types": ["full_attention"]}, "layer_types"),
        ({**QWEN2, "layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        ({**QWEN2, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({**QWEN3_MOE, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "max_window_layers"),
    ],
)
def test_windows_that_contradict_are_refused(config, key):
    assert [key in p.where for p in problems(config)] == [True]


# ---- experts ----


def test_experts_are_read_in_both_spellings():
    other = {**QWEN3_MOE, "num_local_experts": QWEN3_MOE["num_experts"], "num_experts": ...}
    assert parse(other) == parse(QWEN3_MOE)
    routing = parse(QWEN3_MOE).mixtures.routings[0]
    assert routing is not None
    assert (routing.count, routing.per_token, routing.normalize) == (6, 2, True)


def test_experts_counted_twice_and_differently_are_refused():
    assert [type(p) for p in problems(QWEN3_MOE, num_local_experts=5)] == [ConflictingConfigError]


def test_dense_layers_among_experts():
    sparse = lambda **changes: [parse(QWEN3_MOE, **changes).mixtures.routings[i] is not None for i in range(3)]  # noqa: E731
    assert sparse() == [True, True, True]
    assert sparse(mlp_only_layers=[1]) == [True, False, True]
    assert sparse(decoder_sparse_step=2) == [False, True, False]


def test_more_experts_per_token_than_experts_is_refused():
    assert "num_experts_per_tok" in problems(QWEN3_MOE, num_experts_per_tok=7)[0].where


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_parses(name):
    assert parse(FAMILIES[name]).num_hidden_layers >= 2


# ---- gpt-oss ----


def test_gpt_oss_leaves_much_to_its_defaults():
    left_out = ("rope_theta", "rms_norm_eps", "attention_bias", "swiglu_limit", "sliding_window", "head_dim", "layer_types")
    config = parse(GPT_OSS, num_hidden_layers=3, **dict.fromkeys(left_out, ...))
    assert config.windows == (128, None, 128) and config.head_dim == 64 and config.rms_norm_eps == 1e-5
    assert config.qkv_bias and config.o_bias and config.mlp_bias and config.wide_norm
    assert config.join == ClampedGate(1.702, 7.0)
    assert config.rope == YarnRope(150000.0, 64, 32.0, 4096, truncate=False)
    assert config.mixtures.size == 40
    assert all(r is not None and r.over_chosen and r.router == "router" and not r.normalize for r in config.mixtures.routings)


def test_gpt_oss_says_what_differs():
    rope = {"rope_type": "yarn", "factor": 2.0, "truncate": False, "original_max_position_embeddings": 64, "rope_theta": 500.0}
    config = parse(GPT_OSS, rope_theta=..., rope_scaling=rope, attention_bias=False, swiglu_alpha=1.0, swiglu_limit=3, num_experts_per_tok=..., experts_per_token=3)
    assert config.rope == YarnRope(500.0, 24, 2.0, 64, truncate=False) and config.max_context == 128
    assert not config.qkv_bias and config.join == ClampedGate(1.0, 3.0) and config.mixtures.routings[0].per_token == 3


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"sliding_window": None}, "sliding_window"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"swiglu_limit": 0}, "swiglu_limit"),
        ({"swiglu_alpha": "x"}, "swiglu_alpha"),
        ({"experts_per_token": 3}, "experts_per_token"),
        ({"num_local_experts": None}, "num_experts"),
    ],
)
def test_gpt_oss_that_cannot_be_is_refused_by_key(change, key):
    assert any(key in p.where for p in problems(GPT_OSS, **change))


def test_gpt_oss_without_windows_needs_no_size():
    assert parse(GPT_OSS, layer_types=["full_attention"] * 2, sliding_window=None).windows == (None, None)


def test_other_architectures_do_not_clamp():
    assert parse(LLAMA).join == Gated("silu") and not parse(QWEN3).wide_norm
    assert "swiglu_limit" in problems(LLAMA, swiglu_limit=7.0)[0].where


# ---- which architecture ----


@pytest.mark.parametrize("name", FAMILIES)
def test_model_type_stands_in_for_the_architecture(name):
    config = FAMILIES[name]
    assert parse(config, architectures=...) == parse(config, architectures=None) == parse(config)


def test_architecture_that_is_named_wins_over_the_model_type():
    assert parse(LLAMA, model_type="gpt_oss").architecture == "LlamaForCausalLM"
    assert architecture_of({"architectures": ["Unheard"], "model_type": "llama"}) == "Unheard"
    assert architecture_of({"model_type": "unheard"}) == architecture_of({}) == architecture_of({"model_type": 3}) == ""


@pytest.mark.parametrize("value", ["LlamaForCausalLM", [], [3]])
def test_architectures_that_is_no_list_of_names_is_refused(value):
    with pytest.raises(ConfigError, match="architectures"):
        architecture_of({"architectures": value, "model_type": "llama"})


# ---- sizes that would make a plan of millions of modules ----


@pytest.mark.parametrize("name, changes, key", [
    ("llama", {"num_hidden_layers": 2**62}, "num_hidden_layers"),
    ("qwen3_moe", {"num_experts": 2**32 - 1}, "num_experts"),
    ("qwen3_moe", {"num_experts": 20_000, "num_hidden_layers": 9_000}, "num_experts"),
])  # fmt: skip
def test_absurd_counts_are_refused(name, changes, key):
    assert any(key in str(p) and "at most" in str(p) for p in problems(FAMILIES[name], **changes))
