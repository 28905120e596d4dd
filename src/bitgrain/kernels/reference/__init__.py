"""The floor: every canonical weight and every activation specification in plain torch, on every device."""

from bitgrain.kernels.reference.embedding import ReferenceEmbedding
from bitgrain.kernels.reference.linear import ReferenceLinear
from bitgrain.kernels.registry import ANY_PLATFORM

KERNELS = [
    ("linear", ANY_PLATFORM, ReferenceLinear()),
    ("embedding", ANY_PLATFORM, ReferenceEmbedding()),
]
