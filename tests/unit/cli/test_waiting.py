"""How threads wait: chosen by the launcher, before torch, and only where the user chose nothing."""

import os
import subprocess
import sys

import pytest

from bitgrain.cli import waiting


@pytest.mark.parametrize(
    ("cores", "threads", "load", "crowded"), [(2, 2, 0.0, False), (2, 2, 0.4, False), (2, 2, 1.0, True), (8, 2, 5.0, False), (8, 2, 7.0, True), (1, 2, 0.0, True)]
)
def test_more_threads_than_cores_are_a_crowd(cores, threads, load, crowded):
    assert waiting.is_crowded(cores, threads, load) is crowded


@pytest.fixture
def launched(monkeypatch):
    """choose_waiting() in a process without torch: (command, variables of the user, load) to the policy that is set."""

    def run(command, load=9.0, **variables):
        for name in (waiting.POLICY, waiting.SPINS, waiting.THREADS):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        monkeypatch.setattr(waiting, "load", lambda: load)
        waiting.choose_waiting(command)
        return os.environ.pop(waiting.POLICY, None)

    return run


def test_only_commands_that_run_a_model_choose(launched):
    assert launched("serve") == launched("generate") == launched("chat") == "passive"
    assert launched("inspect") is None


def test_an_idle_machine_keeps_the_default(launched):
    assert launched("serve", load=0.0) is None
    assert launched("serve", load=0.0, OMP_NUM_THREADS="64000") == "passive"


def test_the_users_choice_stands(launched):
    assert launched("serve", OMP_WAIT_POLICY="active") == "active"
    assert launched("serve", GOMP_SPINCOUNT="5") is None


def test_after_torch_it_is_too_late(launched, monkeypatch):
    import torch

    monkeypatch.setattr(waiting, "load", lambda: 9.0)
    monkeypatch.delenv(waiting.POLICY, raising=False)
    assert sys.modules["torch"] is torch
    waiting.choose_waiting("serve")
    assert waiting.POLICY not in os.environ


def test_the_launcher_chooses_before_torch_is_imported():
    code = "import sys; import bitgrain.cli.main as m; from bitgrain.cli import waiting; assert 'torch' not in sys.modules; waiting.load = lambda: 9.0; m.main(['serve', '--help']); import os; print(os.environ['OMP_WAIT_POLICY'])"
    clean = {name: value for name, value in os.environ.items() if name not in (waiting.POLICY, waiting.SPINS)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean)
    assert done.stdout.splitlines()[-1] == "passive"
