"""Kernels run a canonical weight on a platform.  They see numerics, weights and platforms, never a checkpoint."""
