"""Bad checkpoints and bad requests at the command line: four parts on stderr, exit status 1, never a traceback."""

import json
import socket
from pathlib import Path

import pytest
import torch

from bitgrain.bundled import models
from bitgrain.cli.main import main
from tests.checkpoints import edited, llama_config, small_llama, write_checkpoint, write_tokenizer
from tests.unit.plan.test_resolve import DOWN, int8_config, int8_tensors

SCALE = f"{DOWN}.weight_scale"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_tokenizer(write_checkpoint(tmp_path_factory.mktemp("good") / "int8", int8_tensors(), int8_config()))


def test_undamaged_checkpoint_generates(good, capsys):
    assert main(["generate", str(good), "--prompt", "w3 w4", "--max-tokens", "3"]) == 0, capsys.readouterr().err


def set_scale(value):
    def change(tensors):
        tensors[SCALE].flatten()[:1] = value

    return change


def truncate(folder: Path):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def section(**changes):
    return lambda config: config["quantization_config"].update(changes)


# name: (edit tensors, edit config, edit folder, words that the message must have)
DAMAGES = {
    "unknown method": (None, section(quant_method="grain9000"), None, ["grain9000", "quant_method"]),
    "unknown key": (None, section(qunat_type="x"), None, ["qunat_type"]),
    "impossible width": (None, lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=77), None, ["num_bits", "77"]),
    "conflicting sidecar": (None, None, lambda f: (f / "quantize_config.json").write_text('{"quant_method": "gptq", "bits": 4}'), ["quantize_config.json", "quant_method"]),
    "missing tensor": (lambda t: t.pop(SCALE), None, None, [SCALE]),
    "extra tensor": (lambda t: t.update({f"{DOWN}.wish": torch.ones(2)}), None, None, [f"{DOWN}.wish"]),
    "renamed tensor": (lambda t: t.update({SCALE + "s": t.pop(SCALE)}), None, None, [SCALE, SCALE + "s"]),
    "NaN scale": (set_scale(float("nan")), None, None, [SCALE, "NaN"]),
    "infinite scale": (set_scale(float("inf")), None, None, [SCALE, "infinite"]),
    "negative scale": (set_scale(-1.0), None, None, [SCALE, "negative"]),
    "zero scales": (lambda t: t[SCALE].zero_(), None, None, [SCALE, "zero"]),
    "retyped tensor": (lambda t: t.update({SCALE: t[SCALE].to(torch.int32)}), None, None, [SCALE, "I32"]),
    "wrong shape": (lambda t: t.update({SCALE: t[SCALE][:-1]}), None, None, [SCALE, "[63, 1]"]),
    "wrong sizes in config": (None, lambda c: c.update(intermediate_size=128), None, ["down_proj", "gate_proj"]),
    "truncated file": (None, None, truncate, ["model.safetensors", "truncated"]),
    "config is not JSON": (None, None, lambda f: (f / "config.json").write_text("{"), ["config.json"]),
    "no config": (None, None, lambda f: (f / "config.json").unlink(), ["checkpoint"]),
    "impossible head count": (None, lambda c: c.update(num_attention_heads=0), None, ["num_attention_heads"]),
    "unknown activation function": (None, lambda c: c.update(hidden_act="swishy"), None, ["hidden_act", "swishy"]),
    "unknown rope scaling": (None, lambda c: c.update(rope_scaling={"rope_type": "spiral"}), None, ["spiral"]),
    "no tokenizer": (None, None, lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "broken tokenizer": (None, None, lambda f: (f / "tokenizer.json").write_text("[]"), ["tokenizer.json"]),
}


def run(capsys, *words: str) -> tuple[int, str]:
    status = main(list(words))
    captured = capsys.readouterr()
    return status, captured.err


def assert_four_parts(status: int, message: str, words: list[str]) -> None:
    assert status == 1, message
    assert "Error: " in message and "needed:" in message and "to do:" in message and "Traceback" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_refused_in_four_parts(good, tmp_path, capsys, damage):
    tensors, config, folder, words = DAMAGES[damage]
    copy = edited(good, tmp_path / "copy", tensors, config)
    if folder is not None:
        folder(copy)
    status, message = run(capsys, "generate", str(copy), "--prompt", "x")
    assert_four_parts(status, message, words)


def with_tokenizer(folder: Path, **config) -> Path:
    """A small Llama with the bundled model's tokenizer beside it."""
    small_llama(folder, **config)
    bundled = models()["arithmetic-bf16"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((bundled / name).read_bytes())
    return folder


def test_tokenizer_of_another_model_is_refused_with_both_sizes(tmp_path, capsys):
    status, message = run(capsys, "generate", str(with_tokenizer(tmp_path / "m")), "--prompt", "x")
    assert_four_parts(status, message, ["48"])


def test_too_long_a_prompt_is_refused(capsys):
    status, message = run(capsys, "generate", "arithmetic-bf16", "--prompt", "apples " * 4000)
    assert_four_parts(status, message, ["PromptTooLongError", "tokens"])


@pytest.mark.parametrize(("words", "expected"), [
    (["--port", "99999"], "99999"),
    (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
    (["--tp-size", "2"], "--tp-size"),
    (["--trust-remote-code"], "--trust-remote-code"),
    (["--kv-cache-dtype", "int3"], "int3"),
    (["--kernel", "linear=warp9"], "warp9"),
    (["--forbid", "warp9"], "warp9"),
    (["--device", "abacus"], "abacus"),
    (["--dtype", "float8"], "float8"),
    (["--quantization", "grain9000"], "grain9000"),
    (["--quantization", "awq"], "awq"),
    (["--context-length", "1000000"], "1000000"),
])  # fmt: skip
def test_impossible_serving_option_is_refused(capsys, words, expected):
    status, message = run(capsys, "serve", "arithmetic-bf16", *(["--port", "0"] if "--port" not in words else []), *words)
    assert_four_parts(status, message, [expected])


def test_port_in_use_is_refused(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, message = run(capsys, "serve", "arithmetic-bf16", "--port", str(taken.getsockname()[1]))
    assert_four_parts(status, message, ["port"])


def test_absent_model_is_refused(capsys):
    status, message = run(capsys, "inspect", "./no/such/model")
    assert_four_parts(status, message, ["no such file or folder"])


def test_absurd_header_is_refused_quickly_and_in_little_memory(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(llama_config()))
    (tmp_path / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    status, message = run(capsys, "inspect", str(tmp_path))
    assert_four_parts(status, message, ["model.safetensors"])
