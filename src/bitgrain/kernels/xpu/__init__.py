"""Kernels over operators that only torch's build for Intel GPUs has; those of several vendors are in kernels/torch_library and kernels/triton."""

from bitgrain.kernels.xpu.int4_weights import XpuInt4Linear

KERNELS = [("linear", "xpu", XpuInt4Linear("xpu"))]
