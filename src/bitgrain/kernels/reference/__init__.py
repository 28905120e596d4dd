"""The floor: every canonical weight and every activation specification in plain torch, on every device."""

from bitgrain.kernels.reference.attention import ReferenceAttention
from bitgrain.kernels.reference.embedding import ReferenceEmbedding
from bitgrain.kernels.reference.experts import ReferenceExperts
from bitgrain.kernels.reference.hadamard import ReferenceHadamard
from bitgrain.kernels.reference.linear import ReferenceLinear
from bitgrain.kernels.reference.step import ReferenceDecodeStep, ReferenceGate, ReferenceNorm, ReferenceRotary
from bitgrain.kernels.registry import ANY_PLATFORM

KERNELS = [
    ("linear", ANY_PLATFORM, ReferenceLinear()),
    ("embedding", ANY_PLATFORM, ReferenceEmbedding()),
    ("experts", ANY_PLATFORM, ReferenceExperts()),
    ("norm", ANY_PLATFORM, ReferenceNorm()),
    ("rotary", ANY_PLATFORM, ReferenceRotary()),
    ("gate", ANY_PLATFORM, ReferenceGate()),
    ("decode_step", ANY_PLATFORM, ReferenceDecodeStep()),
    ("attention", ANY_PLATFORM, ReferenceAttention()),
    ("hadamard", ANY_PLATFORM, ReferenceHadamard()),
]
