"""Forward passes: caches, ragged batches, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitgrain.errors import PromptTooLongError, RequestError
from bitgrain.kvcache.spec import KVCacheSpec
from bitgrain.models.batch import Batch, Segment
from tests.unit.models.fake_builder import build, row_by_row
from tests.unit.models.tiny_models import FAMILIES, LLAMA, MISTRAL, QWEN3_MOE, random_tensors

# torch computes the last elements of a tensor, those that do not fill a vector register, by other instructions than the rest;
# sizes that are multiples of 32 leave none, so that results can be compared to the bit.
EVEN = {"intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 32}

FIXTURES = Path(__file__).resolve().parents[4] / "shared" / "fixtures"


def ids_of(count, seed=0):
    return torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(seed))


def batch_of(parts):
    """A batch of (cache, ids) pairs that asks for the logits of every row."""
    tokens, positions, segments = [], [], []
    for cache, ids in parts:
        segments.append(Segment(cache, len(tokens), len(ids)))
        positions += range(cache.length, cache.length + len(ids))
        tokens += ids.tolist()
    return Batch(torch.tensor(tokens), torch.tensor(positions), tuple(segments), torch.arange(len(tokens)))


def in_steps(model, ids, sizes, max_tokens=None):
    cache = model.new_cache(max_tokens or len(ids))
    return torch.cat([model(batch_of([(cache, part)])) for part in ids.split(sizes)])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("sizes", [[1] * 20, [13, 1, 1, 5], [3, 8, 9]], ids=["one-by-one", "prompt-then-steps", "chunks"])
def test_steps_through_the_cache_equal_the_whole(name, sizes):
    model = build(FAMILIES[name], random_tensors(FAMILIES[name]))
    ids = ids_of(20)
    whole = model.logits(ids)
    assert (in_steps(model, ids, sizes) - whole).abs().max() < 3e-5 * whole.std()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_length_does_not_depend_on_chunks(kind):
    sections = {
        "dynamic": {"rope_type": "dynamic", "factor": 2.0},
        "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 8},
    }
    config = {**LLAMA, "max_position_embeddings": 64 if kind == "longrope" else 12, "rope_scaling": sections[kind]}
    model = build(config, random_tensors(config))
    ids = ids_of(20)
    whole = model.logits(ids)
    assert (in_steps(model, ids, [4, 4, 1, 11]) - whole).abs().max() < 3e-5 * whole.std()
    assert not torch.allclose(in_steps(model, ids[:6], [6]), whole[:6], atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("cache", [KVCacheSpec(), KVCacheSpec("int8", source="computed")], ids=["16-bit", "int8"])
def test_mixed_batch_equals_separate_runs_bit_for_bit(name, cache):
    config = {**FAMILIES[name], **EVEN}
    model = build(config, random_tensors(config), product=row_by_row, cache=cache)
    texts = [ids_of(n, seed=n) for n in (15, 9, 12, 1)]
    done = [14, 0, 5, 0]  # a single token, a whole prompt, a later part of one, a prompt of one token
    alone, together = [], []
    for results in (alone, together):
        caches = [model.new_cache(16) for _ in texts]
        for held, ids, count in zip(caches, texts, done, strict=True):
            if count:
                model(batch_of([(held, ids[:count])]))
        parts = [(held, ids[count:]) for held, ids, count in zip(caches, texts, done, strict=True)]
        results += [model(batch_of([part])) for part in parts] if results is alone else [model(batch_of(parts))]
    assert torch.equal(torch.cat(alone), together[0])


def test_only_rows_asked_for_are_returned_in_their_order():
    model = build(LLAMA, random_tensors(LLAMA), product=row_by_row)
    batch = batch_of([(model.new_cache(8), ids_of(5)), (model.new_cache(8), ids_of(3, 1))])
    whole = model(batch)
    again = batch_of([(model.new_cache(8), ids_of(5)), (model.new_cache(8), ids_of(3, 1))])
    assert torch.equal(model(replace(again, logit_rows=torch.tensor([7, 4]))), whole[[7, 4]])
    none = batch_of([(model.new_cache(8), ids_of(5))])
    assert model(replace(none, logit_rows=torch.tensor([], dtype=torch.int64))).shape == (0, 96)


def test_tokens_before_the_window_have_no_influence():
    one_layer = {**MISTRAL, "num_hidden_layers": 1}
    model = build(one_layer, random_tensors(one_layer), product=row_by_row)
    ids = ids_of(20)
    other = ids.clone()
    other[:13] = (ids[:13] + 1) % 96  # the last token sees 7 tokens: 13 to 19
    inside = ids.clone()
    inside[13] = (ids[13] + 1) % 96
    last = model.logits(ids)[-1]
    assert torch.equal(model.logits(other)[-1], last)
    assert not torch.equal(model.logits(inside)[-1], last)
    # step by step, where past keys are cut off before the product
    assert torch.allclose(in_steps(model, other, [1] * 20)[-1], last, atol=1e-4)


def test_truncated_cache_continues_as_if_the_rest_had_never_been():
    model = build(LLAMA, random_tensors(LLAMA))
    cache = model.new_cache(32)
    model(batch_of([(cache, ids_of(12))]))
    cache.truncate(7)
    again = model(batch_of([(cache, ids_of(4, 5))]))
    fresh = model.new_cache(32)
    model(batch_of([(fresh, ids_of(12)[:7])]))
    expected = model(batch_of([(fresh, ids_of(4, 5))]))
    assert (again - expected).abs().max() < 3e-5 * expected.std()


def test_step_that_failed_half_way_leaves_a_cache_that_can_go_on():
    model = build(LLAMA, random_tensors(LLAMA), product=row_by_row)
    cache = model.new_cache(32)
    model(batch_of([(cache, ids_of(5))]))
    mlp, model.layers[0].mlp = model.layers[0].mlp, torch.nn.Identity()
    model.layers[0].mlp.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(batch_of([(cache, ids_of(3, 1))]))
    model.layers[0].mlp = mlp
    found = model(batch_of([(cache, ids_of(3, 1))]))
    assert torch.equal(found, in_steps(model, torch.cat([ids_of(5), ids_of(3, 1)]), [5, 3])[5:])


def test_experts_of_a_token_do_not_depend_on_other_tokens():
    config = {**QWEN3_MOE, **EVEN}
    model = build(config, random_tensors(config), product=row_by_row)
    mlp = model.layers[0].mlp
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        assert torch.equal(mlp(x)[11:14], mlp(x[11:14]))


# ---- what is refused ----


@pytest.fixture(scope="module")
def model():
    return build(LLAMA, random_tensors(LLAMA))


@pytest.mark.parametrize(
    "ids",
    [torch.tensor([], dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64), torch.tensor([1.0, 2.0]), torch.tensor([True]), torch.tensor([96]), torch.tensor([3, -1])],
    ids=["empty", "two-dimensional", "float", "bool", "beyond-vocabulary", "negative"],
)  # fmt: skip
def test_logits_of_ids_that_are_none_are_refused(model, ids):
    with pytest.raises(RequestError):
        model.logits(ids)


def test_prompt_longer_than_the_context_is_refused(model):
    assert model.logits(ids_of(64)).shape == (64, 96)
    with pytest.raises(PromptTooLongError, match="65 tokens"):
        model.logits(ids_of(65))
    with pytest.raises(PromptTooLongError):
        model.new_cache(65)


def test_context_can_be_lowered_and_not_raised():
    model = build(LLAMA, random_tensors(LLAMA))
    model.limit_context(10)
    with pytest.raises(PromptTooLongError):
        model.logits(ids_of(11))
    for wrong in (0, 65):
        with pytest.raises(RequestError, match="context_length"):
            model.limit_context(wrong)


def test_batch_that_contradicts_itself_is_refused(model):
    def good():
        return batch_of([(model.new_cache(8), ids_of(3)), (model.new_cache(8), ids_of(2))])

    first, second = good().segments
    rows = torch.tensor
    wrong = {
        "positions": replace(good(), positions=rows([0, 1, 3, 0, 1])),
        "gap": replace(good(), segments=(first, replace(second, start=4))),
        "uncovered": replace(good(), segments=(first,)),
        "twice": replace(good(), segments=(first, replace(second, cache=first.cache))),
        "rows": replace(good(), logit_rows=rows([5])),
        "room": batch_of([(model.new_cache(2), ids_of(3))]),
    }
    for name, batch in wrong.items():
        with pytest.raises(RequestError, match="batch"):
            model(batch)
            pytest.fail(name)
    model(good())


# ---- golden ----


def test_logits_of_a_stored_checkpoint_match_its_producer():
    folder = FIXTURES / "base-llama-tiny"
    if not folder.is_dir():
        pytest.skip("the folder of fixtures is not next to the repository")
    from safetensors.torch import load_file

    case = json.loads((folder / "case.json").read_text())
    golden = load_file(folder / "golden.safetensors")
    tolerance = next(c["atol"] for c in case["checks"] if c["type"] == "logits")
    model = build(json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors"))
    found = model.logits(golden["input_ids"])
    assert (found - golden["logits/none"]).abs().max() <= tolerance
