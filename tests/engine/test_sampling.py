import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.engine.sampler import Sampled, SamplerState, sample
from bitgrain.engine.sampling import SamplingParams
from bitgrain.engine.stop_strings import StopMatcher
from bitgrain.errors import RequestError, RunError

LOGITS = torch.tensor([[1.0, 3.0, 2.0, 0.0, -1.0]])


def draws(count=400, logits=LOGITS, **params):
    state = SamplerState(SamplingParams(seed=0, **params), prompt=())
    return [sample(logits, [state])[0].token_id for _ in range(count)]


def test_defaults_are_the_documented_ones():
    params = SamplingParams()
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.stop) == (128, 1.0, 1.0, 0, ())


def test_one_string_is_a_list_of_one_and_minus_one_is_off():
    params = SamplingParams(stop="x", top_k=-1)
    assert (params.stop, params.top_k) == (("x",), 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", True), ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf),
        ("temperature", "1"), ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("top_k", 1.0), ("min_p", 1.5), ("seed", 1.0), ("seed", 2**63),
        ("stop", ""), ("stop", [1]), ("stop", {"a": 1}), ("stop_token_ids", [-1]), ("stop_token_ids", ["a"]), ("ignore_eos", 1), ("logprobs", -1),
        ("logprobs", 10**6), ("frequency_penalty", 3), ("presence_penalty", None), ("repetition_penalty", 0), ("n", 0),
    ],
)  # fmt: skip
def test_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


def test_all_problems_are_reported_together():
    with pytest.raises(RequestError) as caught:
        SamplingParams(temperature=-1, top_p=2, n=0)
    assert caught.value.where == "sampling parameters: temperature, top_p, n"


def test_temperature_zero_takes_the_largest():
    assert set(draws(5, temperature=0)) == {1}


def test_top_k_leaves_the_largest_k():
    assert set(draws(top_k=2)) == {1, 2}


def test_top_p_keeps_a_token_while_the_mass_before_it_is_below():
    mass = torch.softmax(LOGITS[0], 0).sort(descending=True).values.cumsum(0)
    assert set(draws(top_p=float(mass[0]) - 0.01)) == {1}
    assert set(draws(top_p=float(mass[0]) + 0.01)) == {1, 2}


def test_min_p_is_relative_to_the_most_probable():
    assert set(draws(min_p=math.exp(-1) - 0.01)) == {1, 2}
    assert set(draws(min_p=1.0)) == {1}


def test_frequencies_follow_the_softmax():
    counts = torch.bincount(torch.tensor(draws(4000)), minlength=5) / 4000
    assert torch.allclose(counts, torch.softmax(LOGITS[0], 0), atol=0.03)


@pytest.mark.parametrize("temperature", [1e-30, 1e-310])
def test_tiny_temperature_does_not_overflow(temperature):
    assert set(draws(20, temperature=temperature)) == {1}


@pytest.mark.parametrize(("uniform", "drawn"), [(0.0, 1), (1.0, 3)])
def test_zero_probability_is_never_drawn_even_at_the_ends(uniform, drawn, monkeypatch):
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    assert set(draws(logits=logits)) == {1, 3}
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(uniform, dtype=torch.float64))
    assert set(draws(1, logits=logits)) == {drawn}


@pytest.mark.parametrize("penalty", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 4.0}])
def test_penalty_moves_greedy_choice_away_from_what_was_generated(penalty):
    state = SamplerState(SamplingParams(temperature=0, **penalty), prompt=())
    assert [sample(LOGITS, [state])[0].token_id for _ in range(2)] == [1, 2]


def test_repetition_penalty_counts_the_prompt():
    state = SamplerState(SamplingParams(temperature=0, repetition_penalty=4.0), prompt=(1,))
    assert sample(LOGITS, [state])[0].token_id == 2


def test_logprobs_are_those_of_the_model_itself():
    state = SamplerState(SamplingParams(temperature=0, logprobs=2, presence_penalty=2.0), prompt=())
    expected = torch.log_softmax(LOGITS[0], 0)
    got = sample(LOGITS, [state])[0].logprob
    assert got.logprob == pytest.approx(float(expected[1]))
    assert [i for i, _ in got.top] == [1, 2] and got.top[1][1] == pytest.approx(float(expected[2]))


def test_row_with_nan_fails_alone():
    logits = torch.stack([LOGITS[0], torch.full((5,), math.nan), torch.full((5,), math.inf)])
    states = [SamplerState(SamplingParams(temperature=t), ()) for t in (0, 0, 1)]
    good, bad, infinite = sample(logits, states)
    assert isinstance(good, Sampled) and isinstance(bad, RunError) and isinstance(infinite, RunError)


def test_seeded_row_does_not_depend_on_its_neighbours():
    alone = SamplerState(SamplingParams(seed=5), ())
    together = [SamplerState(SamplingParams(seed=s), ()) for s in (1, 5, 9)]
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    for _ in range(10):
        assert sample(logits[1:2], [alone])[0].token_id == sample(logits, together)[1].token_id


@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 12), max_size=4),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_cut_alike_wherever_pieces_are_cut(text, stops, cuts):
    def run(pieces):
        matcher, shown = StopMatcher(tuple(stops)), ""
        for piece in pieces:
            more, stop = matcher.push(piece)
            shown += more
            if stop:
                return shown, stop
        return shown + matcher.flush(), None

    edges = sorted({0, len(text), *(min(c, len(text)) for c in cuts)})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    shown, stop = run(pieces)
    assert (shown, stop) == run(list(text)) == run([text])
    assert not any(s in shown for s in stops)
    assert text.startswith(shown + (stop or ""))


def test_stop_string_beginning_is_held_back():
    matcher = StopMatcher(("END",))
    assert matcher.push("the E") == ("the ", None)
    assert matcher.push("N") == ("", None)
    assert matcher.push("T") == ("ENT", None)


def test_suggested_values_come_from_the_checkpoint_and_do_sample_false_is_greedy():
    from bitgrain.engine.sampling import suggested_by

    assert suggested_by({}) == {}
    assert suggested_by({"temperature": 0.6, "top_k": 20, "eos_token_id": 2}) == {"temperature": 0.6, "top_k": 20}
    assert suggested_by({"do_sample": False, "temperature": 0.6, "top_p": 0.9}) == {"temperature": 0.0}
    with pytest.raises(RequestError, match="top_p"):
        suggested_by({"top_p": 7})
