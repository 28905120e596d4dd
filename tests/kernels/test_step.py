"""Norms, rotary embedding, gates and attention of few rows: native ones against plain torch, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from bitgrain.kernels.base import StepProblem
from bitgrain.kernels.cpu import library
from bitgrain.kernels.cpu.step import FEW_ROWS, LARGEST_HEAD, NativeAttention, NativeGate, NativeNorm, NativeRotary
from bitgrain.kernels.reference.attention import ReferenceAttention
from bitgrain.kernels.reference.step import ReferenceNorm, ReferenceRotary
from bitgrain.layers.activation import Gated

pytestmark = pytest.mark.skipif(bool(library.missing()), reason=library.missing() or "the native library is there")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(params=library.available_sets() or ["none"], autouse=True)
def instruction_set(request):
    before = library.instruction_set()
    library.choose_instruction_set(request.param)
    yield request.param
    library.choose_instruction_set(before)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, size", [(1, 64), (3, 255), (2, 2048), (130, 1000), (0, 16)])
@pytest.mark.parametrize("wide", [False, True])
def test_norm_is_torchs(dtype, rows, size, wide):
    x, weight, bias = random(rows, size, dtype=dtype) * 3, random(size, dtype=dtype, seed=1), random(size, dtype=dtype, seed=2)
    for b in (None, bias):
        for w in (weight, weight.float()) if wide else (weight,):
            found, wanted = NativeNorm().apply(x, w, b, 1e-5, wide), ReferenceNorm().apply(x, w, b, 1e-5, wide)
            assert found.dtype == dtype and found.shape == x.shape
            # the sum of squares is added in another order: an ulp may differ where a rounding was close
            assert torch.allclose(found.float(), wanted.float(), rtol=2 * ROUNDING[dtype], atol=2 * ROUNDING[dtype])
            assert not rows or dtype is torch.float32 or float((found == wanted).float().mean()) > 0.99


def test_norm_of_rows_that_lie_apart():
    wide = random(4, 300)
    x, weight = wide[:, 40:168], random(128, seed=1)
    assert torch.allclose(NativeNorm().apply(x, weight, None, 1e-6, False), ReferenceNorm().apply(x, weight, None, 1e-6, False), atol=1e-6)
    heads = random(4, 3, 64).transpose(0, 1)  # [3, 4, 64], no view as rows
    assert torch.allclose(NativeNorm().apply(heads, weight[:64], None, 1e-6, False), ReferenceNorm().apply(heads, weight[:64], None, 1e-6, False), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads, size, turned", [(1, 64, 64), (5, 128, 32), (3, 6, 6), (2, LARGEST_HEAD, 512)])
def test_rotary_is_torchs_to_the_bit(dtype, interleaved, heads, size, turned):
    wide = random(7, heads * size + 24, dtype=dtype)
    x = wide[:, 8 : 8 + heads * size].unflatten(1, (heads, size))
    cosine, sine = random(7, 1, turned, dtype=dtype, seed=1), random(7, 1, turned, dtype=dtype, seed=2)
    assert torch.equal(NativeRotary().apply(x, cosine, sine, interleaved), ReferenceRotary().apply(x, cosine, sine, interleaved))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_is_torchs(dtype):
    both = random(5, 1200, dtype=dtype) * 6
    gate, up = both.split(600, dim=1)
    gate = torch.cat((gate, torch.tensor([[-200.0], [200.0], [0.0], [-88.5], [1e-6]]).to(dtype)), dim=1)
    up = torch.cat((up, torch.ones(5, 1, dtype=dtype)), dim=1)
    found, wanted = NativeGate().apply(Gated("silu"), gate, up), Gated("silu")(gate, up)
    assert torch.allclose(found.float(), wanted.float(), rtol=2 * ROUNDING[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("sinks, cap", [(False, None), (True, None), (False, 3.0)])
@pytest.mark.parametrize("rows, total, heads, groups, size", [(1, 1, 4, 4, 16), (1, 37, 8, 2, 64), (3, 40, 6, 3, 24), (FEW_ROWS, 300, 4, 1, 96), (2, 9, 4, 2, 2 * LARGEST_HEAD + 5)])
def test_attention_is_the_softmax(dtype, window, sinks, cap, rows, total, heads, groups, size):
    q, keys, values = random(rows, heads, size, dtype=dtype), random(total, groups, size, dtype=dtype, seed=1), random(total, groups, size, dtype=dtype, seed=2)
    sink = random(heads, dtype=dtype, seed=3) if sinks else None
    found = NativeAttention().apply(q, keys, values, window, sink, None, cap)
    wanted = plain_attention(q, keys, values, window, sink, size**-0.5, cap)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), wanted, atol=4 * ROUNDING[dtype], rtol=4 * ROUNDING[dtype])


def plain_attention(q, keys, values, window, sinks, scale, cap):
    """By definition, in float64."""
    q, keys, values = q.double(), *(x.double().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (keys, values))
    scores = torch.einsum("thd,lhd->htl", q, keys) * scale
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    behind = torch.arange(len(keys) - len(q), len(keys))[:, None] - torch.arange(len(keys))
    scores = scores.masked_fill((behind < 0) | (behind >= (window or len(keys))), -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, len(q), 1)), dim=2)
    return torch.einsum("htl,lhd->thd", torch.softmax(scores, dim=2)[..., : len(keys)], values)


def test_attention_reads_caches_that_lie_apart_and_values_of_another_size():
    store = random(20, 2, 80)
    keys, values = store[..., :48], random(20, 2, 32, seed=1)
    q = random(2, 4, 48, seed=2)
    found = NativeAttention().apply(q, keys, values, None, None, 0.3, None)
    assert torch.allclose(found.double(), plain_attention(q, keys, values, None, None, 0.3, None), atol=1e-5)


def test_many_rows_go_to_torch(monkeypatch):
    asked = []
    monkeypatch.setattr(ReferenceAttention, "apply", lambda self, q, *rest: asked.append(len(q)) or q)
    for rows in (FEW_ROWS, FEW_ROWS + 1):
        NativeAttention().apply(random(rows, 2, 8), random(20, 2, 8), random(20, 2, 8), None, None, None, None)
    assert asked == [FEW_ROWS + 1]


def test_results_do_not_depend_on_threads():
    q, keys, values = random(2, 8, 64), random(3000, 4, 64, seed=1), random(3000, 4, 64, seed=2)
    x, weight = random(300, 512), random(512, seed=1)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append((NativeAttention().apply(q, keys, values, None, None, None, None), NativeNorm().apply(x, weight, None, 1e-5, False)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kernel, problem, words", [
    (NativeRotary(), StepProblem("rotary", LARGEST_HEAD + 1, "float32"), "heads"),
    (NativeGate(), StepProblem("gate", 64, "float32", "gelu"), "gelu"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(kernel, problem, words):
    assert words in kernel.refusal(problem).reason


def test_attention_takes_heads_of_every_size():
    assert NativeAttention().refusal(StepProblem("attention", 64 * LARGEST_HEAD, "bfloat16")) is None
