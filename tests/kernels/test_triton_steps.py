"""Norms, rotary embedding, gates and attention in Triton against plain torch: interpreter only, not run on hardware."""

import pytest
import torch

from bitgrain.kernels.base import StepProblem
from bitgrain.kernels.reference.step import ReferenceGate, ReferenceNorm, ReferenceRotary
from bitgrain.kernels.triton import availability, step
from bitgrain.kernels.triton.step import LARGEST_HEAD, TritonAttention, TritonGate, TritonNorm, TritonRotary
from bitgrain.numerics.gates import ClampedGate, Gated

pytestmark = pytest.mark.skipif(bool(availability.missing("")), reason=availability.missing("") or "present")
NORM, ROTARY, GATE, ATTENTION = (kind("cuda") for kind in (TritonNorm, TritonRotary, TritonGate, TritonAttention))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# one rounding to the type; float32: sums in another order
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def named(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("wide", [False, True])
def test_norm_is_torchs(dtype, wide):
    for rows, size in ((1, 64), (3, 255), (2, 4100), (0, 16)):
        x, weight, bias = random(rows, size, dtype=dtype) * 3, random(size, dtype=dtype, seed=1), random(size, dtype=dtype, seed=2)
        for b, w in ((None, weight), (bias, weight.float() if wide else weight)):
            found, wanted = NORM.apply(x, w, b, 1e-5, wide), ReferenceNorm().apply(x, w, b, 1e-5, wide)
            assert found.dtype == dtype and found.shape == x.shape
            assert torch.allclose(found.float(), wanted.float(), rtol=2 * ROUNDING[dtype], atol=2 * ROUNDING[dtype])
            assert not rows or dtype is torch.float32 or float((found == wanted).float().mean()) > 0.99


def test_norm_of_rows_that_lie_apart():
    wide, weight = random(4, 300), random(128, seed=1)
    assert torch.allclose(NORM.apply(wide[:, 40:168], weight, None, 1e-6, False), ReferenceNorm().apply(wide[:, 40:168], weight, None, 1e-6, False), atol=2e-6)
    heads = random(4, 3, 64).transpose(0, 1)  # no view as rows
    assert torch.allclose(NORM.apply(heads, weight[:64], None, 1e-6, False), ReferenceNorm().apply(heads, weight[:64], None, 1e-6, False), atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "size", "turned"), [(1, 64, 64), (5, 128, 32), (3, 6, 6), (9, 40, 24)])
def test_rotary_is_torchs_to_the_bit(dtype, interleaved, heads, size, turned):
    x = random(3, heads * size + 24, dtype=dtype)[:, 8 : 8 + heads * size].unflatten(1, (heads, size))
    angles = random(3, 1, turned, seed=1) * 9
    for kind in {dtype, torch.float32}:
        cosine, sine = angles.cos().to(kind), angles.sin().to(kind)
        assert torch.equal(ROTARY.apply(x, cosine, sine, interleaved), ReferenceRotary().apply(x, cosine, sine, interleaved))


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("join", [Gated("silu"), Gated("gelu"), Gated("gelu_pytorch_tanh"), Gated("relu"), ClampedGate(1.702, 7.0)], ids=lambda j: j.describe())
def test_gate_is_torchs(dtype, join):
    assert GATE.refusal(StepProblem("gate", 0, named(dtype), join.describe())) is None
    both = random(5, 150, dtype=dtype) * 4
    for gate, up in (both.chunk(2, dim=1), (both[:, :75].contiguous(), random(5, 75, dtype=dtype)), (both[:0, :75], both[:0, 75:])):
        found, wanted = GATE.apply(join, gate, up), ReferenceGate().apply(join, gate, up)
        assert found.dtype == dtype and torch.allclose(found.float(), wanted.float(), rtol=2 * ROUNDING[dtype], atol=ROUNDING[dtype])
        # far below zero torch's tanh is -1, and the true value is not
        large = wanted.abs() > 1e-3
        assert not large.any() or dtype is torch.float32 or float((found == wanted)[large].float().mean()) > 0.95


def test_what_they_do_not_take_is_refused():
    assert "not squared_relu" in GATE.refusal(StepProblem("gate", 0, "float32", "squared_relu")).reason
    for kernel in (ROTARY, ATTENTION):
        assert "heads of up to" in kernel.refusal(StepProblem("attention", LARGEST_HEAD + 1, "float32")).reason


def attention_by_definition(q, keys, values, window, sinks, scale, cap):
    """[t, H, E], float64."""
    count, length, per = len(q), len(keys), q.shape[1] // keys.shape[1]
    wide_keys, wide_values = (part.double().repeat_interleave(per, dim=1) for part in (keys, values))
    scores = torch.einsum("thd,lhd->htl", q.double(), wide_keys) * (q.shape[2] ** -0.5 if scale is None else scale)
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    behind = torch.arange(length - count, length)[:, None] - torch.arange(length)
    hidden = (behind < 0) | (behind >= (length if window is None else window))
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, count, 1)), dim=-1)
    return torch.einsum("htl,lhe->the", scores.softmax(-1)[..., :length], wide_values)


# rows, keys, heads, heads of keys, D, E, window, sinks, scale, cap
ATTENTION_CASES = {
    "decode": (1, 70, 4, 2, 32, 32, None, False, None, None),
    "prefill": (37, 37, 4, 4, 16, 16, None, False, None, None),
    "chunked-prefill-odd-heads": (9, 83, 6, 2, 40, 40, None, False, 0.3, None),
    "other-values": (5, 20, 3, 1, 24, 18, None, False, None, None),
    "window": (20, 90, 2, 1, 16, 16, 13, False, None, None),
    "window-sinks": (3, 90, 4, 2, 16, 16, 70, True, None, None),
    "cap": (6, 50, 2, 2, 16, 16, None, False, 0.5, 20.0),
    "window-of-one": (4, 9, 2, 2, 16, 16, 1, True, None, None),
    "large-head": (2, 40, 2, 1, 300, 260, None, False, None, None),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention_agrees_with_the_definition(case, dtype):
    rows, length, heads, groups, size, value_size, window, sinks, scale, cap = ATTENTION_CASES[case]
    assert ATTENTION.refusal(StepProblem("attention", size, named(dtype))) is None
    q = random(rows, heads * size + 8, dtype=dtype)[:, : heads * size].unflatten(1, (heads, size))
    keys, values = random(length, groups, size, dtype=dtype, seed=1), random(groups, length, value_size, dtype=dtype, seed=2).transpose(0, 1)
    sunk = random(heads, dtype=dtype, seed=3) if sinks else None
    found = ATTENTION.apply(q, keys, values, window, sunk, scale, cap)
    wanted = attention_by_definition(q, keys, values, window, sunk, scale, cap)
    assert found.dtype == dtype and found.shape == (rows, heads, value_size)
    assert float((found.double() - wanted).abs().max()) <= ROUNDING[dtype] * float(wanted.abs().max())


@pytest.mark.parametrize("window", [None, 100])
def test_a_row_is_the_same_alone_and_among_others(monkeypatch, window):
    monkeypatch.setattr(step, "CHUNK", 64)
    monkeypatch.setattr(step, "FEW_ROWS", 2)
    q, keys, values, sinks = random(8, 4, 16), random(300, 2, 16, seed=1), random(300, 2, 16, seed=2), random(4, seed=3)
    together = ATTENTION.apply(q, keys, values, window, sinks, None, None)  # chunks one after the other
    wanted = attention_by_definition(q, keys, values, window, sinks, None, None)
    assert float((together.double() - wanted).abs().max()) < 2e-6
    # the first rows, so that they are the first ones of their tiles: the host's matrix product depends on that
    for count in (1, 2):
        seen = 300 - len(q) + count
        few = ATTENTION.apply(q[:count], keys[:seen], values[:seen], window, sinks, None, None)  # side by side
        assert torch.equal(few, together[:count])
