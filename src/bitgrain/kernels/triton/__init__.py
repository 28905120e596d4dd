"""Kernels in Triton: one source for the devices of three vendors.  Nothing here imports triton before a kernel is asked for.

Tested in Triton's interpreter only; no result here was run on hardware.
"""

from bitgrain.kernels.triton.block_float import TritonBlockFloat
from bitgrain.kernels.triton.codebooks import CODEBOOK_KERNELS
from bitgrain.kernels.triton.coded import CodedLinear
from bitgrain.kernels.triton.experts import TritonExperts
from bitgrain.kernels.triton.hadamard import TritonHadamard
from bitgrain.kernels.triton.linear import TritonLinear
from bitgrain.kernels.triton.rows import DecodedEmbedding
from bitgrain.kernels.triton.step import STEP_KERNELS
from bitgrain.kernels.triton.super_blocks import SuperBlockLinear

PLATFORMS = ("cuda", "hip", "xpu")
# (operation, class); each has an instance per platform, whose features it asks for
_CLASSES = (("experts", TritonExperts), ("linear", TritonLinear), *(("linear", kernel) for kernel in (*CODEBOOK_KERNELS, SuperBlockLinear, CodedLinear)), ("embedding", DecodedEmbedding), ("linear", TritonBlockFloat), ("hadamard", TritonHadamard), *STEP_KERNELS)

KERNELS = [(operation, platform, kernel(platform)) for operation, kernel in _CLASSES for platform in PLATFORMS]
