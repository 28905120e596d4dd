"""Kernels in Triton: one source for the devices of three vendors.  Nothing here imports triton before a kernel is asked for.

Tested in Triton's interpreter only; no result here was run on hardware.
"""

from bitgrain.kernels.triton.experts import TritonExperts

PLATFORMS = ("cuda", "hip", "xpu")
# (operation, class); each has an instance per platform, whose features it asks for
_CLASSES = (("experts", TritonExperts),)

KERNELS = [(operation, platform, kernel(platform)) for operation, kernel in _CLASSES for platform in PLATFORMS]
