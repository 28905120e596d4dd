import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

pytest.importorskip("uvicorn", reason="the extra `server` is not installed")

from bitgrain.cli.main import main
from bitgrain.errors import RequestError
from bitgrain.server import listen
from tests.unit.cli.conftest import TEXT

# the command as a process of its own, with the fake in place of the model
SERVE = """
import sys, bitgrain
from tests.engine.fakes import FakeModel, ids_of
bitgrain.load_model = lambda path, **options: FakeModel(script=ids_of({text!r}))
from bitgrain.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def refused(words, capsys):
    assert main(["serve", *words]) == 1
    error = capsys.readouterr().err
    assert "needed:" in error and "to do:" in error and "Traceback" not in error
    return error


def test_port_in_use_is_refused_before_loading(taken, checkpoint, loads, capsys):
    assert "the port is in use" in refused([str(checkpoint), "--port", str(taken)], capsys)
    assert loads == []


@pytest.mark.parametrize("port", ["-1", "65536", "99999999999"])
def test_impossible_port_is_refused(port, checkpoint, loads, capsys):
    assert f"--port {port}: no such port" in refused([str(checkpoint), "--port", port], capsys)
    assert loads == []


@pytest.mark.parametrize("host", ["no-such-host.invalid", "300.1.1.1", "bad host", "\u2603" * 70, "192.0.2.1"])
def test_host_that_cannot_be_used_is_refused(host, checkpoint, loads, capsys):
    assert f"--host {host}" in refused([str(checkpoint), "--host", host, "--port", "0"], capsys)
    assert loads == []


def test_empty_served_name_is_refused(checkpoint, loads, capsys):
    assert "--served-model-name" in refused([str(checkpoint), "--served-model-name", " "], capsys)


def test_missing_packages_are_named_with_the_extra(checkpoint, loads, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "bitgrain.server.listen")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert 'pip install "bitgrain[server]"' in refused([str(checkpoint)], capsys)


def test_port_is_free_again_after_a_model_that_does_not_load(checkpoint, capsys, monkeypatch):
    import bitgrain
    from bitgrain.errors import DamagedFileError

    def fail(path, **options):
        raise DamagedFileError("model.safetensors", "bad", "good", "mend it")

    bound = []
    original = listen.bind
    monkeypatch.setattr(listen, "bind", lambda host, port: bound.append(original(host, port)) or bound[-1])
    monkeypatch.setattr(bitgrain, "load_model", fail, raising=False)
    assert "mend it" in refused([str(checkpoint), "--port", "0"], capsys)
    assert bound[0].fileno() == -1


def test_port_of_a_server_that_still_loads_its_model_is_in_use():
    with listen.bind("127.0.0.1", 0) as listener, pytest.raises(RequestError, match="in use"):
        listen.bind("127.0.0.1", listener.getsockname()[1])


def test_url_of_any_address_is_one_that_can_be_opened():
    with listen.bind("0.0.0.0", 0) as listener:
        assert listen.url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_server_says_where_it_serves_and_stops_on_interrupt(checkpoint):
    words = [
        sys.executable,
        "-c",
        SERVE.format(text=TEXT),
        "serve",
        str(checkpoint),
        "--port",
        "0",
        "--served-model-name",
        "tiny",
        "--chunked-prefill-size",
        "7",
    ]
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        first, example = process.stdout.readline(), process.stdout.readline()
        assert first.startswith("bitgrain serves tiny at http://127.0.0.1:"), process.stderr.read()
        url = first.split()[4]
        assert f"curl {url}/generate" in example
        answer = httpx.post(f"{url}/generate", json={"text": "a", "sampling_params": {"temperature": 0}}, trust_env=False)
        assert answer.json()["text"] == TEXT
        assert httpx.get(f"{url}/get_model_info", trust_env=False).json()["chunked_prefill_size"] == 7
        plan = httpx.get(f"{url}/plan", trust_env=False).json()
        assert plan["explain"] == "layers.* (x2): fake.kernel (exact)\n  not other.kernel: no such instruction"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert "Traceback" not in process.stderr.read()
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()
