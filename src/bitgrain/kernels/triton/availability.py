"""Whether triton can be imported: absent, broken and present are three answers.  Looked at on first use."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

# Said wherever these kernels' results are shown; a record of a run on a device replaces it in the support matrix.
PROOF = "interpreter only, not run on hardware"


@lru_cache(maxsize=1)
def missing() -> str:
    """Why the kernels cannot run; empty when they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        import bitgrain.kernels.triton.grouped_gemm  # noqa: F401
    except Exception as error:  # whatever a broken package raises
        return f"triton is broken: {type(error).__name__}: {error}"
    return ""


@lru_cache(maxsize=1)
def version() -> str:
    """The installed version; empty without one."""
    if missing():
        return ""
    import triton

    return str(triton.__version__)
