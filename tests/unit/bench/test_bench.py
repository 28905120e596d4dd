"""`bitgrain bench`: what is sampled, what is thrown away, what is counted, and what it refuses."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch

import bitgrain
from bitgrain.bench import limits
from bitgrain.bench.kernels import CASES, measure_kernels
from bitgrain.bench.limits import Machine, limit_of
from bitgrain.bench.models import _peak, _work, kernel_times, measure_decode, measure_prefill, share_in_kernels
from bitgrain.bench.roofline import HEIGHT, WIDTH, roofline
from bitgrain.bench.sampling import ROUNDS, sample
from bitgrain.cli.main import main
from bitgrain.errors import RequestError
from bitgrain.kernels import peaks as host
from bitgrain.kernels.base import Fidelity
from bitgrain.kernels.cpu import library
from bitgrain.kernels.selection import Policy
from bitgrain.platforms.probe import default_platform
from tests.checkpoints import HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS, VOCAB, small_llama, write_checkpoint
from tests.unit.models.tiny_models import BASE, random_tensors


class Steady:
    """A machine whose read rates are given."""

    def __init__(self, *reads: float) -> None:
        self.reads = list(reads)

    def read(self) -> float:
        return self.reads.pop(0) if len(self.reads) > 1 else self.reads[0]

    def peaks(self) -> dict[str, float]:
        return {"float32": 4e10, "bfloat16": 0.0, "int8": 8e10, "int4": 15e10, "int4 in three digits": 5e10}


@pytest.fixture
def small_machine(monkeypatch):
    """Limits over small arrays, so that commands take no time."""
    monkeypatch.setattr(limits, "READ_BYTES", 4000)
    monkeypatch.setattr(limits, "SIDE", 16)
    monkeypatch.setattr(limits, "SMALL_SIDE", 8)
    limits._product.cache_clear()
    yield
    limits._product.cache_clear()


def test_a_quiet_round_is_taken_and_its_median_counts():
    taken = sample(lambda: [3.0, 1.0, 2.0], Steady(100.0, 104.0))
    assert (taken.median, taken.best, taken.read, taken.rejected, taken.is_disturbed) == (2.0, 1.0, 102.0, 0, False)
    assert taken.share_of_read(51.0) == pytest.approx(0.25)


def test_rounds_in_which_the_read_rate_changed_are_thrown_away():
    rounds = iter([[9.0], [8.0], [1.0]])
    taken = sample(lambda: next(rounds), Steady(100.0, 50.0, 100.0, 80.0, 100.0, 99.0))
    assert (taken.median, taken.rejected, taken.is_disturbed) == (1.0, 2, False)


def test_where_every_round_is_disturbed_the_quietest_is_given_and_says_so():
    rounds = iter([[9.0], [8.0], [7.0], [6.0]])
    taken = sample(lambda: next(rounds), Steady(100.0, 50.0, 100.0, 75.0, 100.0, 40.0, 100.0, 30.0))
    assert taken.median == 8.0 and taken.is_disturbed and taken.rejected == 1 and ROUNDS == 4


def test_kernels_are_timed_with_their_limits(small_machine):
    (row,) = measure_kernels(["w4-g128"], [(48, 256)], [2], Policy(self_test=False), default_platform().key, Steady(1e10), 2)
    told = row.as_dict()
    assert (told["n"], told["k"], told["rows"]) == (48, 256, 2) and row.operations == 2 * 2 * 48 * 256
    assert told["of_arithmetic"] == pytest.approx(row.operations / row.taken.median / 5e10, abs=1e-3) and told["arithmetic"] == "int4 in three digits"
    assert told["of_read"] == pytest.approx(row.nbytes / row.taken.median / 1e10, abs=1e-3)
    with pytest.raises(RequestError, match="w4_g128"):
        next(measure_kernels(["w4_g128"], [(48, 256)], [2], Policy(), default_platform().key, Steady(1e10), 2))


def test_the_limit_is_that_of_the_arithmetic_that_may_be_used():
    peaks = Steady(1.0).peaks()
    assert limit_of(Fidelity.EXACT, *CASES["w4-g128"], peaks) == ("int4 in three digits", 5e10)
    assert limit_of(Fidelity.EXACT, *CASES["w8"], peaks) == limit_of(Fidelity.EXACT, *CASES["fp8"], peaks) == ("float32", 4e10)
    assert limit_of(Fidelity.EXACT, *CASES["w8"], {**peaks, "bfloat16": 9e10}) == ("bfloat16", 9e10)
    assert limit_of(Fidelity.NATIVE, *CASES["w8a8"], peaks) == limit_of(Fidelity.APPROXIMATE, *CASES["w8"], peaks) == ("int8", 8e10)
    assert limit_of(Fidelity.APPROXIMATE, *CASES["w4-g128"], peaks) == ("int4", 15e10)
    assert limit_of(Fidelity.APPROXIMATE, *CASES["w4-g128"], {**peaks, "int4": 0.0}) == ("int8", 8e10)
    assert limit_of(Fidelity.EXACT, *CASES["w8"], {}) == ("float32", 0.0)


@pytest.mark.skipif(not host.can_measure(), reason="needs the native library")
def test_peaks_are_those_of_the_instruction_set_in_use():
    machine = Machine()
    chosen, found = library.instruction_set(), {}
    try:
        for name in library.available_sets():
            library.choose_instruction_set(name)
            found[name] = machine.peaks()
    finally:
        library.choose_instruction_set(chosen)
    assert all(peaks["float32"] > 1e8 and peaks["int4 in three digits"] == peaks["int4"] / 3 for peaks in found.values())
    # what a set has is a matter of its instructions; how fast they are is not tested
    has = {name: {kind for kind in host.KINDS if peaks[kind]} for name, peaks in found.items()}
    expected = {"portable": {"float32"}, "avx2": {"float32", "int8", "int4"}, "avx512": {"float32", "int8"}, "avx512bf16": {"float32", "int8", "bfloat16"}, "amx": {"float32", "int8", "bfloat16"}}
    assert all(has[name] == kinds for name, kinds in expected.items() if name in has)


def test_without_the_library_torch_is_the_limit(small_machine, monkeypatch):
    monkeypatch.setattr(host, "can_measure", lambda: False)
    monkeypatch.setattr(host, "peak", None)
    monkeypatch.setattr(host, "read_all", None)
    machine = Machine()
    peaks = machine.peaks()
    assert peaks["float32"] > 0 and set(peaks) == {"float32", "bfloat16", "int8"} and machine.read() > 0


def test_the_limit_of_a_model_is_that_of_its_products_together(tmp_path):
    model = bitgrain.load_model(small_llama(tmp_path / "m"), device="cpu", dtype="float32")
    labels = [m.name for m in model.modules() if hasattr(m, "is_plain")]
    first = model.selections[labels[0]]
    # one product may use whole numbers, at another speed
    model.selections = {**model.selections, labels[0]: replace(first, fidelity=Fidelity.APPROXIMATE)}
    whole = 2.0 * next(m.prepared.shape[0] * m.prepared.shape[1] for m in model.modules() if getattr(m, "name", "") == labels[0])
    rest = _work(model, 1)[1] - whole
    assert _peak(model, 1, Steady(1.0)) == pytest.approx((whole + rest) / (whole / 8e10 + rest / 4e10))


def test_work_of_a_dense_model_is_that_of_its_matrices(tmp_path):
    model = bitgrain.load_model(small_llama(tmp_path / "m"), device="cpu", dtype="float32")
    kv = HIDDEN // 4 * KV_HEADS
    elements = LAYERS * (HIDDEN * (2 * HIDDEN + 2 * kv) + 3 * HIDDEN * INTERMEDIATE)
    nbytes, operations = _work(model, 3)
    assert operations == 2 * 3 * (elements + VOCAB * HIDDEN)
    assert nbytes == sum(p.nbytes for p in model.modules() if hasattr(p, "is_plain"))
    assert _work(model, 3, logits=1)[1] == 2 * (3 * elements + VOCAB * HIDDEN)


@pytest.mark.parametrize("forbid", [(), ("cpu.experts", "reference.experts")], ids=["together", "linear"])
def test_work_of_a_mixture_counts_the_experts_that_are_chosen(forbid, tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    config = {**BASE, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": 16, "num_hidden_layers": 1, "torch_dtype": "float32", **experts}
    model = bitgrain.load_model(write_checkpoint(tmp_path / "m", random_tensors(config), config), device="cpu", dtype="float32", forbid=forbid)
    one, hundred = _work(model, 1), _work(model, 100)
    assert hundred[1] == pytest.approx(100 * one[1])
    all_experts = 4 * 3 * 32 * config["hidden_size"] * 4
    # one row reads a quarter of the experts, a hundred rows practically all
    assert hundred[0] - one[0] == pytest.approx(0.75 * all_experts, rel=0.02)


def test_decode_and_prefill_of_a_model(tmp_path, small_machine):
    model = bitgrain.load_model(small_llama(tmp_path / "m"), device="cpu", dtype="float32")
    decode = measure_decode(model, 2, 5, 3, Steady(1e10)).as_dict()
    assert decode["tokens"] == 2 and decode["context"] == 5 and 0 < decode["in_kernels"] <= 1
    assert decode["tokens_per_s"] == pytest.approx(2000 / decode["ms"], rel=1e-2)
    assert measure_prefill(model, 7, 2, Steady(1e10)).as_dict()["tokens"] == 7


def test_time_inside_kernels_is_counted_and_the_kernels_are_left_as_they_were(tmp_path):
    model = bitgrain.load_model(small_llama(tmp_path / "m"), device="cpu", dtype="float32")
    kernel = next(iter(model.selections.values())).kernel
    with kernel_times(model) as inside:
        assert "apply" in vars(kernel)
        model.logits(torch.tensor([1, 2, 3]))
        assert inside[0] > 0
    assert "apply" not in vars(kernel)
    assert share_in_kernels(model, lambda: []) == 0.0


def test_roofline_is_a_picture_with_every_point_in_it():
    page = ElementTree.fromstring(roofline(2e10, {"float32": 5e10, "int8": 0.0}, [("a <b>", 4.0, 1e10), ("c", 900.0, 4e10)], "t & t"))
    circles = [node for node in page.iter() if node.tag.endswith("circle")]
    texts = [node.text for node in page.iter() if node.tag.endswith("text")]
    assert len(circles) == 4 and {"a <b>", "c", "t & t", "float32 50 G/s", "20.0 GB/s"} <= set(texts) and not any("int8" in t for t in texts)
    assert all(0 < float(c.get("cx")) < WIDTH and 0 < float(c.get("cy")) < HEIGHT for c in circles)
    # the first point lies left of and below the second
    first, second = ((float(c.get("cx")), float(c.get("cy"))) for c in circles[::2])
    assert first[0] < second[0] and first[1] > second[1]


def test_command_prints_json_and_draws(tmp_path, small_machine, capsys):
    place = tmp_path / "roof.svg"
    assert main(["bench", "kernels", "--cases", "w8a8", "mxfp4", "--shapes", "32x64", "--rows", "1", "3", "--repeats", "2", "--json", "--plot", str(place)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(r["case"], r["rows"]) for r in found["results"]] == [("w8a8", 1), ("w8a8", 3), ("mxfp4", 1), ("mxfp4", 3)] and found["read_GB_per_s"] > 0
    assert ElementTree.parse(place).getroot().tag.endswith("svg")
    model = str(small_llama(tmp_path / "m"))
    assert main(["bench", "decode", model, "--repeats", "2", "--sequences", "1", "2", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("decode") == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["kernels", "--shapes", "32"], "NxK"), (["kernels", "--rows", "0"], "below 1"), (["kernels", "--kernel", "linear=nothing.here"], "no such kernel"),
        (["decode", "--sequences", "0"], "below 1"), (["prefill", "--tokens", "999999"], "at most"), (["kernels", "--plot", "/nowhere/at/all.svg"], "no such folder"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused(words, said, small_machine, capsys):
    assert main(["bench", *words]) == 1
    assert said in capsys.readouterr().err
