import io
import json
import subprocess
import sys

import pytest

from bitgrain.cli import main as cli
from bitgrain.cli.main import COMMANDS, main
from bitgrain.cli.progress import progress_bar
from bitgrain.errors import RequestError
from tests.unit.cli.conftest import TEXT, write_checkpoint


def test_no_command_prints_help_and_fails(capsys):
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in COMMANDS)


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"], ["generate", "--help"], ["serve", "-h"], ["chat", "--help"]])
def test_help_succeeds(words, capsys):
    assert main(words) == 0
    assert "usage: bitgrain" in capsys.readouterr().out


def test_version_is_printed(capsys):
    import bitgrain

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bitgrain {bitgrain.__version__}\n"


def test_unknown_command_names_the_nearest(capsys):
    assert main(["sevre"]) == 2
    assert "did you mean 'serve'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["generate"], ["generate", "--prompt"], ["generate", "--nonsense"], ["generate", "--prompt", "a", "--max-tokens", "x"], ["generate", "--prompt", "a", "--temp", "1"],
     ["serve", "--port", "x"], ["serve", "--fidelity", "slow"], ["chat", "a", "b"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_command_line_is_status_2(words, capsys):
    assert main(words) == 2
    assert "usage: bitgrain" in capsys.readouterr().err


def test_refusal_is_four_parts_on_stderr_and_status_1(capsys, monkeypatch):
    def refuse(name, words):
        raise RequestError("somewhere", "this", "that", "do so")

    monkeypatch.setattr(cli, "_run", refuse)
    assert main(["chat"]) == 1
    assert capsys.readouterr() == ("", "RequestError: somewhere: this\n  needed: that\n  to do:  do so\n")


def test_interruption_is_status_130(monkeypatch):
    def interrupt(name, words):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    assert main(["chat"]) == 130


def test_help_imports_neither_torch_nor_server():
    code = "import sys; from bitgrain.cli.main import main; main(['--help']); print({'torch', 'fastapi', 'rich'} & set(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"


# ---- generate ----


@pytest.mark.parametrize("words", [[], ["--no-stream"], ["--stream"]])
def test_generate_prints_the_text(words, checkpoint, loads, capsys):
    assert main(["generate", str(checkpoint), "--prompt", "hi", *words]) == 0
    assert capsys.readouterr().out == TEXT + "\n"


def test_generate_json_is_one_object(checkpoint, loads, capsys):
    assert main(["generate", "--model-path", str(checkpoint), "--prompt", "hi", "--json", "--stop", "京", "--max-tokens", "50"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["text"], done["finish_reason"], done["matched"], done["prompt_tokens"]) == (TEXT[:-1], "stop", "京", 3)


def test_load_flags_reach_load_model(checkpoint, loads):
    words = (
        "--quantization q --kv-cache-dtype fp8 --dtype float32 --device meta --fidelity fast --kernel linear=a.b --kernel embedding=c.d --forbid x --forbid y "
        "--require native --trust-tensors --context-length 64 --tp-size 1 --model-impl transformers --trust-remote-code"
    )
    assert main(["generate", str(checkpoint), "--prompt", "hi", *words.split()]) == 0
    assert loads == [
        {
            "path": str(checkpoint), "quantization": "q", "kv_cache": "fp8", "dtype": "float32", "device": "meta", "fidelity": "fast",
            "kernels": {"linear": "a.b", "embedding": "c.d"}, "forbid": ("x", "y"), "require": "native", "trust_tensors": True, "context_length": 64,
            "model_impl": "transformers", "trust_remote_code": True,
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--tp-size", "2"], "--tp-size 2"),
        (["--mem-fraction-static", "0.8"], "--mem-fraction-static 0.8"),
        (["--kernel", "linear"], "--kernel linear"),
        (["--kernel", "linear=a", "--kernel", "linear=b"], "one value for linear"),
        (["--model-path", "elsewhere"], "MODEL and --model-path"),
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "0.5"], "--top-p"),
        (["--seed", "1"], "--seed"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--stop", ""], "stop"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_flag_that_cannot_be_honoured_is_refused_before_loading(words, named, checkpoint, loads, capsys):
    assert main(["generate", str(checkpoint), "--prompt", "hi", *words]) == 1
    error = capsys.readouterr().err
    assert named in error and "needed:" in error and "Traceback" not in error
    assert loads == []


def test_path_that_is_not_there_is_refused(tmp_path, capsys, loads):
    assert main(["generate", str(tmp_path / "none"), "--prompt", "hi"]) == 1
    assert "needed:" in capsys.readouterr().err


def test_prompt_that_does_not_fit_is_refused(checkpoint, loads, capsys):
    assert main(["generate", str(checkpoint), "--prompt", "a" * 600]) == 1
    assert "PromptTooLongError" in capsys.readouterr().err


def test_no_model_means_the_bundled_one(loads, capsys, tmp_path, monkeypatch):
    import bitgrain.bundled as bundled

    monkeypatch.setattr(bundled, "__file__", str(tmp_path / "__init__.py"))
    assert main(["generate", "--prompt", "hi"]) == 1
    assert "bundled model" in capsys.readouterr().err
    write_checkpoint(tmp_path / bundled.DEFAULT)
    assert main(["generate", "--prompt", "hi"]) == 0
    assert main(["generate", bundled.DEFAULT, "--prompt", "hi"]) == 0
    assert [call["path"] for call in loads] == [str(tmp_path / bundled.DEFAULT)] * 2


# ---- chat ----


def chat(monkeypatch, lines, checkpoint, *words):
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["chat", str(checkpoint), *words])


def test_chat_answers_each_line(checkpoint, loads, monkeypatch, capsys):
    assert chat(monkeypatch, "hi\n\nyou\n/reset\nagain\n/exit\nnever\n", checkpoint) == 0
    assert capsys.readouterr().out == f"{TEXT}\n" * 3


def test_chat_sends_the_conversation_until_reset(checkpoint, loads, monkeypatch):
    from bitgrain.engine.llm import LLM

    sent = []
    original = LLM.stream_chat
    monkeypatch.setattr(
        LLM, "stream_chat", lambda self, messages, params: sent.append([m["content"] for m in messages]) or original(self, messages, params)
    )
    assert chat(monkeypatch, "a\nb\n/reset\nc", checkpoint, "--system", "S") == 0
    assert sent == [["S", "a"], ["S", "a", TEXT, "b"], ["S", "c"]]


def test_chat_line_that_fails_is_reported_and_the_rest_answered(checkpoint, loads, monkeypatch, capsys):
    assert chat(monkeypatch, "a" * 600 + "\n/what\nhi\n", checkpoint) == 1
    shown = capsys.readouterr()
    assert shown.out == f"{TEXT}\n" and "PromptTooLongError" in shown.err and "there is no /what" in shown.err


def test_chat_without_template_is_refused(tmp_path, loads, monkeypatch, capsys):
    assert chat(monkeypatch, "hi\n", write_checkpoint(tmp_path / "bare", template=None)) == 1
    assert "no chat template" in capsys.readouterr().err


# ---- progress ----


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("with_rich", [True, False])
def test_progress_is_drawn_on_a_terminal(with_rich, monkeypatch):
    if with_rich:
        pytest.importorskip("rich", reason="the extra `cli` is not installed")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    stream = Terminal()
    with progress_bar("loading", stream) as step:
        step(1, 2)
        step(2, 2)
    assert "loading" in stream.getvalue()


def test_progress_is_silent_elsewhere():
    stream = io.StringIO()
    with progress_bar("loading", stream) as step:
        assert step is None
    assert stream.getvalue() == ""
