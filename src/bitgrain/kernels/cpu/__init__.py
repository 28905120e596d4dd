"""Kernels for the host processor: a native library where it was built, torch's own for dense weights."""

from bitgrain.kernels.cpu.dense import DenseLinear
from bitgrain.kernels.cpu.embedding import DenseEmbedding
from bitgrain.kernels.cpu.float8 import Float8Linear
from bitgrain.kernels.cpu.int_affine import IntAffineLinear
from bitgrain.kernels.cpu.int_dot import IntDotLinear

KERNELS = [
    ("embedding", "cpu", DenseEmbedding()),
    ("linear", "cpu", DenseLinear()),
    ("linear", "cpu", IntDotLinear()),
    ("linear", "cpu", IntAffineLinear()),
    ("linear", "cpu", Float8Linear()),
]
