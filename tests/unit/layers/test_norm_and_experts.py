"""Normalization by hand, and routing."""

import pytest
import torch

from bitgrain.layers.activation import ACTIVATIONS, ClampedGate, Gated
from bitgrain.layers.experts import LinearExperts
from bitgrain.layers.norm import RMSNorm
from bitgrain.layers.routing import Routing, choose


def test_norm_divides_by_the_root_mean_square():
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    found = RMSNorm(torch.tensor([1.0, 2.0]), 0.5)(x)
    assert torch.allclose(found, torch.tensor([[3.0 / 13**0.5, -8.0 / 13**0.5], [0.0, 0.0]]))


def test_norm_rounds_before_the_weight_is_applied():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.full((64,), 1.2).bfloat16()
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    found = RMSNorm(weight, 1e-6)(x)
    assert torch.equal(found, wide.bfloat16() * weight)
    assert not torch.equal(found, (wide * weight.float()).bfloat16())


@pytest.mark.parametrize(
    ("name", "value"), [("silu", 0.7310586), ("swish", 0.7310586), ("gelu", 0.8413447), ("gelu_pytorch_tanh", 0.841192), ("relu", 1.0)]
)
def test_activations_at_one(name, value):
    assert float(ACTIVATIONS[name](torch.tensor(1.0))) == pytest.approx(value, abs=1e-6)


def test_wide_norm_rounds_after_the_weight_is_applied():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.full((64,), 1.2).bfloat16()
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(RMSNorm(weight, 1e-6, wide=True)(x), (wide * weight.float()).bfloat16())


def test_gate_multiplies_the_activation_and_up():
    gate, up = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 3.0])
    assert torch.allclose(Gated("silu")(gate, up), torch.tensor([2 * 0.7310586, -3 * 0.2689414]))


def test_clamped_gate_by_hand():
    gate, up = torch.tensor([1.0, 9.0, -9.0, 0.5]), torch.tensor([2.0, 9.0, -9.0, -1.0])
    sigmoid = lambda v: 1 / (1 + torch.exp(torch.tensor(-v)))  # noqa: E731
    want = [3 * sigmoid(1.702), 8 * 7 * sigmoid(7 * 1.702), -6 * -9 * sigmoid(-9 * 1.702), 0.0]
    assert torch.allclose(ClampedGate(1.702, 7.0)(gate, up), torch.stack([torch.as_tensor(w) for w in want]))


class Doubling(torch.nn.Module):
    """An expert that multiplies by a number of its own, and counts the rows that it gets."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.rows = factor, 0

    def forward(self, x):
        self.rows += len(x)
        return x * self.factor


def mixture(count):
    return LinearExperts({i: Doubling(10.0**i) for i in range(count)})


def test_tokens_go_to_their_best_experts_with_softmax_weights():
    scores = torch.log(torch.tensor([[0.5, 0.1, 0.4], [0.1, 0.7, 0.2]]))
    layer, x = mixture(3), torch.ones(2, 4)
    weight, chosen = choose(scores, Routing(3, 2, normalize=False))
    assert torch.allclose(layer(x, weight, chosen), torch.tensor([[0.5 + 40.0], [7.0 + 20.0]]).expand(2, 4))
    assert [e.rows for e in layer.experts] == [1, 1, 2]


def test_normalized_weights_sum_to_one():
    scores = torch.log(torch.tensor([[0.5, 0.1, 0.4]]))
    weight, chosen = choose(scores, Routing(3, 2, normalize=True))
    assert torch.allclose(weight, torch.tensor([[5 / 9, 4 / 9]])) and chosen.tolist() == [[0, 2]]


def test_softmax_over_the_chosen_scores():
    scores = torch.log(torch.tensor([[0.5, 0.1, 0.4], [0.1, 0.7, 0.2]])) + 3
    weight, chosen = choose(scores, Routing(3, 2, normalize=False, over_chosen=True))
    assert torch.allclose(weight, torch.tensor([[5 / 9, 4 / 9], [7 / 9, 2 / 9]])) and chosen.tolist() == [[0, 2], [1, 2]]


def test_softmax_of_the_router_is_float32():
    scores = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight, chosen = choose(scores, Routing(8, 2, normalize=True))
    best = torch.softmax(scores.float(), -1).topk(2, -1)
    assert torch.equal(weight, (best.values / best.values.sum(-1, keepdim=True)).bfloat16())
    assert torch.equal(chosen, best.indices)


def test_expert_without_tokens_does_not_run():
    layer = mixture(3)
    layer(torch.ones(1, 4), *choose(torch.tensor([[5.0, -9.0, 4.0]]), Routing(3, 2, normalize=True)))
    assert layer.experts[1].rows == 0
