import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.engine import Tokenizer
from bitgrain.errors import ConflictingConfigError, DamagedFileError, RequestError
from tests.engine.fakes import BOS, CONFIG, EOS, VOCAB, byte_backend, byte_tokenizer, fallback_tokenizer, ids_of

BYTES, FALLBACK = byte_tokenizer(), fallback_tokenizer()


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    return [*(stream.push(i) for i in ids), stream.flush()]


@given(st.text(max_size=30))
@settings(max_examples=60, deadline=None)
def test_byte_tokens_of_any_text_stream_without_broken_characters(text):
    pieces = streamed(BYTES, BYTES.encode(text))
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK], ids=["byte-level", "byte-fallback"])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_tokens_streamed_equal_the_full_decoding(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.size - 1), max_size=24))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_complete_character_is_given_out_at_once():
    assert streamed(BYTES, ids_of("é!")) == ["", "é", "!", ""]


def test_encoding_adds_what_the_post_processor_says():
    assert BYTES.encode("hi") == [BOS, *ids_of("hi")]
    assert BYTES.encode("hi", add_special_tokens=False) == ids_of("hi")


@pytest.mark.parametrize(("stated", "ids"), [({"add_bos_token": False}, []), ({"add_bos_token": True, "add_eos_token": True}, [BOS, EOS])])
def test_stated_special_tokens_replace_the_post_processor(stated, ids):
    assert byte_tokenizer(**stated).encode("") == ids


def test_truncation_in_the_file_does_not_cut_prompts():
    backend = byte_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    assert len(Tokenizer(backend, CONFIG).encode("twelve bytes")) == 13


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(RequestError, match="not valid Unicode"):
        BYTES.encode("\ud800")


def test_token_text_keeps_the_space_that_a_first_word_loses():
    assert FALLBACK.decode([259 + 1]) == "a"
    assert FALLBACK.token_text(259 + 1) == " a"


def test_larger_tokenizer_is_refused_with_both_sizes():
    tokenizer = Tokenizer(byte_backend(extra=[f"<extra_{i}>" for i in range(50)]), CONFIG)
    with pytest.raises(ConflictingConfigError, match=rf"309 tokens\), the model has a vocabulary of {VOCAB}"):
        tokenizer.check_vocabulary(VOCAB)
    BYTES.check_vocabulary(VOCAB)


def test_end_tokens_come_from_every_file():
    tokenizer = Tokenizer(byte_backend(), CONFIG, {"eos_token_id": 7}, {"eos_token_id": [8, 9], "text_config": {"eos_token_id": 10}})
    assert tokenizer.eos_token_ids == {EOS, 7, 8, 9, 10}


def test_chat_is_rendered_with_the_generation_prompt():
    rendered = BYTES.render_chat([{"role": "user", "content": "hi"}])
    assert rendered == "[user] hi[assistant]"
    assert BYTES.encode_chat([{"role": "user", "content": "hi"}]) == ids_of(rendered)


def test_template_sees_special_tokens_and_helpers():
    source = "{{ bos_token }}{{ {'a': '<é>'} | tojson }}{{ strftime_now('%Y') | length }}{{ tools is none }}\n  {% if true %}\nx{% endif %}"
    assert byte_tokenizer(source).render_chat([]) == '<s>{"a": "<é>"}4True\nx'


def test_template_that_refuses_says_why():
    with pytest.raises(RequestError, match="system must come first"):
        BYTES.render_chat([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}])


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 // 0 }}", "{% for %}"])
def test_template_that_reaches_out_or_fails_is_a_refusal(source):
    with pytest.raises(RequestError, match="chat template"):
        byte_tokenizer(source).render_chat([{"role": "user", "content": "a"}])


def test_missing_template_says_so():
    with pytest.raises(RequestError, match="no chat template"):
        byte_tokenizer(template=None).encode_chat([])


def test_named_templates_give_the_default_one():
    config = {**CONFIG, "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}
    assert Tokenizer(byte_backend(), config).render_chat([]) == "d"


def test_folder_gives_tokenizer_and_template_file_first(tmp_path):
    byte_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**CONFIG, "chat_template": "old"}))
    (tmp_path / "chat_template.jinja").write_text("new")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.render_chat([]), tokenizer.eos_token_ids) == ("new", {EOS, 5})


def test_missing_tokenizer_is_an_error_with_four_parts(tmp_path):
    with pytest.raises(DamagedFileError) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "tokenizer.json" in caught.value.where and "copy tokenizer.json" in caught.value.action


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100000])
def test_damaged_file_is_named(tmp_path, name, content):
    byte_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(content)
    with pytest.raises(DamagedFileError, match=name):
        Tokenizer.from_folder(tmp_path)
