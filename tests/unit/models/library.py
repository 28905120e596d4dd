"""The transformers library's own modelling code on the state dicts of these tests, and comparisons with it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitgrain
from bitgrain.models.batch import Batch, Segment
from tests.unit.models.fake_builder import build
from tests.unit.models.tiny_models import random_tensors

transformers = pytest.importorskip("transformers", reason="the transformers library is not installed: nothing to compare with")

TOKENS = 40


def ids_of(count: int = TOKENS, seed: int = 1) -> Tensor:
    return torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(seed))


def library_model(config: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Any:
    """The library's model of a config.json, float32, with attention written out; its own random weights without `tensors`."""
    model_class = getattr(transformers, config["architectures"][0])
    parsed = model_class.config_class.from_dict(deepcopy(dict(config)))  # the library adds to what it is given
    parsed._attn_implementation = "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = model_class(parsed).float().eval()
    if tensors is not None:
        tied = {"lm_head.weight": tensors["model.embed_tokens.weight"]} if "lm_head.weight" not in tensors else {}
        model.load_state_dict({**tensors, **tied}, strict=True)
    return model


def library_logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids[None]).logits[0].float()


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest logit."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def assert_agrees(config: Mapping[str, Any], seed: int = 3) -> None:
    """Logits of a tiny random model against the library's, float32."""
    tensors = random_tensors(config, seed=seed)
    found = build(config, tensors).logits(ids_of())
    assert found.dtype is torch.float32
    assert distance(found, library_logits(library_model(config, tensors), ids_of())) < 1e-5


def assert_matters(config: Mapping[str, Any], **change: Any) -> None:
    """Other values of these keys give other logits of the same weights: the comparison with the library can see them."""
    tensors = random_tensors(config, seed=3)
    one, other = (build(c, tensors).logits(ids_of()) for c in (config, {**config, **change}))
    assert distance(one, other) > 1e-3


def assert_agrees_in_bfloat16(config: Mapping[str, Any], bound: float = 0.02) -> None:
    """Both round at the same places: their mean difference is a small part of the logits' spread."""
    tensors = random_tensors(config, seed=3)
    expected = library_logits(library_model(config, tensors).bfloat16(), ids_of())
    found = build(config, tensors, dtype=torch.bfloat16).logits(ids_of())
    assert float((found - expected).abs().mean()) < bound * float(expected.std())


def assert_saved_model_agrees(folder: Path, config: Mapping[str, Any]) -> Any:
    """A checkpoint as the library writes it; returns what is opened."""
    model = library_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            elif "embed" not in name:
                parameter.mul_(4)
    model.save_pretrained(folder)
    loaded = bitgrain.load_model(folder, device="cpu", dtype=torch.float32)
    assert distance(loaded.logits(ids_of()), library_logits(model, ids_of())) < 1e-5
    return bitgrain.open_checkpoint(folder)


def assert_steps_agree(config: Mapping[str, Any]) -> None:
    """A prompt in pieces and single tokens through the cache, beside another sequence, against the whole at once."""
    model = build(config, random_tensors(config, seed=3))
    ids, beside = ids_of(24), ids_of(24, seed=2)
    whole = model.logits(ids)
    for sizes in ([1] * 24, [15] + [1] * 9, [3, 8, 13]):
        caches = model.new_cache(TOKENS), model.new_cache(TOKENS)
        pieces = [_step(model, list(zip(caches, parts, strict=True))) for parts in zip(ids.split(sizes), beside.split(sizes), strict=True)]
        assert distance(torch.cat(pieces), whole) < 1e-5


def _step(model: Any, parts: list[tuple[Any, Tensor]]) -> Tensor:
    """Logits of the first sequence's new tokens."""
    segments, positions, start = [], [], 0
    for cache, ids in parts:
        segments.append(Segment(cache, start, len(ids)))
        positions += range(cache.length, cache.length + len(ids))
        start += len(ids)
    tokens = torch.cat([ids for _, ids in parts])
    return model(Batch(tokens, torch.tensor(positions), tuple(segments), torch.arange(len(parts[0][1]))))
