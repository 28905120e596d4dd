import json
import threading
import time

import httpx
import pytest

from tests.engine.fakes import VOCAB, FakeModel, byte_tokenizer, ids_of
from tests.server.conftest import TEXT

HI = [{"role": "user", "content": "hi"}]


def still_serves(server):
    return server.post("/generate", text="a", sampling_params={"temperature": 0}).json()["text"] == TEXT


def check(response, status, param):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["param"]) == (status, param), error["message"]
    assert "needed:" in error["message"] and "to do:" in error["message"]


GENERATE = [
    ({}, "text"),
    ({"text": "a", "input_ids": [5]}, "input_ids"),
    ({"text": 5}, "text"),
    ({"text": []}, "text"),
    ({"text": ["a", 5]}, "text"),
    ({"text": [5]}, "text"),
    ({"input_ids": "a"}, "input_ids"),
    ({"input_ids": []}, "input_ids"),
    ({"input_ids": [[]]}, "input_ids"),
    ({"input_ids": [True]}, "input_ids"),
    ({"input_ids": [VOCAB]}, "prompt"),
    ({"input_ids": [-1]}, "prompt"),
    ({"text": "a" * 600}, "prompt"),
    ({"text": "a", "sampling_params": {"max_new_tokens": 600}}, "prompt"),
    ({"text": "a", "sampling_params": []}, "sampling_params"),
    ({"text": "a", "sampling_params": {"max_tokens": 5}}, "sampling_params.max_tokens"),
    ({"text": "a", "sampling_params": {"max_new_tokens": 0}}, "sampling_params.max_new_tokens"),
    ({"text": "a", "sampling_params": {"temperature": "hot"}}, "sampling_params.temperature"),
    ({"text": "a", "sampling_params": {"seed": 1, "sampling_seed": 2}}, "sampling_params.sampling_seed"),
    ({"text": "a", "sampling_params": {"json_schema": "{}"}}, "sampling_params.json_schema"),
    ({"text": ["a", "b"], "sampling_params": [{}, {"top_p": 7}]}, "sampling_params[1].top_p"),
    ({"text": "a", "stream": "yes"}, "stream"),
    ({"text": "a", "rid": ["x", "y"]}, "rid"),
    ({"text": "a", "top_logprobs_num": 2}, "top_logprobs_num"),
    ({"text": "a", "logprob_start_len": 0}, "logprob_start_len"),
    ({"text": "a", "image_data": "x"}, "image_data"),
    ({"text": "a", "lora_path": "x"}, "lora_path"),
    ({"text": "a", "nonsense": None}, "nonsense"),
]
COMPLETIONS = [
    ({}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [["a"]]}, "prompt"),
    ({"prompt": "a", "echo": True}, "echo"),
    ({"prompt": "a", "echo": 0}, "echo"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "best_of": 3}, "best_of"),
    ({"prompt": "a", "logprobs": True}, "logprobs"),
    ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias"),
    ({"prompt": "a", "n": 0}, "n"),
    ({"prompt": "a", "n": 1.0}, "n"),
    ({"prompt": "a", "stop": [""]}, "stop"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens"),
    ({"prompt": "a", "seed": 2**70}, "seed"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ({"prompt": "a", "model": 5}, "model"),
    ({"prompt": "\ud800"}, "prompt"),
]
CHAT = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]}, "messages[0].content[0].x"),
    ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"messages": [*HI, {"role": "system", "content": "late"}]}, "messages"),
    ({"messages": HI, "tools": [{}]}, "tools"),
    ({"messages": HI, "tool_choice": "required"}, "tool_choice"),
    ({"messages": HI, "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": HI, "top_logprobs": 2}, "top_logprobs"),
    ({"messages": HI, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    ({"messages": HI, "presence_penalty": 5}, "presence_penalty"),
    ({"messages": HI, "store": True}, "store"),
    ({"messages": HI, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"messages": HI, "prompt": "a"}, "prompt"),
]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (path, body, param)
        for path, table in (("/generate", GENERATE), ("/v1/completions", COMPLETIONS), ("/v1/chat/completions", CHAT))
        for body, param in table
    ],
    ids=lambda v: str(v)[:60].encode("ascii", "replace").decode(),
)
def test_wrong_field_is_refused_by_name(server, path, body, param):
    check(server.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"}), 400, param)
    assert still_serves(server)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe{", b'{"text": NaN}', b'{"text": "a", "text": "b"}', b'{"a":' + b"[" * 100_000],
    ids=range(8),
)
def test_body_that_is_no_json_object_is_refused(server, path, body):
    response = server.http.post(path, content=body)
    check(response, 400, "text" if b'"b"' in body else None)
    assert still_serves(server)


def test_several_wrong_values_are_all_named(server):
    message = server.post("/v1/completions", prompt="a", temperature=-1, top_p=2).json()["error"]["message"]
    assert "temperature" in message and "top_p" in message


def test_unknown_path_and_method_are_answered_in_the_same_shape(server):
    check(server.http.get("/v1/nothing"), 404, None)
    check(server.http.get("/generate"), 405, None)


def test_body_without_end_is_refused(server, monkeypatch):
    monkeypatch.setattr("bitgrain.server.served.MAX_BODY_BYTES", 100)
    check(server.post("/generate", text="a" * 200), 413, None)


def test_wrong_model_is_not_found(server):
    check(server.post("/v1/completions", model="gpt-9", prompt="a"), 404, "model")


def test_chat_without_template_is_refused(start_server):
    bare = start_server(FakeModel(script=ids_of(TEXT)), byte_tokenizer(template=None))
    response = bare.post("/v1/chat/completions", messages=HI)
    assert response.status_code == 400 and "no chat template" in response.json()["error"]["message"]
    assert bare.post("/v1/completions", prompt="a", temperature=0, max_tokens=99).json()["choices"][0]["text"] == TEXT


def test_failed_step_is_a_server_error_and_serving_goes_on(start_server):
    broken = start_server(FakeModel(script=ids_of(TEXT), fail_on=ids_of("!")[0]))
    response = broken.post("/generate", text="oh!")
    assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
    streamed = broken.post("/v1/completions", prompt="oh!", stream=True).text.split("\n\n")
    assert "cursed" in json.loads(streamed[0].removeprefix("data: "))["error"]["message"] and streamed[1] == "data: [DONE]"
    assert still_serves(broken)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_client_that_leaves_cancels_its_request(start_server, path, stream):
    endless = start_server(FakeModel(max_context=10**7, gate=threading.Event()))
    endless.model.gate.set()
    body = {"/generate": {"text": "a", "sampling_params": {"ignore_eos": True, "max_new_tokens": 10**6}}}.get(
        path, {"prompt": "a", "messages": HI, "ignore_eos": True, "max_tokens": 10**6}
    )
    body = {k: v for k, v in body.items() if k != ("messages" if path == "/v1/completions" else "prompt")}
    with httpx.Client(base_url=endless.url, timeout=0.3 if not stream else 20, trust_env=False) as client:
        if stream:
            with client.stream("POST", path, json={**body, "stream": True}) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(path, json=body)
    deadline = time.monotonic() + 10
    while endless.engine.statistics.finished["cancelled"] < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert endless.engine.statistics.finished == {"cancelled": 1}


def test_request_in_flight_when_the_engine_stops_gets_an_error(start_server):
    stuck = start_server(FakeModel(gate=threading.Event(), max_context=10**6))
    got = {}
    thread = threading.Thread(
        target=lambda: got.update(r=stuck.post("/generate", text="a", sampling_params={"ignore_eos": True, "max_new_tokens": 10**5}))
    )
    thread.start()
    while not stuck.engine.statistics.running:
        time.sleep(0.01)
    closer = threading.Thread(target=stuck.engine.close)
    closer.start()
    stuck.model.gate.set()
    closer.join(10)
    thread.join(10)
    assert got["r"].status_code == 500 and "stops" in got["r"].json()["error"]["message"]
    assert stuck.http.get("/health").status_code == 503
