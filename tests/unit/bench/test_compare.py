"""benchmarks/compare.py without peers: how systems are asked, ended and reported, with small programs in their place."""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
ANSWERING = """
import json, sys
print(json.dumps({"ready": 0.0, "version": "peer 1"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    answer = {"seconds": asked["sequences"] * asked["prompt"] / 100 + asked["new"]}
    print(json.dumps({**answer, "tokens": [[7]] * asked["sequences"]} if "seed" in asked else answer), flush=True)
"""
READY = 'import json, sys, time\nprint(json.dumps({"ready": 0.0, "version": "peer 1"}), flush=True)\n'


@pytest.fixture
def running(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("compare_running")


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("compare")


@pytest.fixture
def peer(running, tmp_path, monkeypatch):
    """Start a program in the place of compare_peer.py."""
    started = []

    def start(text, load=60.0, answer=60.0, python=Path(sys.executable), needed=0):
        (tmp_path / "compare_peer.py").write_text(text)
        monkeypatch.setattr(running, "HERE", tmp_path)
        started.append(running.Process(python, ["any", "model"], 1, needed, tmp_path / "log", (load, answer)))
        return started[-1]

    yield start
    for process in started:
        process.close()


def test_the_time_of_prompts_is_subtracted(peer):
    process = peer(ANSWERING)
    assert process.version == "peer 1"
    assert process.rate("decode", 8, 9) == pytest.approx(8.0)  # 8 tokens each of 8 sequences in 8 seconds
    assert process.rate("prefill", 400, 9) == pytest.approx(400 / 5)
    assert process.first_tokens() == [7] * 16


def test_a_whole_that_takes_no_longer_than_its_beginning_is_no_figure(peer, running):
    with pytest.raises(running.Disturbed):
        peer(READY + 'for line in sys.stdin: print(json.dumps({"seconds": 1.0}), flush=True)').rate("decode", 1, 9)


def test_a_peer_that_stops_says_why(peer, running):
    text = READY + 'sys.stdin.readline()\nprint("ValueError: no such kernel\\nbye", file=sys.stderr)\nsys.exit(3)'
    process = peer(text)
    with pytest.raises(running.Failed, match="status 3 while generating 1 tokens of each of 1 sequences behind 8: ValueError: no such kernel"):
        process.rate("prefill", 8, 1)
    with pytest.raises(running.Failed):
        process.rate("prefill", 8, 1)


def test_a_peer_that_does_not_load_says_why(peer, running):
    with pytest.raises(running.Failed, match="status 1 while loading: ModuleNotFoundError: No module named 'absent_peer'"):
        peer("import absent_peer")


def test_a_peer_that_the_kernel_ends_says_so(peer, running):
    with pytest.raises(running.Failed, match=r"ended by SIGKILL \(out of memory\?\) while loading"):
        peer("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")


def test_a_peer_that_takes_too_long_is_ended(peer, running):
    process = peer(READY + "time.sleep(1000)", answer=0.3)
    with pytest.raises(running.Failed, match="took longer than 0 s"):
        process.rate("prefill", 8, 1)
    assert process.process.poll() is not None


def test_children_of_a_peer_are_ended_with_it(peer, tmp_path):
    child = f"import time; open({str(tmp_path / 'ran')!r}, 'w').close(); time.sleep(2); open({str(tmp_path / 'late')!r}, 'w')"
    process = peer(f"import subprocess\nsubprocess.Popen([{sys.executable!r}, '-c', {child!r}])\n" + READY + "time.sleep(1000)")
    deadline = time.monotonic() + 60
    while not (tmp_path / "ran").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.close()
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()


def test_an_environment_that_is_not_there_is_a_reason(peer, running, tmp_path):
    with pytest.raises(running.Failed, match="could not be started"):
        peer(ANSWERING, python=tmp_path / "absent")


def test_a_peer_that_does_not_fit_is_not_started(running):
    with pytest.raises(running.Failed, match=r"needs about 3\.0 GB of memory, 2\.0 GB are free"):
        running.check_memory(3_000_000_000, "MemTotal: 9000000 kB\nMemAvailable: 2000000 kB\n")
    running.check_memory(1_000_000_000, "MemAvailable: 2000000 kB\n")
    running.check_memory(3_000_000_000, "")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("a\nRuntimeError: first\nAttributeError: '_C' has no attribute 'gemm'\n\nExiting.\n", "AttributeError: '_C' has no attribute 'gemm'"),
        ("loading\nerror: unable to load model\n", "error: unable to load model"),
        ("no words for it\n", "no words for it"),
        ("\n", "nothing said"),
    ],
)
def test_the_line_that_names_an_error_is_the_reason(running, said, expected):
    assert running.reason(said) == expected


def test_batched_rate_is_found_by_its_name(running):
    table = "main: n_kv_max = 4096\n\n|    PP |     TG |    B |  S_PP t/s |  S_TG t/s |   T s |\n|----|----|----|----|----|----|\n|    32 |  5 |  8 |  300.48 |  13.46 |  3.824 |\n\nllama_perf: x\n"
    assert running.batched_rate(table) == 13.46
    with pytest.raises(running.Failed, match="printed no row"):
        running.batched_rate("|    PP | S_TG t/s |\n|----|----|\n")


def test_a_table_without_a_row_is_asked_for_again(running, tmp_path):
    for name in ("llama-bench", "llama-batched-bench", "model"):
        (tmp_path / name).write_text("")
    system = running.LlamaCpp(tmp_path, tmp_path / "model", 1, True, 1.0)
    tables = ["| S_TG t/s |\n", "| B | S_TG t/s |\n| 8 | 5.5 |\n"]
    system._run = lambda *words: tables.pop(0)
    assert system.rate("decode", 8, 3) == 5.5
    system._run = lambda *words: "| S_TG t/s |\n"
    with pytest.raises(running.Failed, match="printed no row"):
        system.rate("decode", 8, 3)


class Still:
    """A system whose rates are given; a rate that is an exception is raised."""

    def __init__(self, rates, version="1"):
        self.rates, self.version, self.closed = list(rates), version, False

    def rate(self, what, count, new):
        found = self.rates.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def first_tokens(self):
        return [1, 2]

    def close(self):
        self.closed = True


class Quiet:
    def read(self):
        return 1e9


def test_one_that_fails_is_out_and_the_others_go_on(compare):
    good, bad = Still([0, 10.0, 20.0]), Still([0, compare.Failed("no kernel"), 5.0])

    def absent():
        raise compare.Failed("not there")

    chosen = {name: compare.Candidate(4, "w4", 100, "", start) for name, start in (("good", lambda: good), ("bad", lambda: bad), ("none", absent))}
    found = compare.Found()
    compare.take_turns(chosen, argparse.Namespace(sequences=[1], tokens=[512], new=3, rounds=1), Quiet(), found)
    assert found.absent == {"bad": "no kernel", "none": "not there"}
    assert found.taken == {("good", "decode", 1): [(10.0, 1e9)], ("good", "prefill", 512): [(20.0, 1e9)]}
    assert found.versions == {"good": "1", "bad": "1"}
    assert good.closed and bad.closed


def test_a_disturbed_turn_is_left_out(compare):
    system = Still([0, compare.Disturbed(), 10.0])
    found = compare.Found()
    compare.take_turns({"a": compare.Candidate(4, "w4", 1, "", lambda: system)}, argparse.Namespace(sequences=[1], tokens=[], new=3, rounds=2), Quiet(), found)
    assert found.taken == {("a", "decode", 1): [(10.0, 1e9)]}
    assert found.absent == {}


def test_ratios_are_against_the_best_peer_of_the_same_width(compare):
    def candidate(bits, nbytes):
        return compare.Candidate(bits, "w", nbytes, "", lambda: None)

    chosen = {"bitgrain": candidate(4, 100), "slow": candidate(4, 50), "fast": candidate(4, 200), "wide": candidate(8, 400)}
    taken = {(name, "decode", 1): [(rate, 1000.0)] for name, rate in (("bitgrain", 8.0), ("slow", 2.0), ("fast", 4.0), ("wide", 16.0))}
    found = {row["system"]: row for row in compare.rows(chosen, taken)}
    assert (found["bitgrain"]["best_peer"], found["bitgrain"]["of_best"], found["bitgrain"]["by_bytes"]) == ("fast", 2.0, 1.0)
    assert found["bitgrain"]["of_read"] == 0.8
    assert "best_peer" not in found["wide"]


def test_first_tokens_are_compared_within_a_form(compare):
    def candidate(form):
        return compare.Candidate(4, form, 1, "", lambda: None)

    tokens = {"bitgrain w4 exact": [1, 2, 3, 4], "bitgrain w4 fast": [1, 2, 3, 5], "peer": [1, 2, 0, 0], "other form": [1, 2, 3, 4], "silent": None}
    chosen = {name: candidate("Q4_0.gguf" if name == "other form" else "w4") for name in tokens}
    assert compare.agreement(chosen, tokens) == {"bitgrain w4 fast": "3 of 4", "peer": "2 of 4"}


def test_whatever_is_not_there_is_named(compare, tmp_path):
    (tmp_path / "bf16").mkdir()
    (tmp_path / "bf16" / "config.json").write_text(json.dumps({"vocab_size": 10, "hidden_size": 4}))
    args = argparse.Namespace(folder=tmp_path, only=None, torch=None, vllm=None, openvino=Path("/python"), llama_bin=None, compile=False, logs=tmp_path, threads=1, limit=1, load_limit=1)
    candidates = compare.Candidates(args)
    candidates.nbytes = lambda form: 1000
    candidates.all()
    assert set(candidates.found) == set()
    assert candidates.absent["vllm+zentorch w8a8"] == "no --vllm"
    assert candidates.absent["openvino w4 h8"] == f"{tmp_path / 'ov-w4-h8'} is not there; compare_models.py writes it"
    assert candidates.absent["torch bf16"] == "no --torch"
    assert candidates.absent["llama.cpp Q4_0 plain"] == "no --llama-bin"
    assert candidates.absent["bitgrain w4 exact"] == f"{tmp_path / 'w4'} is not there; compare_models.py writes it"
    for name in ("w4", "ov-w4-h8"):
        (tmp_path / name).mkdir()
    args.only = ["openvino w4", "bitgrain w4"]
    narrow = compare.Candidates(args)
    narrow.nbytes = lambda form: 1000
    narrow.all()
    assert set(narrow.found) == {"bitgrain w4 exact", "bitgrain w4 fast", "openvino w4 h8"}
    assert (narrow.found["openvino w4 h8"].nbytes, narrow.found["openvino w4 h8"].differs) == (960, "the head is bytes")


def test_torch_holds_the_weights_of_the_checkpoint(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    # compare_models.py sets the first entry of the path, as a program
    monkeypatch.setattr(sys, "path", list(sys.path))
    peer = importlib.import_module("compare_peer")
    models = importlib.import_module("compare_models")
    w = (torch.randn(32, 256, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    x = torch.eye(256).bfloat16()
    for form in ("w4", "w8a8"):
        model = torch.nn.ModuleDict({"block": torch.nn.ModuleDict({"proj": torch.nn.Linear(256, 32, bias=False)}), "head": torch.nn.Linear(4, 4)})
        models.save_file(models.quantized(form, "block.proj", w), tmp_path / "model.safetensors")
        peer.hold_codes(model, tmp_path)
        held = load_file(tmp_path / "model.safetensors")
        if form == "w4":
            codes = (held["block.proj.weight_packed"].unsqueeze(-1) >> (4 * torch.arange(8, dtype=torch.int32))) & 15
            expected = (codes.view(32, 2, 128) - 8) * held["block.proj.weight_scale"].float().unsqueeze(-1)
        else:
            expected = held["block.proj.weight"] * held["block.proj.weight_scale"].float()
        assert torch.equal(model["block"]["proj"](x[None])[0].t(), expected.view(32, 256).bfloat16())
        assert isinstance(model["head"], torch.nn.Linear)
