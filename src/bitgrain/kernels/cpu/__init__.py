"""Kernels for the host processor: a native library where it was built, torch's own for dense weights."""

from bitgrain.kernels.cpu.block_float import BlockFloatLinear
from bitgrain.kernels.cpu.codebook import CODEBOOK_KERNELS
from bitgrain.kernels.cpu.decode_step import NativeDecodeStep
from bitgrain.kernels.cpu.dense import DenseLinear
from bitgrain.kernels.cpu.dense_panels import DensePanels
from bitgrain.kernels.cpu.embedding import SHARED_ROWS, DenseEmbedding
from bitgrain.kernels.cpu.experts import NativeExperts
from bitgrain.kernels.cpu.float8 import Float8Linear
from bitgrain.kernels.cpu.hadamard import NativeHadamard
from bitgrain.kernels.cpu.int_affine import IntAffineLinear
from bitgrain.kernels.cpu.int_dot import IntDotLinear
from bitgrain.kernels.cpu.step import NativeAttention, NativeGate, NativeNorm, NativeRotary
from bitgrain.kernels.cpu.super_block import SuperBlockInt8Linear, SuperBlockLinear

KERNELS = [
    ("embedding", "cpu", DenseEmbedding()),
    *(("embedding", "cpu", kernel) for kernel in SHARED_ROWS),
    ("linear", "cpu", DenseLinear()),
    ("linear", "cpu", DensePanels()),
    ("linear", "cpu", IntDotLinear()),
    ("linear", "cpu", IntAffineLinear()),
    ("linear", "cpu", Float8Linear()),
    ("linear", "cpu", BlockFloatLinear()),
    ("linear", "cpu", SuperBlockLinear()),
    ("linear", "cpu", SuperBlockInt8Linear()),
    ("experts", "cpu", NativeExperts()),
    *(("linear", "cpu", kernel) for kernel in CODEBOOK_KERNELS),
    ("hadamard", "cpu", NativeHadamard()),
    ("norm", "cpu", NativeNorm()),
    ("rotary", "cpu", NativeRotary()),
    ("gate", "cpu", NativeGate()),
    ("attention", "cpu", NativeAttention()),
    ("decode_step", "cpu", NativeDecodeStep()),
]
