"""Rules match whole dotted segments, or an anchored regex; never a piece of a name."""

import time

import pytest

from bitgrain.errors import ConfigError
from bitgrain.formats.matching import (
    SegmentRules,
    compile_rule,
    matches_regex,
    matches_segments,
    matches_wildcard,
    matches_wildcard_segments,
    nearest_names,
)

ATTENTION = "model.layers.0.self_attn.q_proj"
NAMES = [f"model.layers.{i}.mlp.experts.{e}.{p}" for i in range(64) for e in range(260) for p in ("gate_proj", "up_proj", "down_proj")]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("lm_head", "my_lm_head", False),
        ("model.layers.0.self_attn", ATTENTION, True),
        ("model.layers.0.self_attn.q_proj", ATTENTION, True),
        ("model.layers.0", "model.layers.01.self_attn", False),
        ("layers.1", "model.layers.11.mlp", False),
        ("layers.1", "model.layers.1.mlp", True),
        ("gate", "model.layers.3.mlp.gate", True),
        ("gate", "model.layers.3.mlp.gate_proj", False),
        ("mlp.gate", "model.layers.3.mlp.gate", True),
        ("mlp.gate", "model.layers.3.mlp.gate_proj", False),
        ("layers.self_attn", ATTENTION, False),
        ("visual.", "model.visual.blocks.0.fc1", True),
        ("model.layers.0.self_attn.q_proj.weight", ATTENTION, False),
        ("", ATTENTION, False),
        (".", ATTENTION, False),
        ("layers.*", ATTENTION, False),
    ],
)
def test_segment_pattern_matches_whole_segments_only(pattern, name, expected):
    assert matches_segments(pattern, name) is expected
    assert (SegmentRules([pattern]).find(name) == pattern) is expected


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("model.layers.*.self_attn", ATTENTION, True),
        ("model.layers.*.mlp", ATTENTION, False),
        ("self_attn.?_proj", ATTENTION, True),
        ("layers.*", ATTENTION, True),
        ("layers.*.q_proj", ATTENTION, False),
        ("q_*", ATTENTION, True),
        ("", ATTENTION, False),
    ],
)
def test_wildcards_inside_segments_do_not_cross_dots(pattern, name, expected):
    assert matches_wildcard_segments(pattern, name) is expected


def test_whole_name_wildcard_crosses_dots_and_is_anchored_at_both_ends():
    assert matches_wildcard("*self_attn*", ATTENTION)
    assert matches_wildcard("model.layers.0.*", ATTENTION)
    assert not matches_wildcard("self_attn*", ATTENTION)
    assert not matches_wildcard("*SELF_ATTN*", ATTENTION)


def test_regex_is_anchored_at_the_start_and_open_at_the_end():
    assert matches_regex(r"model\.layers\.0\.", ATTENTION)
    assert matches_regex(r".*q_proj", ATTENTION)
    assert not matches_regex(r"q_proj", ATTENTION)


def test_bad_regex_is_a_config_error_that_names_the_pattern_and_its_key():
    with pytest.raises(ConfigError, match=r"ignore\[3\].*'\(unclosed'"):
        compile_rule("(unclosed", "ignore[3]")


def test_rules_of_a_list_answer_with_the_first_in_order():
    rules = SegmentRules(["mlp.up_proj", "layers.3", "mlp"])
    assert rules.find("model.layers.3.mlp.up_proj") == "mlp.up_proj"
    assert rules.find("model.layers.3.mlp.gate") == "layers.3"
    assert rules.find("model.layers.4.mlp.gate") == "mlp"
    assert rules.find("model.layers.4.self_attn.q_proj") is None
    assert rules.patterns == ("mlp.up_proj", "layers.3", "mlp")


def test_index_and_single_patterns_agree_on_many_names():
    patterns = ["experts.7", "layers.3.mlp", "mlp.experts.2.up_proj", "gate", "lm_head", "layers"]
    rules = SegmentRules(patterns)
    for name in NAMES[::97]:
        assert rules.find(name) == next((p for p in patterns if matches_segments(p, name)), None)


def test_nearest_names_puts_the_likeliest_first_also_among_many():
    assert nearest_names("model.layers.3.mlp.experts.7.gat_proj", NAMES)[0] == "model.layers.3.mlp.experts.7.gate_proj"
    assert nearest_names("lm_hed", [*NAMES, "lm_head"]) == ["lm_head"]
    assert nearest_names("group_sise", ["bits", "group_size", "sym"], 1) == ["group_size"]
    assert nearest_names("zzz", ["bits", "sym"]) == []


def test_fifty_thousand_names_against_two_hundred_rules_take_seconds():
    rules = [f"model.layers.{i}.mlp.experts.{e}.gate" for i in range(20) for e in range(10)]
    began = time.perf_counter()
    index = SegmentRules(rules)
    assert not any(index.find(name) for name in NAMES)
    assert not any(matches_segments(rule, name) for name in NAMES for rule in rules[::10])
    assert len(nearest_names(rules[0], NAMES)) == 3
    assert time.perf_counter() - began < 5
