import pytest

openai = pytest.importorskip("openai", reason="the official client is not installed")

from tests.engine.fakes import ids_of  # noqa: E402
from tests.server.conftest import TEXT  # noqa: E402

HELLO = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
TOKENS = len(ids_of(TEXT)) + 1


@pytest.fixture(scope="module")
def client(server):
    import httpx

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)) as client:
        yield client


def test_models_are_listed_and_found(client):
    assert [m.id for m in client.models.list()] == ["fake", "other-name"]
    assert client.models.retrieve("other-name").id == "other-name"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


@pytest.mark.parametrize("model", ["fake", "other-name", "default", "somewhere/fake"])
def test_completion_under_every_name(client, model):
    done = client.completions.create(model=model, prompt="hi", temperature=0, max_tokens=100)
    assert (done.choices[0].text, done.choices[0].finish_reason, done.model) == (TEXT, "stop", "fake")
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, TOKENS)


def test_completion_defaults_to_sixteen_tokens(client):
    assert client.completions.create(model="fake", prompt="hi", temperature=0).usage.completion_tokens == 16


@pytest.mark.parametrize("prompt", [["a", "b"], [[5, 6], [7, 8]]])
def test_several_prompts_and_choices_are_numbered(client, prompt):
    done = client.completions.create(model="fake", prompt=prompt, n=2, max_tokens=2, temperature=0)
    assert [c.index for c in done.choices] == [0, 1, 2, 3]
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (4, 8)


def test_completion_of_tokens(client):
    assert client.completions.create(model="fake", prompt=[5, 6, 7], max_tokens=1, temperature=0).usage.prompt_tokens == 3


def test_completion_stream_joins_to_the_text(client):
    chunks = list(
        client.completions.create(
            model="fake", prompt="hi", temperature=0, max_tokens=100, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == TEXT
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == TOKENS
    assert all(c.usage is None for c in chunks[:-1])


def test_completion_logprobs(client):
    got = client.completions.create(model="fake", prompt="hi", temperature=0, max_tokens=2, logprobs=2).choices[0].logprobs
    assert got.tokens == ["n", "a"] and got.text_offset == [0, 1]
    assert all(-1e-3 < value <= 0 for value in got.token_logprobs)
    assert all(len(top) == 2 for top in got.top_logprobs)


def test_streamed_logprobs_equal_the_others(client):
    options = dict(model="fake", prompt="hi", temperature=0, max_tokens=5, logprobs=1)
    whole = client.completions.create(**options).choices[0].logprobs
    parts = [c.choices[0].logprobs for c in client.completions.create(**options, stream=True)]
    assert [t for p in parts for t in p.tokens] == whole.tokens
    assert [o for p in parts for o in p.text_offset] == whole.text_offset


def test_chat_answers(client):
    done = client.chat.completions.create(model="fake", messages=HELLO, temperature=0)
    message = done.choices[0].message
    assert (message.role, message.content, done.choices[0].finish_reason) == ("assistant", TEXT, "stop")
    assert done.usage.prompt_tokens == len("[system] be brief[user] hi[assistant]")


def test_chat_takes_parts_of_text_and_earlier_answers(client):
    first = client.chat.completions.create(model="fake", messages=HELLO, temperature=0)
    parts = [{"type": "text", "text": "go"}, {"type": "text", "text": "on"}]
    done = client.chat.completions.create(
        model="fake",
        messages=[*HELLO, first.choices[0].message.model_dump(), {"role": "user", "content": parts}],
        temperature=0,
        max_completion_tokens=3,
    )
    assert done.usage.completion_tokens == 3
    assert done.usage.prompt_tokens == len(f"[system] be brief[user] hi[assistant] {TEXT}[user] go\non[assistant]".encode())


def test_chat_stream_joins_to_the_answer(client):
    chunks = list(
        client.chat.completions.create(
            model="fake", messages=HELLO, temperature=0, stream=True, n=2, stream_options={"include_usage": True}
        )
    )
    texts = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: TEXT, 1: TEXT}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 2 * TOKENS


def test_chat_stop_and_seed(client):
    def say(**options):
        return client.chat.completions.create(model="fake", messages=HELLO, **options).choices[0]

    assert say(temperature=0, stop="東").message.content == "naïve "
    wild = dict(temperature=50, top_p=0.9, max_tokens=8, seed=4)
    assert say(**wild).message.content == say(**wild).message.content


def test_chat_logprobs_hold_bytes(client):
    content = (
        client.chat.completions.create(model="fake", messages=HELLO, temperature=0, logprobs=True, top_logprobs=1)
        .choices[0]
        .logprobs.content
    )
    assert (content[0].token, content[0].bytes) == ("n", [110])
    assert content[2].bytes is None  # half of a character
    assert content[0].top_logprobs[0].token == "n"


def test_neutral_fields_of_the_interface_are_accepted(client):
    answer = client.chat.completions.create(
        model="fake", messages=HELLO, max_tokens=1, n=1, presence_penalty=0, frequency_penalty=0, user="me", logit_bias={}, tools=[],
        tool_choice="auto", response_format={"type": "text"}, store=False, metadata={"a": "b"}, parallel_tool_calls=True, service_tier="auto",
        extra_body={"logit_bias": None, "tools": None, "top_k": -1, "min_p": 0, "repetition_penalty": 1.0},
    )  # fmt: skip
    assert answer.usage.completion_tokens == 1


def test_wrong_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert caught.value.code == "model_not_found" and "'fake'" in caught.value.message


def test_prompt_that_does_not_fit_is_a_bad_request(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=HELLO, max_tokens=600)
    assert caught.value.code == "context_length_exceeded" and "512" in caught.value.message


def test_unknown_field_is_a_bad_request_that_names_it(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake", prompt="a", extra_body={"temprature": 1})
    assert caught.value.param == "temprature" and "did you mean 'temperature'" in caught.value.message
