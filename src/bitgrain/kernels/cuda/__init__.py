"""Kernels of packages that exist for NVIDIA GPUs only; torch's own operators are in kernels/torch_library, Triton's in kernels/triton."""

from bitgrain.kernels.cuda.marlin import MarlinLinear

KERNELS = [("linear", "cuda", MarlinLinear("cuda"))]
