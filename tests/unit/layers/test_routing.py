"""Which experts tokens get, by hand and against the routers of the transformers library."""

from types import SimpleNamespace

import pytest
import torch

from bitgrain.layers.routing import Router, Routing, choose
from bitgrain.layers.sparse_mlp import SharedExpert, SparseMLP

GROUPED = Routing(8, 2, normalize=False, groups=4, kept_groups=1)


def dense(weight, chosen, count):
    """[M, count] of each expert's weight, so that the order of the chosen ones does not matter."""
    return torch.zeros(len(weight), count, dtype=weight.dtype).scatter_(1, chosen, weight)


# ---- by hand ----


def test_a_group_is_worth_its_best_expert():
    # the two best experts of all lie in different groups; the group of the very best is kept
    p = torch.tensor([[0.05, 0.05, 0.30, 0.02, 0.25, 0.24, 0.05, 0.04]])
    weight, chosen = choose(p.log(), GROUPED)
    assert chosen.tolist() == [[2, 3]] and torch.allclose(weight, torch.tensor([[0.30, 0.02]]))


def test_experts_of_other_groups_have_no_weight():
    p = torch.tensor([[0.05, 0.05, 0.30, 0.02, 0.25, 0.24, 0.05, 0.04]])
    weight, chosen = choose(p.log(), Routing(8, 3, normalize=False, groups=4, kept_groups=1))
    assert set(chosen[0, :2].tolist()) == {2, 3} and weight[0, 2] == 0


def test_a_group_is_worth_the_sum_of_its_two_best_experts():
    p = torch.tensor([[0.1, 0.1, 0.9, 0.1, 0.6, 0.7, 0.2, 0.2]])
    routing = Routing(8, 2, normalize=False, sigmoid=True, groups=4, kept_groups=1, group_score="two best")
    weight, chosen = choose(torch.logit(p), routing)
    assert chosen.tolist() == [[5, 4]] and torch.allclose(weight, torch.tensor([[0.7, 0.6]]))
    # beyond the kept groups, the others come last and keep their weight
    weight, chosen = choose(torch.logit(p), Routing(8, 3, normalize=False, sigmoid=True, groups=4, kept_groups=1, group_score="two best"))
    assert set(chosen[0, :2].tolist()) == {4, 5} and weight[0, 2] == torch.logit(p).sigmoid()[0, chosen[0, 2]]


def test_correction_chooses_and_does_not_weigh():
    scores = torch.logit(torch.tensor([[0.5, 0.6, 0.7]]))
    weight, chosen = choose(scores, Routing(3, 1, normalize=False, sigmoid=True, corrected=True), torch.tensor([0.9, 0.0, 0.0]))
    assert chosen.tolist() == [[0]] and torch.allclose(weight, torch.tensor([[0.5]]))
    # groups are chosen by corrected scores, too
    p, correction = torch.tensor([[0.5, 0.5, 0.6, 0.6]]), torch.tensor([0.2, 0.2, 0.0, 0.0])
    grouped = Routing(4, 2, normalize=False, sigmoid=True, groups=2, kept_groups=1, group_score="two best", corrected=True)
    assert set(choose(torch.logit(p), grouped, correction)[1][0].tolist()) == {0, 1}
    assert set(choose(torch.logit(p), grouped, torch.zeros(4))[1][0].tolist()) == {2, 3}


def test_scale_comes_after_normalization():
    scores = torch.logit(torch.tensor([[0.2, 0.6, 0.1]]))
    weight, _ = choose(scores, Routing(3, 2, normalize=True, sigmoid=True, scale=2.5))
    assert torch.allclose(weight, torch.tensor([[2.5 * 0.75, 2.5 * 0.25]]))


def test_weights_are_of_the_scores_dtype_unless_they_are_wide():
    scores = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    narrow, wide = (choose(scores, Routing(8, 2, normalize=True, wide_weights=w))[0] for w in (False, True))
    assert narrow.dtype is torch.bfloat16 and wide.dtype is torch.float32
    assert torch.equal(narrow, wide.bfloat16()) and not torch.equal(narrow.float(), wide)


# ---- the router's own product ----


class Served:
    """A builder that serves one matrix and one correction, and notes what was asked to be wide."""

    def __init__(self, weight, correction=None):
        self.weight, self.correction, self.wide = weight, correction, []

    def linear(self, name, wide=False):
        if wide:
            self.wide.append(name)
        weight = self.weight.float() if wide else self.weight
        return lambda x: torch.nn.functional.linear(x, weight)

    def vector(self, name, size, wide=False):
        assert wide and self.correction.shape == (size,)
        self.wide.append(name)
        return self.correction


def test_wide_router_multiplies_in_float32():
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(8, 256, generator=generator).bfloat16() / 16, torch.randn(40, 256, generator=generator).bfloat16()
    correction = torch.rand(8, generator=generator)
    served = Served(weight, correction)
    routing = Routing(8, 3, normalize=True, sigmoid=True, corrected=True, wide=True, wide_weights=True)
    found = dense(*Router(served, "mlp", routing)(x), 8)
    assert served.wide == ["mlp.gate", "mlp.gate.e_score_correction_bias"]
    assert torch.equal(found, dense(*choose(x.float() @ weight.float().t(), routing, correction), 8))
    assert not torch.equal(found, dense(*choose((x @ weight.t()).float(), routing, correction), 8))


# ---- against the library ----


def library_router(module, name, weight, **config):
    library = pytest.importorskip(f"transformers.models.{module}", reason="the transformers library is not installed: nothing to compare with")
    del library
    from importlib import import_module

    keys = {"num_experts_per_tok": 3, "num_experts": 12, "num_local_experts": 12, "hidden_size": 12, "norm_topk_prob": False, **config}
    router = getattr(import_module(f"transformers.models.{module}.modeling_{module}"), name)(SimpleNamespace(**keys))
    router.weight.data = weight
    return router


@pytest.mark.parametrize("levels", [0, 4], ids=["distinct", "with-ties"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("module", "name"), [("qwen2_moe", "Qwen2MoeTopKRouter"), ("qwen3_moe", "Qwen3MoeTopKRouter"), ("olmoe", "OlmoeTopKRouter"), ("mixtral", "MixtralTopKRouter")])
def test_softmax_routing_is_that_of_the_library(module, name, normalize, levels):
    scores = scores_of(levels)
    _, weight, chosen = library_router(module, name, torch.eye(12), norm_topk_prob=normalize)(scores)
    routing = Routing(12, 3, normalize=normalize or module == "mixtral")
    assert torch.equal(dense(*choose(scores, routing), 12), dense(weight, chosen, 12))


@pytest.mark.parametrize("levels", [0, 4], ids=["distinct", "with-ties"])
@pytest.mark.parametrize(("groups", "kept", "per_token"), [(1, 1, 3), (4, 2, 3), (4, 2, 8), (3, 3, 5), (6, 1, 4)])
def test_routing_in_groups_is_that_of_the_library(groups, kept, per_token, levels):
    scores = scores_of(levels)
    keys = {"n_group": groups, "topk_group": kept, "num_experts_per_tok": per_token, "routed_scaling_factor": 1.6}
    method = "greedy" if groups == 1 else "group_limited_greedy"
    _, weight, chosen = library_router("deepseek_v2", "DeepseekV2TopkRouter", torch.eye(12), topk_method=method, **keys)(scores)
    own = Routing(12, per_token, normalize=False, groups=groups, kept_groups=kept, scale=1.6, wide=True, wide_weights=True)
    assert torch.equal(dense(*choose(scores, own), 12), dense(weight, chosen, 12))
    correction = scores_of(levels)[:1].flatten() * 0.2
    for normalize in (False, True):
        for module, name in (("deepseek_v3", "DeepseekV3TopkRouter"), ("glm4_moe", "Glm4MoeTopkRouter")):
            router = library_router(module, name, torch.eye(12), norm_topk_prob=normalize, **keys)
            router.e_score_correction_bias.data = correction
            _, weight, chosen = router(scores)
            own = Routing(12, per_token, normalize, sigmoid=True, groups=groups, kept_groups=kept, group_score="two best", corrected=True, scale=1.6, wide_weights=True)
            # chosen experts are the same to the last; the order in which their weights are summed may differ
            assert torch.allclose(dense(*choose(scores, own, correction), 12), dense(weight, chosen, 12), rtol=1e-6, atol=0)


def scores_of(levels):
    """Scores of 200 tokens for 12 experts; of few levels, many are equal."""
    scores = torch.randn(200, 12, generator=torch.Generator().manual_seed(2))
    return (scores * levels / 2).round() / levels if levels else scores


# ---- what lies beside the experts ----


@pytest.mark.parametrize("gated", [False, True])
def test_shared_expert_is_added_for_every_token(gated):
    layer = SparseMLP.__new__(SparseMLP)
    torch.nn.Module.__init__(layer)
    layer.router, layer.experts = lambda x: (None, None), lambda x, weight, chosen: 10 * x
    layer.shared = lambda x: 2 * x
    layer.shared_gate = (lambda x: x.sum(-1, keepdim=True)) if gated else None
    x = torch.tensor([[1.0, -1.0], [2.0, 1.0]])
    part = torch.tensor([[0.5], [torch.tensor(3.0).sigmoid()]]) if gated else 1.0
    assert torch.allclose(layer(x), 10 * x + part * 2 * x)


def test_shared_expert_says_what_scores_it():
    assert SharedExpert("shared_experts", 48).gate == "" and SharedExpert("shared_expert", 48, "shared_expert_gate").gate
