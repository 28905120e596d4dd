"""Rows of tied tables out of the panels that the head multiplies with."""

import pytest
import torch

from bitgrain.conformance.grid import BLOCKED, WEIGHTS, shapes_of
from bitgrain.kernels.base import EmbeddingProblem, LinearProblem
from bitgrain.kernels.cpu import library
from bitgrain.kernels.cpu.embedding import SHARED_ROWS
from bitgrain.weights import NO_ACTIVATION
from bitgrain.weights.synthetic import sample_weight

pytestmark = pytest.mark.skipif(bool(library.missing()), reason=library.missing() or "present")
INDEX = torch.tensor([36, 0, 17, 17, 3, 16, *range(5, 25)])


@pytest.mark.parametrize("kernel", SHARED_ROWS, ids=lambda k: k.name)
def test_rows_are_those_of_the_definition_to_the_bit(kernel):
    taken = set()
    for spec in [*WEIGHTS, *BLOCKED]:
        for _, n, k in shapes_of(spec)[1:]:
            if kernel.linear.refusal(LinearProblem(spec, NO_ACTIVATION, n, k, "float32")) is not None or kernel.linear.rows_refusal(spec):
                continue
            assert kernel.refusal(EmbeddingProblem(spec, n, k, "bfloat16", kernel.linear.name)) is None
            weight = sample_weight(spec, n, k)
            prepared = kernel.prepare(weight, NO_ACTIVATION)
            for index in (INDEX, INDEX[:1], INDEX[:0]):
                assert torch.equal(kernel.apply(index, prepared, torch.float32), weight.dequantize()[index]), spec.describe()
            assert torch.equal(kernel.apply(INDEX, prepared, torch.bfloat16), weight.dequantize()[INDEX].bfloat16())
            taken.add(spec.describe())
    assert len(taken) >= 4


def test_a_table_that_no_head_shares_and_rounded_zero_points_are_refused():
    kernel = next(k for k in SHARED_ROWS if k.name == "cpu.int_affine_rows")
    plain, rounded = (next(s for s in WEIGHTS if s.kind == "int_affine" and s.zero == zero) for zero in ("constant", "float"))
    assert "shares through cpu.int_affine" in kernel.refusal(EmbeddingProblem(plain, 8, 64, "float32")).reason
    assert "shares through cpu.int_affine" in kernel.refusal(EmbeddingProblem(plain, 8, 64, "float32", "cpu.float8")).reason
    assert "rounded" in kernel.refusal(EmbeddingProblem(rounded, 8, 64, "float32", "cpu.int_affine")).reason
    assert kernel.refusal(EmbeddingProblem(plain, 8, 64, "float32", "cpu.int_affine")) is None
