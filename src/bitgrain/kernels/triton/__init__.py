"""Kernels in Triton: one source for the devices of three vendors.  Nothing here imports triton before a kernel is asked for.

Tested in Triton's interpreter only; no result here was run on hardware.
"""

from bitgrain.kernels.triton.experts import TritonExperts

_EXPERTS = TritonExperts()

KERNELS = [("experts", platform, _EXPERTS) for platform in ("cuda", "hip", "xpu")]
