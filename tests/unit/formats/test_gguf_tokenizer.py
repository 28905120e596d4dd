"""Tokenizers out of GGUF metadata: golden tokenizations of the format's own runtime, flags, chat templates, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitgrain.engine.tokenizer import Tokenizer
from bitgrain.errors import BitgrainError, ConfigError, DamagedFileError, RequestError
from bitgrain.formats.evidence import Evidence
from bitgrain.formats.gguf.pretokenizers import PRE_TOKENIZERS
from bitgrain.formats.gguf.tokenizer import describe_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden" / "tokenizers"
FILE = "model.gguf"
K = "tokenizer.ggml."
RANKED = json.loads((GOLDEN / "ranked.json").read_text(encoding="utf-8"))
RANKED["by_rules"] |= json.loads((GOLDEN / "ranked-2.json").read_text(encoding="utf-8"))["by_rules"]
SCORED = json.loads((GOLDEN / "scored.json").read_text(encoding="utf-8"))


def described(properties: dict, beside: bool = False):
    return describe_tokenizer(Evidence({}, None, {}, {}, {}, {FILE: {}}, properties=properties), beside)


def tokenizer(properties: dict) -> Tokenizer:
    found = described(properties)
    assert found is not None
    return Tokenizer.from_description(found)


def refusal(properties: dict) -> BitgrainError:
    with pytest.raises(BitgrainError) as caught:
        described(properties)
    return caught.value


def ranked(*merges: str, extra: dict | None = None, more: tuple[str, ...] = ()) -> dict:
    """A small vocabulary over the letters of its merges."""
    letters = dict.fromkeys(letter for merge in merges for letter in merge.replace(" ", ""))
    tokens = [*letters, *(m.replace(" ", "") for m in merges), *more]
    return {f"{K}model": "gpt2", f"{K}pre": "gpt-2", f"{K}tokens": tokens, f"{K}merges": list(merges), **(extra or {})}


def scored(tokens: dict[str, float], extra: dict | None = None, kinds: dict[str, int] | None = None) -> dict:
    """A small scored vocabulary behind <unk>, <s> and </s>."""
    every = {"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0, **tokens}
    types = [{"<unk>": 2, "<s>": 3, "</s>": 3, **(kinds or {})}.get(token, 1) for token in every]
    return {f"{K}model": "llama", f"{K}tokens": list(every), f"{K}scores": list(every.values()), f"{K}token_type": types, **(extra or {})}


def differing(found: Tokenizer, texts: list[str], cases: list) -> list:
    got = [(texts[i], add, special, found.encode(texts[i], add, special)) for i, add, special, _ in cases]
    return [(row, want) for row, (*_, want) in zip(got, cases, strict=True) if row[-1] != want]


@pytest.mark.parametrize("name", ["llamacpp-llama-q8-0", "llamacpp-qwen3moe-q8-0"])
def test_fixture_is_tokenized_as_the_runtime_does(name):
    golden = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    found = tokenizer(golden["properties"])
    wrong = [row for row in golden["cases"] if found.encode(*row[:3]) != row[3]]
    assert len(golden["cases"]) == 12 and not wrong, wrong[:2]


@pytest.mark.parametrize("pre", RANKED["by_rules"])
def test_rules_cut_text_as_the_runtime_does(pre):
    found = tokenizer({**RANKED["properties"], f"{K}pre": pre})
    assert not differing(found, RANKED["texts"], RANKED["by_rules"][pre])
    assert found.eos_token_ids == frozenset(RANKED["ends"])


def test_every_set_of_rules_has_a_golden_tokenization():
    assert {PRE_TOKENIZERS[name] for name in RANKED["by_rules"]} == set(PRE_TOKENIZERS.values())


def test_goldens_tell_the_rules_apart():
    """Two sets of rules with equal goldens would let one pass for the other."""
    alike: dict[str, list[str]] = {}
    for name, cases in RANKED["by_rules"].items():
        alike.setdefault(json.dumps(cases), []).append(name)
    # the same pieces in another notation, or another begin token where the file names none, or runs of spaces that merge alike
    assert [names for names in alike.values() if len(names) > 1] == [["qwen2", "bailingmoe"], ["dbrx", "chatglm-bpe", "jais-2"]]


@pytest.mark.parametrize("variant", SCORED["variants"], ids=lambda v: v["label"])
def test_scores_merge_as_in_the_runtime(variant):
    found = tokenizer({**SCORED["properties"], **variant["flags"], f"{K}scores": variant["scores"]})
    assert len(variant["cases"]) > 15 and not differing(found, SCORED["texts"], variant["cases"])


def test_of_equal_scores_the_left_neighbours_merge_first():
    found = tokenizer(scored({"a": 0.0, "aa": -1.0, "aaa": -1.0}, {f"{K}add_space_prefix": False, f"{K}add_bos_token": False}))
    ids = {text: i + 3 for i, text in enumerate(("a", "aa", "aaa"))}
    assert found.encode("aaaa") == [ids["aaa"], ids["a"]]
    assert found.encode("aaaaa") == [ids["aaa"], ids["aa"]]


def test_token_with_a_space_inside_merges_across_words():
    tokens = {"▁": 0.0, "a": 0.0, "b": 0.0, "▁b": -1.0, "a▁b": -2.0}
    found = tokenizer(scored(tokens, {f"{K}add_space_prefix": False, f"{K}add_bos_token": False}))
    assert found.encode("a b") == [7] and found.decode([7]) == "a b"


def test_bytes_stand_for_what_has_no_token_and_the_unknown_token_for_bytes_without_one():
    bytewise = {f"<0x{byte:02X}>": 0.0 for byte in range(256)}
    off = {f"{K}add_space_prefix": False, f"{K}add_bos_token": False}
    found = tokenizer(scored({**bytewise, "a": 0.0}, off, dict.fromkeys(bytewise, 6)))
    ids = found.encode("aé")
    assert ids == [3 + 256, 3 + 0xC3, 3 + 0xA9] and found.decode(ids) == "aé"
    assert tokenizer(scored({"a": 0.0}, off)).encode("aé") == [3, 0, 0]


def test_special_tokens_are_found_first_and_control_ones_only_where_text_may_hold_them():
    extra = {f"{K}token_type": [1, 1, 1, 3, 4], f"{K}bos_token_id": 3, f"{K}add_bos_token": True}
    found = tokenizer(ranked("a b", more=("<c>", "bab"), extra=extra))
    a, b, ab, control, user = range(5)
    assert found.encode("ab<c>ab", add_special_tokens=False) == [ab, control, ab]
    assert found.encode("ab<c>ab", False, parse_special=False) == [ab, ab]  # the letters of <c> have no tokens here
    assert found.encode("abab") == [control, a, user]
    assert found.decode([control, a, user]) == "abab" and found.decode([control, b], skip_special_tokens=False) == "<c>b"


def test_longest_special_token_is_found_first_wherever_it_stands():
    extra = {f"{K}token_type": [1, 1, 1, 4, 4]}
    found = tokenizer(ranked("a b", more=("aab", "bbab"), extra=extra))
    assert found.encode("aabbab") == [0, 0, 4]  # not [aab, ...], which begins further left


def test_white_space_behind_special_tokens_belongs_to_them_in_models_made_so():
    extra = {f"{K}token_type": [1, 1, 1, 3, 3, 1], "general.name": "Phi-3 mini"}
    found = tokenizer(ranked("a b", more=("<|x|>", "<s>", "Ġ"), extra=extra))
    assert found.encode("<|x|> \n a<s> a", False) == [3, 0, 4, 5, 0]
    plain = tokenizer(ranked("a b", more=("<|x|>", "<s>", "Ġ"), extra={**extra, "general.name": "other"}))
    assert plain.encode("<|x|> a", False) == [3, 5, 0]


def test_marks_around_a_text_are_the_stated_ones_or_those_of_the_rules():
    more = {"more": ("<s>", "</s>")}
    ids = {f"{K}bos_token_id": 3, f"{K}eos_token_id": 4}
    assert tokenizer(ranked("a b", extra=ids, **more)).encode("ab") == [2]
    assert tokenizer(ranked("a b", extra={**ids, f"{K}pre": "llama-bpe"}, **more)).encode("ab") == [3, 2]
    both = {**ids, f"{K}add_bos_token": True, f"{K}add_eos_token": True}
    found = tokenizer(ranked("a b", extra=both, **more))
    assert found.encode("ab") == [3, 2, 4] and found.encode("") == [3, 4] and found.encode("ab", add_special_tokens=False) == [2]
    assert tokenizer(scored({"a": 0.0}, {f"{K}add_space_prefix": False})).encode("a") == [1, 3]


def test_a_wanted_mark_without_a_token_is_refused():
    problem = refusal(ranked("a b", extra={f"{K}add_bos_token": True}))
    assert isinstance(problem, ConfigError) and problem.where == f"{FILE}: {K}bos_token_id"


def test_every_end_token_ends_a_text_and_fillers_are_no_tokens():
    extra = {f"{K}eos_token_id": 3, f"{K}eot_token_id": 4, f"{K}eom_token_id": 5, f"{K}token_type": [1, 1, 1, 3, 3, 3, 1, 5]}
    found = tokenizer(ranked("a b", more=("<e>", "<t>", "<m>", "<|im_end|>", "[PAD7]"), extra=extra))
    assert found.eos_token_ids == {3, 4, 5, 6}  # the last is one by its text
    assert found.encode("<|im_end|>", False) == [6] and found.encode("<|im_end|>", False, parse_special=False) == []
    assert found.size == 7 and found.decode([7]) == ""


def test_end_of_a_channel_does_not_end_the_answer():
    more = ("<|end|>", "<|return|>", "<|call|>", "<|message|>")
    found = tokenizer(ranked("a b", more=more, extra={f"{K}token_type": [1, 1, 1, 3, 3, 3, 3]}))
    assert found.eos_token_ids == {4, 5} and found.decode([6, 2, 3]) == "<|message|>ab<|end|>"


def test_piece_that_is_a_token_wins_over_its_merges_where_the_rules_say_so():
    merges = ranked("a b", "b c", more=("abc",))
    assert tokenizer(merges).encode("abc") == [3, 2]
    assert tokenizer({**merges, f"{K}pre": "dbrx"}).encode("abc") == [3, 2]
    assert tokenizer({**merges, f"{K}pre": "glm4"}).encode("abc") == [5]


def test_template_of_the_file_and_the_named_one_that_is_the_default():
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    ids = {f"{K}bos_token_id": 3, f"{K}eos_token_id": 4, f"{K}token_type": [1, 1, 1, 3, 3]}
    found = tokenizer(ranked("a b", more=("<s>", "</s>"), extra={**ids, "tokenizer.chat_template": template}))
    chat = [{"role": "user", "content": "ab"}]
    assert found.render_chat(chat) == "<s>ab</s>" and found.encode_chat(chat) == [3, 2, 4]
    named = {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "tools", "tokenizer.chat_template": "plain"}
    found = tokenizer(ranked("a b", extra=named))
    assert found.render_chat(chat) == "plain" and found.chat_templates == ("tool_use", "default")
    only = {k: v for k, v in named.items() if k != "tokenizer.chat_template"}
    found = tokenizer(ranked("a b", extra=only))
    assert not found.has_chat_template
    with pytest.raises(RequestError, match="tool_use"):
        found.render_chat(chat)


def test_template_cannot_reach_out_of_its_sandbox():
    found = tokenizer(ranked("a b", extra={"tokenizer.chat_template": "{{ messages.__class__.__mro__ }}"}))
    with pytest.raises(RequestError, match="unsafe"):
        found.render_chat([{"role": "user", "content": "x"}])


def test_whole_tokenizer_in_the_file_is_preferred():
    whole = json.loads((GOLDEN / "llamacpp-qwen3moe-q8-0.json").read_text(encoding="utf-8"))
    inner = described(whole["properties"]).tokenizer
    found = tokenizer({**whole["properties"], f"{K}pre": "nobody's", "tokenizer.huggingface.json": json.dumps(inner)})
    row = whole["cases"][4]
    assert found.encode(*row[:3]) == row[3] and found.eos_token_ids == {470, 472}
    literal = next(row for row in whole["cases"] if "<|im_start|>" in row[0] and not row[2])
    assert found.encode(*literal[:3]) == literal[3]
    for text in ("{", "[]", "{}"):
        with pytest.raises(DamagedFileError) as caught:
            tokenizer({**whole["properties"], "tokenizer.huggingface.json": text})
        assert caught.value.where == f"{FILE}: tokenizer.huggingface.json"


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", "none", "gemma4", None, 3])
def test_other_kinds_of_tokenizers_are_refused_by_name_unless_one_lies_beside(model):
    properties = ranked("a b", extra={f"{K}model": model})
    problem = refusal(properties)
    assert isinstance(problem, ConfigError) and problem.where == f"{FILE}: {K}model" and (model is None or repr(model) in problem.found)
    assert described(properties, beside=True) is None


@pytest.mark.parametrize("pre", ["default", "qwen-2", None])
def test_unknown_rules_are_refused_by_name_unless_a_tokenizer_lies_beside(pre):
    properties = ranked("a b", extra={f"{K}pre": pre})
    problem = refusal(properties)
    assert isinstance(problem, ConfigError) and problem.where == f"{FILE}: {K}pre" and "qwen2" in problem.needed
    assert (repr(pre) if pre else "absent") in problem.found
    assert described(properties, beside=True) is None


def test_the_files_own_tokenizer_wins_over_one_beside_it():
    assert described(ranked("a b"), beside=True) is not None


@pytest.mark.parametrize(
    ("change", "key", "found"),
    [
        ({"tokens": None}, "tokens", "absent"),
        ({"tokens": []}, "tokens", "absent or empty"),
        ({"tokens": ["a", 3]}, "tokens", "'int'"),
        ({"tokens": ["a", "b", "ab", "a"]}, "tokens", "'a' is token 0 and token 3"),
        ({"tokens": ["a", "b", "ab", "x" * 70_000]}, "tokens", "70000 characters"),
        ({"token_type": [1, 1]}, "token_type", "2 entries"),
        ({"token_type": [1, 1, 9]}, "token_type", "9 for token 2"),
        ({"scores": [0.0]}, "scores", "1 entries"),
        ({"scores": [0.0, float("nan"), 0.0]}, "scores", "not a number"),
        ({"merges": None}, "merges", "absent"),
        ({"merges": [3]}, "merges", "no list of texts"),
        ({"merges": ["a b", "ab a"]}, "merges", "'aba', which is no token"),
        ({"merges": ["a x"]}, "merges", "'x', which is no token"),
        ({"merges": ["ab"]}, "merges", "no two sides"),
        ({"merges": [""]}, "merges", "no two sides"),
        ({"bos_token_id": 3}, "bos_token_id", "3"),
        ({"eot_token_id": 4294967295}, "eot_token_id", "4294967295"),
        ({"eos_token_id": "x"}, "eos_token_id", "'x'"),
        ({"add_bos_token": 1}, "add_bos_token", "1"),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) else None,
)
def test_vocabulary_that_contradicts_itself_is_refused_by_its_key(change, key, found):
    problem = refusal({**ranked("a b"), **{K + name: value for name, value in change.items()}})
    assert problem.where == f"{FILE}: {K}{key}" and found in problem.found


@pytest.mark.parametrize(
    "change",
    [{"tokenizer.chat_template": 3}, {"tokenizer.chat_templates": "x"}, {"tokenizer.chat_templates": ["x"]}],
    ids=str,
)
def test_templates_that_are_no_text_are_refused(change):
    assert refusal({**ranked("a b"), **change}).where.startswith(f"{FILE}: tokenizer.chat_template")


def test_tokens_that_are_no_text_keep_their_ids_and_no_text_becomes_them():
    strange = b"a\xff".decode("utf-8", "surrogateescape")
    found = tokenizer(ranked("a b", more=(strange, "", "\udcff"), extra={f"{K}token_type": [1, 1, 1, 1, 1, 4]}))
    assert found.size == 6 and found.encode("ab\ufffd") == [2] and found.decode([3]).startswith("a\ufffd")
    assert tokenizer(scored({"a": 0.0, strange: 0.0}, {f"{K}add_bos_token": False, f"{K}add_space_prefix": False})).encode("a") == [3]


def test_merges_that_occur_twice_count_where_they_stand_first():
    assert tokenizer(ranked("a b", "b c", extra={f"{K}merges": ["a b", "b c", "a b"]})).encode("abc") == [3, 2]
