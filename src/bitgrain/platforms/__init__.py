"""Probed feature sets of the machines that kernels run on."""
