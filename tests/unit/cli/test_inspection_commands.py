"""inspect, explain and doctor, as typed: exit statuses, JSON, and errors in four parts."""

import json

import pytest

from bitgrain.cli.main import main
from bitgrain.formats.registry import formats
from bitgrain.kernels.registry import candidates, kernel_entries
from bitgrain.platforms import probe
from bitgrain.platforms.probe import default_platform
from tests.checkpoints import LAYERS, small_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(small_llama(tmp_path_factory.mktemp("llama") / "small"))


def answer(capsys, *words, status=0):
    """The JSON document that a command prints."""
    assert main([*words, "--json"]) == status
    shown = capsys.readouterr()
    assert shown.err == ""
    return json.loads(shown.out)


def test_inspect_json_is_the_whole_plan(llama, capsys):
    report = answer(capsys, "inspect", llama)
    assert (report["format"], report["architecture"]) == ("unquantized", "LlamaForCausalLM")
    assert len(report["modules"]) == 7 * LAYERS + 2 * LAYERS + 3
    assert report["memory"]["stored_bytes"] == report["totals"]["bytes"]
    assert len(report["hash"]) == 64 and "shards" not in report


def test_inspect_groups_layers_unless_all_are_asked_for(llama, capsys):
    assert main(["inspect", llama]) == 0
    grouped = capsys.readouterr().out
    assert f"model.layers.0-{LAYERS - 1}.mlp.down_proj" in grouped and "model.layers.1.mlp" not in grouped
    assert main(["inspect", llama, "--all"]) == 0
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out


def test_inspect_fails_where_a_matrix_cannot_be_split(llama, capsys):
    shards = answer(capsys, "inspect", llama, "--tp", "3", status=1)["shards"]
    assert shards["ranks"] == 3
    assert {row["verdict"] for row in shards["remarks"]} == {"refused: 64 is not a multiple of 3", "refused: 32 is not a multiple of 3"}
    assert main(["inspect", llama, "--tp", "3"]) == 1
    assert "refused: 64 is not a multiple of 3" in capsys.readouterr().out


def test_inspect_succeeds_where_every_matrix_can_be_split(llama, capsys):
    assert answer(capsys, "inspect", llama, "--tp", "2")["shards"]["remarks"] == []
    assert main(["inspect", llama, "--tp", "2"]) == 0
    assert "every matrix can be split over 2 ranks" in capsys.readouterr().out


def test_explain_gives_every_candidate_a_refusal_but_the_chosen(llama, capsys):
    report = answer(capsys, "explain", llama)
    here = default_platform().key
    assert report["platform"] == here
    for row in report["modules"]:
        names = [c["kernel"] for c in row["candidates"]]
        assert names == [k.name for k in candidates(row["problem"].split()[0], here)]
        assert [c["kernel"] for c in row["candidates"] if not c["reason"]] == [row["kernel"]]
    assert main(["explain", llama]) == 0
    shown = capsys.readouterr().out
    assert all(c["reason"] in shown for row in report["modules"] for c in row["candidates"])


def test_explain_honours_a_forced_kernel(llama, capsys):
    rows = answer(capsys, "explain", llama, "--kernel", "linear=reference.linear")["modules"]
    assert {r["kernel"] for r in rows if r["problem"].startswith("linear")} == {"reference.linear"}


def test_explain_require_native_refuses_the_floor(llama, capsys):
    # without the machine's own backend only the floor is left
    backends = {k.name.partition(".")[0] for _, _, k in kernel_entries()} - {"reference"}
    assert main(["explain", llama, "--require", "native", *(word for name in backends for word in ("--forbid", name))]) == 1
    error = capsys.readouterr().err
    assert "--require native was asked for, and this is the reference floor" in error and "needed:" in error


@pytest.mark.parametrize("asked, state, said", [("npu:910b", "planned", "planned for npu:910b (910b, "), ("cuda:sm100@host", "simulated", "on cuda:sm100 simulated on the host (")])
def test_explain_says_what_it_plans_for(asked, state, said, llama, capsys, monkeypatch):
    report = answer(capsys, "explain", llama, "--platform", asked)
    key, _, generation = asked.removesuffix("@host").partition(":")
    assert (report["platform"], report["state"], report["generation"]) == (key, state, generation) and generation in report["features"]
    assert main(["explain", llama, "--platform", asked]) == 0
    assert said in capsys.readouterr().out
    monkeypatch.setenv("BITGRAIN_PLATFORM", asked)
    assert answer(capsys, "explain", llama) == report


def test_kernel_of_another_platform_is_refused_with_every_platform(llama, capsys):
    name, places = next((k.name, p) for _, p, k in kernel_entries() if p not in ("cpu", "any"))
    operation = next(o for o, _, k in kernel_entries() if k.name == name)
    assert main(["explain", llama, "--platform", "cpu", "--kernel", f"{operation}={name}"]) == 1
    error = capsys.readouterr().err
    assert f"a kernel of {places}" in error and all(f"    {key}: " in error for key in probe.known_platforms())


WRONG = {
    "explain --platform cuda:sm30": "did you mean 'sm90'",
    "explain --platform toaster": "platform 'toaster'",
    "explain --kernel linear=no.such": "no such kernel",
    "explain --kernel cooking=a.b": "no such operation",
    "explain --forbid no.such": "no such kernel or backend",
    "explain --dtype int3": "int3",
    "inspect --tp 0": "tp = 0",
    "inspect --quantization gptq": "the checkpoint is unquantized",
    "inspect --quantization nonsense": "nonsense",
}


@pytest.mark.parametrize("line", WRONG)
def test_wish_that_cannot_be_honoured_is_status_1_and_four_parts(line, llama, capsys):
    command, *words = line.split()
    assert main([command, llama, *words]) == 1
    shown = capsys.readouterr()
    assert WRONG[line] in shown.err and "  needed: " in shown.err and "  to do:  " in shown.err and "Traceback" not in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("command", ["inspect", "explain"])
def test_unreadable_model_is_status_1_and_names_the_file(command, tmp_path, capsys):
    assert main([command, str(tmp_path / "none")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err
    broken = small_llama(tmp_path / "broken") / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-100])
    assert main([command, str(broken.parent)]) == 1
    error = capsys.readouterr().err
    assert "model.safetensors" in error and "  needed: " in error and "  to do:  " in error


def test_doctor_names_platforms_kernels_and_formats(capsys):
    found = answer(capsys, "doctor")
    assert found["formats"] == formats().names()
    assert {k["kernel"] for k in found["kernels"]} == {k.name for _, _, k in kernel_entries()}
    assert {p["platform"]: p["state"] for p in found["platforms"]}[default_platform().key] == "present"
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert all(k["kernel"] in shown for k in found["kernels"])


def test_doctor_tells_a_broken_extra_from_an_absent_one(capsys, monkeypatch, tmp_path):
    from bitgrain.inspect import doctor

    (tmp_path / "bitgrain_broken_extra.py").write_text("raise RuntimeError('wrong build')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "EXTRAS", {"toy": (("bitgrain_broken_extra", "x"), ("bitgrain_absent_extra", "y"))})
    assert answer(capsys, "doctor")["extras"]["toy"] == {"x": "broken: RuntimeError: wrong build", "y": "absent"}


def test_doctor_shows_settings_that_are_set(capsys, monkeypatch):
    monkeypatch.setenv("BITGRAIN_SELFTEST", "0")
    assert main(["doctor"]) == 0
    assert "BITGRAIN_SELFTEST=0" in capsys.readouterr().out
