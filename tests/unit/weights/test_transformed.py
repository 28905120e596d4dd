"""Weights whose input is scaled or rotated first."""

import pytest
import torch

from bitgrain.errors import LayoutError, ShardError
from bitgrain.weights import ChannelScale, DenseWeight, Kronecker, LowRank, Transformed
from bitgrain.weights.synthetic import sample_weight
from bitgrain.weights.transformed import IDENTITY_ROWS

N, A, B = 5, 3, 4
K = A * B


def dense(n=N, k=K, seed=0):
    return DenseWeight(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)))


def rotation():
    torch.manual_seed(1)
    return Kronecker(torch.randn(A, A), torch.randn(B, B), (A, B))


def test_channel_scale_multiplies_columns_of_the_effective_weight():
    inner, scale = dense(), torch.rand(K) + 0.5
    weight = Transformed(inner, (ChannelScale(scale),))
    torch.testing.assert_close(weight.effective(), inner.data * scale)
    assert torch.equal(weight.dequantize(), inner.data) and weight.spec == inner.spec


@pytest.mark.parametrize("missing", ["none", "left", "right"])
def test_kronecker_is_left_transposed_times_x_times_right(missing):
    full = rotation()
    transform = Kronecker(None if missing == "left" else full.left, None if missing == "right" else full.right, full.sizes)
    left = torch.eye(A) if missing == "left" else full.left
    right = torch.eye(B) if missing == "right" else full.right
    x = torch.randn(7, K)
    naive = torch.stack([(left.t() @ row.view(A, B) @ right).reshape(-1) for row in x])
    torch.testing.assert_close(transform.apply(x), naive)
    # the same map as one matrix: x (L kron R), so W_effective = W (L kron R)^T
    inner = dense()
    torch.testing.assert_close(Transformed(inner, (transform,)).effective(), inner.data @ torch.kron(left, right).t())


def test_effective_weight_gives_what_the_layer_gives():
    torch.manual_seed(2)
    low = LowRank(torch.randn(2, K), torch.randn(N, 2))
    weight = Transformed(dense(), (ChannelScale(torch.rand(K)), rotation()), low)
    x = torch.randn(6, K)
    y = x
    for transform in weight.inputs:
        y = transform.apply(y)
    torch.testing.assert_close(x @ weight.effective().t(), y @ weight.inner.data.t() + y @ low.down.t() @ low.up.t())


def test_effective_weight_of_more_columns_than_are_pushed_at_once():
    k = IDENTITY_ROWS + 3
    inner, scale = dense(2, k), torch.rand(k)
    torch.testing.assert_close(Transformed(inner, (ChannelScale(scale),)).effective(), inner.data * scale)


def test_rows_and_columns():
    scale = torch.rand(K)
    torch.manual_seed(3)
    low = LowRank(torch.randn(2, K), torch.randn(N, 2))
    weight = Transformed(dense(), (ChannelScale(scale),), low)
    torch.testing.assert_close(weight.rows(1, 4).effective(), weight.effective()[1:4])
    torch.testing.assert_close(weight.columns(2, 9).effective(), weight.effective()[:, 2:9])
    with pytest.raises(ShardError, match="mixes them"):
        Transformed(dense(), (rotation(),)).columns(0, 4)


def test_tensors_are_listed_and_mapped_with_the_transforms():
    weight = Transformed(dense(), (ChannelScale(torch.ones(K)), rotation()), LowRank(torch.ones(1, K), torch.ones(N, 1)))
    assert set(weight.data_tensors()) == {"data", "inputs.0.scale", "inputs.1.left", "inputs.1.right", "down", "up"}
    doubled = weight.map_tensors(lambda t: t * 2)
    assert all(torch.equal(doubled.data_tensors()[name], 2 * tensor) for name, tensor in weight.data_tensors().items())
    assert weight.nbytes == 4 * (N * K + K + A * A + B * B + K + N)


def test_what_does_not_fit_is_refused():
    with pytest.raises(LayoutError, match="K = 12"):
        Transformed(dense(), (ChannelScale(torch.ones(K + 1)),))
    with pytest.raises(LayoutError, match="low rank"):
        Transformed(dense(), (), LowRank(torch.ones(2, K), torch.ones(N + 1, 2)))
    with pytest.raises(LayoutError, match="factors"):
        Kronecker(torch.ones(A, B), None, (A, B))
    with pytest.raises(LayoutError, match="Transformed inside"):
        Transformed(Transformed(dense()))
    with pytest.raises(LayoutError, match="embedding"):
        Transformed(dense()).gather_rows(torch.tensor([0]))
    with pytest.raises(ShardError, match="side by side"):
        Transformed.concat([Transformed(dense()), Transformed(dense())])


def test_a_layer_applies_transforms_before_the_kernel_and_the_bias_after():
    from bitgrain.kernels.reference.linear import ReferenceLinear
    from bitgrain.layers.linear import Linear
    from bitgrain.weights import NO_ACTIVATION, ActivationSpec

    torch.manual_seed(4)
    weight = Transformed(dense(), (ChannelScale(torch.rand(K)), rotation()), LowRank(torch.randn(2, K), torch.randn(N, 2)))
    kernel, bias, x = ReferenceLinear(), torch.randn(N), torch.randn(3, K)
    layer = Linear("x", kernel, kernel.prepare(weight.inner, NO_ACTIVATION), bias, weight.inputs, weight.low_rank)
    torch.testing.assert_close(layer(x), x @ weight.effective().t() + bias)
    assert layer.nbytes == weight.nbytes + bias.numel() * 4
    # the activation is quantized after the transforms
    act = ActivationSpec("int8", "token")
    quantized = Linear("x", kernel, kernel.prepare(weight.inner, act), None, weight.inputs)
    moved = weight.inputs[1].apply(weight.inputs[0].apply(x))
    torch.testing.assert_close(quantized(x), act.fake_quantize(moved) @ weight.inner.data.t())


def test_synthetic_weights_have_the_spec_that_was_asked_for():
    from bitgrain.conformance.grid import WEIGHTS

    for spec in WEIGHTS:
        weight = sample_weight(spec, 48, 256)
        assert weight.spec == spec, spec
        assert torch.isfinite(weight.dequantize()).all()
