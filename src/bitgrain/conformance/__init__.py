"""The acceptance test of a backend: every registered kernel over its declared domain against the definition.

    grid.py        specs, activations, dtypes and sizes
    cases.py       the grid of an operation as cases: a problem, and what its input is like
    definitions.py what an operation computes, in float64
    checks.py      one case of one kernel: how far from the definition, over how far it may be
    tolerances.py  how far it may be, with reasons
    suite.py       all kernels of a platform
"""
