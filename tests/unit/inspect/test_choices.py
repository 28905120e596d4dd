import pytest

from bitgrain.api import open_checkpoint
from bitgrain.errors import NoKernelError, RequestError
from bitgrain.inspect.choices import choose_for_plan, choosing_for
from bitgrain.kernels.explain import explain_rows
from bitgrain.kernels.registry import candidates
from bitgrain.kernels.selection import Policy
from bitgrain.layers.builder import joint_label
from bitgrain.platforms.probe import default_platform
from tests.checkpoints import LAYERS, llama_config, llama_tensors, small_llama, write_checkpoint


def chosen(plan, **wishes):
    return choose_for_plan(plan, default_platform().key, Policy(self_test=False, **wishes), "float32")


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return open_checkpoint(small_llama(tmp_path_factory.mktemp("llama") / "small")).plan


def test_fused_modules_are_one_problem_of_their_sum(plan):
    selections = chosen(plan)
    fused = selections["model.layers.0.self_attn.{q_proj,k_proj,v_proj}"]
    assert fused.problem.describe().startswith("linear [128, 64]")
    assert "model.layers.0.self_attn.q_proj" not in selections
    assert [label for label in selections if "norm" in label] == []
    assert selections["model.embed_tokens"].problem.operation == "embedding"


def test_tied_head_takes_the_embedding_as_a_linear_weight(tmp_path):
    tensors = {k: v for k, v in llama_tensors().items() if not k.startswith("lm_head")}
    path = write_checkpoint(tmp_path / "tied", tensors, llama_config(tie_word_embeddings=True))
    selections = chosen(open_checkpoint(path).plan)
    assert selections["lm_head"].problem.describe().startswith("linear [48, 64]")


def test_equal_selections_are_one_row_with_every_candidate(plan):
    rows = {row["modules"]: row for row in explain_rows(chosen(plan))}
    down = rows[f"model.layers.0-{LAYERS - 1}.mlp.down_proj"]
    assert down["count"] == LAYERS
    names = [c["kernel"] for c in down["candidates"]]
    assert names == [k.name for k in candidates("linear", default_platform().key)]
    assert [c["kernel"] for c in down["candidates"] if not c["reason"]] == [down["kernel"]]


def test_forced_and_forbidden_kernels_are_honoured(plan):
    forced = chosen(plan, force={"linear": "reference.linear"})
    assert {s.kernel.name for s in forced.values() if s.problem.operation == "linear"} == {"reference.linear"}
    with pytest.raises(NoKernelError, match=r"reference\.linear: forbidden by --forbid"):
        chosen(plan, force={"linear": "reference.linear"}, forbid=frozenset({"reference.linear"}))


@pytest.mark.parametrize("wishes", [{"force": {"linear": "no.such"}}, {"force": {"cooking": "a.b"}}, {"forbid": frozenset({"no.such"})}, {"require": "speed"}])
def test_wish_that_names_nothing_is_refused(plan, wishes):
    with pytest.raises(RequestError, match="no such"):
        chosen(plan, **wishes)


def test_platform_must_exist():
    with choosing_for(default_platform().key) as key:
        assert key == default_platform().key
    with pytest.raises(RequestError, match="no such platform"), choosing_for("any"):
        pass


def test_joint_label_names_the_common_parent_once():
    assert joint_label(["a.b.q", "a.b.k"]) == "a.b.{q,k}"
    assert joint_label(["lm_head"]) == "lm_head"
