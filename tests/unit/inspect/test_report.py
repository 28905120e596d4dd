import pytest

from bitgrain.api import open_checkpoint
from bitgrain.errors import RequestError
from bitgrain.formats.base import ModuleKind
from bitgrain.formats.compressed_tensors.schemes import IntScheme
from bitgrain.formats.fp8.schemes import Float8Scheme
from bitgrain.inspect.report import group_rows, left_out_lines, memory, shard_rows
from bitgrain.plan import ModulePlan, Plan
from bitgrain.weights import NO_ACTIVATION
from tests.checkpoints import LAYERS, llama_tensors, small_llama


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return open_checkpoint(small_llama(tmp_path_factory.mktemp("llama") / "small")).plan


def one_module(name, scheme):
    module = ModulePlan(name, ModuleKind.LINEAR, scheme.shape, (), (), (), 1000, "because", scheme)
    return Plan("any", (), {name: module})


def test_layers_are_one_row_and_nothing_is_lost(plan):
    rows = {row.name: row for row in group_rows(plan)}
    down = rows[f"model.layers.0-{LAYERS - 1}.mlp.down_proj"]
    assert (down.count, down.kind, down.scheme, down.bits_per_weight) == (LAYERS, "linear", "dense bfloat16", 16.0)
    assert sum(row.count for row in rows.values()) == len(plan.modules)
    assert sum(row.nbytes for row in rows.values()) == sum(t.numel() * t.element_size() for t in llama_tensors().values())


def test_rows_split_where_the_reason_differs():
    first, second = (ModulePlan(f"layers.{i}.fc", ModuleKind.LINEAR, (4, 4), (), (), (), 8, why) for i, why in enumerate(("group_0", "group_1 (x)")))
    third = ModulePlan("layers.2.fc", ModuleKind.LINEAR, (4, 4), (), (), (), 8, "group_0")
    rows = group_rows(Plan("any", (), {m.name: m for m in (first, second, third)}))
    assert [(row.name, row.why) for row in rows] == [("layers.0,2.fc", "group_0"), ("layers.1.fc", "group_1 (x)")]
    assert rows[0].as_dict()["bytes"] == 16


def test_tensors_that_are_left_out_are_one_line_for_each_rule():
    ignored = {"vision_tower.a.weight": "not text", "model.projector.b.weight": "not text", "rotary_emb.inv_freq": "follows from the configuration"}
    assert left_out_lines(Plan("any", (), {}, (), ignored)) == [
        "left out: 2 tensors (model.projector, vision_tower): not text", "left out: 1 tensor (rotary_emb.inv_freq): follows from the configuration",
    ]  # fmt: skip
    assert left_out_lines(Plan("any", (), {})) == []


def test_memory_is_the_files_and_three_of_the_largest_module(plan):
    stored = sum(t.numel() * t.element_size() for t in llama_tensors().values())
    largest = max(t.numel() * t.element_size() for t in llama_tensors().values())
    assert memory(plan) == {"stored_bytes": stored, "largest_module_bytes": largest, "peak_loading_bytes": stored + 3 * largest}
    assert memory(Plan("any", (), {}))["peak_loading_bytes"] == 0


def test_indivisible_sizes_are_refused_along_the_right_dimension(plan):
    verdicts = {row["name"].rpartition(".")[2]: row for row in shard_rows(plan, 3)}
    assert verdicts["q_proj"] == {
        "name": "model.layers.*.self_attn.q_proj", "count": LAYERS, "dim": "N", "size": 64, "verdict": "refused: 64 is not a multiple of 3",
    }  # fmt: skip
    assert verdicts["o_proj"]["dim"] == "K"
    assert {"gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"}.isdisjoint(verdicts)  # 96 and 48 divide
    assert shard_rows(plan, 2) == []


INT4 = IntScheme((64, 256), NO_ACTIVATION, 4, (1, 128))
ACT_ORDER = IntScheme((64, 256), NO_ACTIVATION, 4, (1, 128), act_order=True)
BLOCK = Float8Scheme((256, 256), NO_ACTIVATION, "F8_E4M3", (128, 128))


@pytest.mark.parametrize(
    ("name", "scheme", "ranks", "verdict"),
    [
        ("mlp.down_proj", INT4, 2, None),
        ("mlp.down_proj", INT4, 4, "exact; cuts inside scales of 128, which are repeated"),
        ("mlp.up_proj", INT4, 4, None),
        ("mlp.down_proj", ACT_ORDER, 2, "exact; act-order: every rank keeps all scales"),
        ("mlp.up_proj", BLOCK, 4, "exact; cuts inside scales of 128, which are repeated"),
        ("mlp.up_proj", BLOCK, 2, None),
        ("mlp.up_proj", BLOCK, 5, "refused: 256 is not a multiple of 5"),
    ],
)
def test_verdict_follows_the_scales(name, scheme, ranks, verdict):
    assert [row["verdict"] for row in shard_rows(one_module(name, scheme), ranks)] == ([verdict] if verdict else [])


@pytest.mark.parametrize("ranks", [0, -1])
def test_number_of_ranks_below_one_is_refused(plan, ranks):
    with pytest.raises(RequestError, match=f"tp = {ranks}"):
        shard_rows(plan, ranks)
