"""Modules of one input: fused or side by side, the same numbers, for every pair of schemes."""

from dataclasses import replace

import pytest
import torch

import bitgrain
from bitgrain.conformance.grid import CODES, WEIGHTS, steps_of
from bitgrain.formats.registry import formats
from bitgrain.models.loading import LoadOptions, build_model
from bitgrain.quantize import TARGETS
from bitgrain.weights.synthetic import sample_weight
from tests.checkpoints import small_llama

LAYER = "model.layers.0"
NAMES = (*TARGETS, "none")
IDS = torch.arange(3, 15)


def example_specs():
    """Every weight that a format can hold, and those of the kernels' grid."""
    return sorted({*WEIGHTS, *CODES, *(weight for _, config in formats().items() for _, weight, _ in config.examples())}, key=repr)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("fusion") / "llama", num_hidden_layers=2)


def logits(checkpoint, fused: bool):
    plan = checkpoint.plan
    if not fused:
        plan = replace(plan, fusions=tuple(replace(f, fused=False, why="asked for by the test") for f in plan.fusions))
    options = LoadOptions(device="cpu", dtype="float32", forbid=("cpu",))  # one kernel: only fusion differs
    return build_model(checkpoint.files, plan, checkpoint.architecture, options).logits(IDS)


@pytest.mark.parametrize("first", NAMES)
def test_every_pair_of_schemes_gives_the_logits_of_unfused_modules(dense, first):
    for place, second in enumerate(NAMES):
        third = NAMES[(place + NAMES.index(first)) % len(NAMES)]
        rules = {"*.0.self_attn.q_proj": first, "*.0.self_attn.k_proj": second, "*.0.self_attn.v_proj": third, "*.0.mlp.gate_proj": first, "*.0.mlp.up_proj": second}
        checkpoint = bitgrain.open_checkpoint(dense, rules=rules)
        fusions = {f.modules: f for f in checkpoint.plan.fusions}
        gate_up = fusions[f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj"]
        assert gate_up.fused == (first == second), f"{first}, {second}: {gate_up.why}"
        qkv = fusions[tuple(f"{LAYER}.self_attn.{p}_proj" for p in "qkv")]
        assert qkv.fused == (first == second == third) and qkv.why
        torch.testing.assert_close(logits(checkpoint, True), logits(checkpoint, False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", example_specs(), ids=lambda s: s.describe().replace(" ", "-"))
def test_stacked_weights_keep_every_value_of_their_parts(spec):
    """Parts differ in everything that data can differ in: scales, second scales, tables, zero points."""
    rows = (48, 16, 32)
    parts = [sample_weight(spec, n, max(256, 2 * spec.group_size), seed) for seed, n in enumerate(rows)]
    if spec.group_index:
        parts = [replace(part, group_index=parts[0].group_index) for part in parts]
    if spec.kind == "trellis":
        parts = [replace(part, table=parts[0].table) for part in parts]  # one table for all, or they stay apart
    if spec.kind in ("additive", "vector_codebook"):
        codes = ("codes", "scale") if spec.kind == "additive" else ("codes", "residual_codes", "outlier_codes")
        shared = {name: tensor for name, tensor in parts[0].data_tensors().items() if name not in codes}
        parts = [replace(part, **shared) for part in parts]
    stacked = type(parts[0]).concat(parts)
    assert torch.equal(stacked.dequantize(), torch.cat([part.dequantize() for part in parts]))
    assert stacked.spec == spec.stacked(rows)
    again = stacked.rows(48, 64)
    assert torch.equal(again.dequantize(), parts[1].dequantize())
    index = torch.tensor([95, 0, 48])
    assert torch.equal(stacked.gather_rows(index), stacked.dequantize()[index])


@pytest.mark.parametrize("spec", example_specs(), ids=lambda s: s.describe().replace(" ", "-"))
def test_cut_columns_keep_every_value(spec):
    """At a boundary of groups and inside one; in whole blocks where the type has no shorter ones."""
    weight = sample_weight(spec, 32, 256, seed=5)
    step = steps_of(spec)[1]
    for first, last in ((128, 256), (32, 200), (0, 256)):
        start, stop = first // step * step, -(-last // step) * step
        assert torch.equal(weight.columns(start, stop).dequantize(), weight.dequantize()[:, start:stop])
