import json
from itertools import pairwise

import pytest

from tests.engine.fakes import BOS, EOS, ids_of
from tests.server.conftest import TEXT

GREEDY = {"temperature": 0}


def events(response):
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_text_gives_text_and_counts(server):
    answer = server.post("/generate", text="hi", sampling_params=GREEDY, rid="mine").json()
    meta = answer["meta_info"]
    assert (answer["text"], answer["output_ids"]) == (TEXT, [*ids_of(TEXT), EOS])
    assert meta["finish_reason"] == {"type": "stop", "matched": EOS}
    assert (meta["id"], meta["prompt_tokens"], meta["completion_tokens"]) == ("mine", 3, len(ids_of(TEXT)) + 1)
    assert meta["e2e_latency"] > 0


def test_input_ids_are_taken_as_they_are(server):
    answer = server.post("/generate", input_ids=[BOS, *ids_of("hi")], sampling_params={**GREEDY, "max_new_tokens": 2}).json()
    assert answer["text"] == TEXT[:2]
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 2}


@pytest.mark.parametrize("prompts", [{"text": ["a", "bcd"]}, {"input_ids": [[BOS, 5], [BOS, 5, 6, 7]]}])
def test_list_of_prompts_gives_a_list(server, prompts):
    answers = server.post("/generate", **prompts, sampling_params=[GREEDY, {**GREEDY, "max_new_tokens": 1}]).json()
    assert [a["text"] for a in answers] == [TEXT, TEXT[0]]
    assert [a["meta_info"]["prompt_tokens"] for a in answers] == [2, 4]


def test_several_choices_give_a_list(server):
    answers = server.post("/generate", text="a", sampling_params={"n": 2, "sampling_seed": 1, "max_new_tokens": 3}).json()
    assert len(answers) == 2


def test_stream_is_cumulative_and_ends_with_the_whole_answer(server):
    seen = events(server.post("/generate", text="hi", sampling_params=GREEDY, stream=True))
    texts = [e["text"] for e in seen]
    assert all(b.startswith(a) for a, b in pairwise(texts)) and texts[-1] == TEXT
    assert seen[0]["meta_info"]["finish_reason"] is None
    assert seen[-1]["meta_info"]["finish_reason"]["type"] == "stop"
    assert seen[-1]["output_ids"] == [*ids_of(TEXT), EOS]


def test_stream_of_several_prompts_carries_the_index(server):
    seen = events(server.post("/generate", text=["a", "b"], sampling_params={**GREEDY, "max_new_tokens": 3}, stream=True))
    last = {e["index"]: e for e in seen}
    assert set(last) == {0, 1} and all(e["meta_info"]["completion_tokens"] == 3 for e in last.values())


def test_stop_string_is_reported(server):
    answer = server.post("/generate", text="a", sampling_params={**GREEDY, "stop": ["京 a"]}).json()
    assert (answer["text"], answer["meta_info"]["finish_reason"]["matched"]) == ("naïve 東", "京 a")


def test_logprobs_name_value_token_and_text(server):
    meta = server.post(
        "/generate", text="a", sampling_params=GREEDY, return_logprob=True, top_logprobs_num=2, return_text_in_logprobs=True
    ).json()["meta_info"]
    value, token, text = meta["output_token_logprobs"][0]
    assert value <= 0 and (token, text) == (ids_of("n")[0], "n")
    assert meta["output_top_logprobs"][0][0] == [value, token, text] and len(meta["output_top_logprobs"][0]) == 2
    assert meta["output_token_logprobs_length"] == meta["completion_tokens"]


def test_same_seed_under_both_names_gives_the_same_text(server):
    one, two = (
        server.post("/generate", text="a", sampling_params={"temperature": 5, "max_new_tokens": 6, name: 3}).json()["output_ids"]
        for name in ("seed", "sampling_seed")
    )
    assert one == two


def test_model_information_names_the_model(server):
    info = server.http.get("/get_model_info").json()
    assert (info["model_path"], info["has_chat_template"], info["max_context"]) == ("somewhere/fake", True, 512)


def test_health_plan_page_and_metrics_are_there(server):
    server.post("/generate", text="a", sampling_params=GREEDY)
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/plan").json()["explain"] == "linear: x"
    page = server.http.get("/")
    assert page.headers["content-type"].startswith("text/html") and "<script>" in page.text
    lines = server.http.get("/metrics").text.splitlines()
    samples = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert int(samples['bitgrain_generation_tokens_total{model_name="fake"}']) > 0
    assert int(samples['bitgrain_requests_finished_total{model_name="fake",reason="stop"}']) > 0
    assert float(samples['bitgrain_request_seconds_sum{model_name="fake"}']) > 0


def test_page_needs_nothing_from_elsewhere(server):
    page = server.http.get("/").text
    assert "http://" not in page and "https://" not in page and "innerHTML" not in page
