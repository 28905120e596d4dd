"""Canonical, device-neutral weights and activation specifications.

`N` = out features, `K` = in features, weights `[N, K]`; a scale is always a multiplier; a zero point is always the
true value in the codes' own (unsigned) domain.
"""

from bitgrain.weights.activation import NO_ACTIVATION, ActivationSpec
from bitgrain.weights.additive import AdditiveCodebookWeight
from bitgrain.weights.base import Weight, WeightSpec
from bitgrain.weights.block_float import BlockFloatWeight
from bitgrain.weights.codebook import CodebookWeight
from bitgrain.weights.dense import DenseWeight
from bitgrain.weights.float8 import FloatWeight
from bitgrain.weights.int_affine import IntAffineWeight
from bitgrain.weights.lattice import LatticeWeight
from bitgrain.weights.super_block import SuperBlockWeight
from bitgrain.weights.transformed import Transformed
from bitgrain.weights.transforms import ChannelScale, Hadamard, Kronecker, LowRank, Permutation, Rotation, Transform
from bitgrain.weights.trellis import TrellisWeight
from bitgrain.weights.vector_codebook import VectorCodebookWeight

__all__ = [
    "NO_ACTIVATION",
    "ActivationSpec",
    "AdditiveCodebookWeight",
    "BlockFloatWeight",
    "ChannelScale",
    "CodebookWeight",
    "DenseWeight",
    "FloatWeight",
    "Hadamard",
    "IntAffineWeight",
    "Kronecker",
    "LatticeWeight",
    "LowRank",
    "Permutation",
    "Rotation",
    "SuperBlockWeight",
    "Transform",
    "Transformed",
    "TrellisWeight",
    "VectorCodebookWeight",
    "Weight",
    "WeightSpec",
]
