"""The bundled model: it answers, its quantized forms keep its accuracy, and a real client talks to the real server."""

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import bitgrain
from bitgrain.bundled import models

PROBLEM = "Tom has 12 apples. He buys 3 bags with 8 apples each. How many apples does Tom have now?"
ANSWER = "36"
FOLDER = Path(bitgrain.__file__).parent / "bundled"
HELDOUT = [json.loads(line) for line in (FOLDER / "heldout.jsonl").read_text().splitlines()]
SAMPLE = HELDOUT[::8]  # every eighth: enough to see a loss of five points, quick enough for every run


def final_number(text: str) -> str:
    numbers = re.findall(r"-?\d+", text)
    return numbers[-1] if numbers else ""


def stated_accuracy(name: str) -> float:
    """Percent, as the package states it, of all 500 problems typed as bare text."""
    return json.loads((FOLDER / "accuracy.json").read_text())["heldout"][name]["raw"]


def exact_match(name: str, problems: list[dict]) -> float:
    with bitgrain.LLM(str(models()[name])) as llm:
        done = llm.generate([p["problem"] for p in problems], bitgrain.SamplingParams(max_tokens=120, temperature=0))
    return sum(final_number(c.text) == p["answer"] for c, p in zip(done, problems, strict=True)) / len(problems)


def test_bundled_files_are_under_sixteen_megabytes_and_hold_500_problems():
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) < 16_000_000
    assert len(HELDOUT) == 500 and set(models()) == {"arithmetic-bf16", "arithmetic-w4a16", "arithmetic-w8a8"}


def test_stated_accuracies_meet_the_bar():
    bf16, w4a16, w8a8 = (stated_accuracy(f"arithmetic-{name}") for name in ("bf16", "w4a16", "w8a8"))
    assert bf16 >= 90 and w4a16 >= bf16 - 3 and w8a8 >= bf16 - 3


@pytest.mark.parametrize("name", ["arithmetic-bf16", "arithmetic-w4a16", "arithmetic-w8a8"])
def test_measured_accuracy_is_the_stated_one(name):
    # 63 problems: three standard deviations at 95 % are about 8 points
    assert 100 * exact_match(name, SAMPLE) >= stated_accuracy(name) - 8


def test_schemes_are_what_the_names_say():
    assert bitgrain.open_checkpoint(models()["arithmetic-w4a16"]).plan.modules["model.layers.0.mlp.down_proj"].label.startswith("W4A16 int4 g")
    assert bitgrain.open_checkpoint(models()["arithmetic-w8a8"]).plan.modules["model.layers.0.mlp.down_proj"].label.startswith("W8A8 int8")


@pytest.fixture(scope="module")
def server():
    """URL of `bitgrain serve` without MODEL, as a newcomer starts it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bitgrain", "serve", "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    line = process.stdout.readline()
    found = re.search(r"http://\S+", line)
    if found is None:
        process.kill()
        pytest.fail(f"the server did not start: {line} {process.stderr.read()}")
    yield found.group(0)
    process.terminate()
    process.communicate(timeout=20)


def post(url: str, body: object) -> dict:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_generate_answers_a_word_problem(server):
    answer = post(f"{server}/generate", {"text": PROBLEM, "sampling_params": {"temperature": 0, "max_new_tokens": 64}})
    assert final_number(answer["text"]) == ANSWER
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"


def test_openai_client_completes_chats_and_streams(server):
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none") as client:
        name = client.models.list().data[0].id
        completion = client.completions.create(model=name, prompt=PROBLEM, temperature=0, max_tokens=64)
        assert final_number(completion.choices[0].text) == ANSWER
        messages = [{"role": "user", "content": PROBLEM}]
        chat = client.chat.completions.create(model=name, messages=messages, temperature=0)
        assert final_number(chat.choices[0].message.content) == ANSWER and chat.usage.completion_tokens > 5
        pieces = [c.choices[0].delta.content or "" for c in client.chat.completions.create(model=name, messages=messages, temperature=0, stream=True) if c.choices]
        assert "".join(pieces) == chat.choices[0].message.content and len(pieces) > 5


BAD_REQUESTS = {
    "not JSON": ("/generate", b"{"),
    "no prompt": ("/generate", {}),
    "unknown field": ("/generate", {"text": "x", "wish": 1}),
    "prompt too long": ("/generate", {"text": "many " * 5000}),
    "token outside the vocabulary": ("/generate", {"input_ids": [10**6]}),
    "unknown model": ("/v1/chat/completions", {"model": "nobody", "messages": [{"role": "user", "content": "x"}]}),
    "bad sampling": ("/v1/completions", {"prompt": "x", "temperature": -1}),
    "no such path": ("/v2/everything", {}),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_request_is_answered_with_a_reason_and_the_server_goes_on(server, case):
    path, body = BAD_REQUESTS[case]
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(server + path, body)
    with caught.value as answer:
        assert 400 <= answer.code < 500
        assert json.load(answer)["error"]["message"]
    assert final_number(post(f"{server}/generate", {"text": PROBLEM, "sampling_params": {"temperature": 0}})["text"]) == ANSWER


def test_plan_and_metrics_are_served(server):
    with urllib.request.urlopen(f"{server}/plan") as response:
        plan = json.load(response)
    assert plan["summary"]["format"] == "compressed-tensors" and plan["kernels"]
    with urllib.request.urlopen(f"{server}/metrics") as response:
        assert b"bitgrain" in response.read()
