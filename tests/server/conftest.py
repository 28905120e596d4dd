import threading

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from bitgrain.engine import Engine
from bitgrain.server.app import create_app
from bitgrain.server.listen import bind, make_server, url_of
from bitgrain.server.served import Served
from tests.engine.fakes import FakeModel, byte_tokenizer, ids_of

TEXT = "naïve 東京 answer: 42"


class Running:
    """A server on a free port of this machine, with its engine and model."""

    def __init__(self, model, tokenizer):
        self.model = model
        self.engine = Engine(model, tokenizer)
        self._listener = bind("127.0.0.1", 0)
        self.url = url_of(self._listener)
        served = Served(
            self.engine, ("fake", "other-name"), "somewhere/fake", {"summary": {"format": "none"}, "modules": [], "explain": "linear: x"}
        )
        started = threading.Event()
        self._server = make_server(create_app(served), started.set)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True)
        self._thread.start()
        assert started.wait(20)
        self.http = httpx.Client(base_url=self.url, timeout=20, trust_env=False)

    def post(self, path, **body):
        return self.http.post(path, json=body)

    def close(self):
        self.http.close()
        self._server.should_exit = True
        if self.model.gate:
            self.model.gate.set()
        self._thread.join(20)
        self.engine.close()
        self._listener.close()


@pytest.fixture(scope="session")
def server():
    """One server for all tests that leave it as it was; it says TEXT."""
    running = Running(FakeModel(script=ids_of(TEXT)), byte_tokenizer())
    yield running
    running.close()


@pytest.fixture
def start_server():
    """Start servers with models of the test's own."""
    started = []

    def start(model, tokenizer=None):
        started.append(Running(model, tokenizer or byte_tokenizer()))
        return started[-1]

    yield start
    for running in started:
        running.close()
