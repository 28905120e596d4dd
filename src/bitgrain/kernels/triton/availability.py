"""Whether triton can run a platform's kernels: absent, broken, too old and unsuitable here are different answers.  Looked at on first use."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec

from bitgrain.platforms.base import Platform
from bitgrain.platforms.probe import target
from bitgrain.settings import overridden

# Said wherever these kernels' results are shown; a record of a run on a device replaces it in the support matrix.
PROOF = "interpreter only, not run on hardware"

# What every kernel here uses of triton, as paths of attributes; a kernel that uses more names it to missing().
NEEDED = ("knobs.runtime", "language.dot", "language.pointer_type", "language.static_range", "language.float8e4b8")


def missing(platform: str = "", needs: tuple[str, ...] = ()) -> str:
    """Why triton cannot run a platform's kernels; empty when it can.

    A platform that is only planned for is never refused: what is absent here says nothing about there.  A simulated one runs in
    Triton's interpreter, which must be on when triton is imported; this imports it so.

    Args:
        platform: dispatch key; "": asks only whether triton is usable in this process as it is.
        needs:    further paths of attributes below triton, such as "language.dot_scaled".
    """
    state = target(platform).state if platform else ""
    return "" if state == "planned" else (_broken(state == "simulated") or _too_old(needs) or _unsuitable(state))


@lru_cache(maxsize=2)
def _broken(interpret: bool) -> str:
    """Imports triton, for its interpreter if it is asked for and nobody imported it before."""
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        if interpret and "triton" not in sys.modules:
            with overridden("TRITON_INTERPRET", "1"):
                import triton
            # read again for every kernel that is defined later
            triton.knobs.runtime.interpret = True
        else:
            import triton
    except Exception as error:  # whatever a broken package raises
        return f"triton is broken: {type(error).__name__}: {error}"
    return ""


@lru_cache(maxsize=16)
def _too_old(needs: tuple[str, ...]) -> str:
    lacking = [name for name in (*NEEDED, *needs) if not _has(name)]
    return f"this triton ({version()}) lacks {', '.join(lacking)}: it is too old, or too new" if lacking else ""


def _has(path: str) -> bool:
    import triton

    found: object = triton
    for name in path.split("."):
        found = getattr(found, name, None)
    return found is not None


def _unsuitable(state: str) -> str:
    """Why this process's triton does not fit the platform: one process has either the interpreter or the compiler."""
    if state == "simulated" and not interpreted():
        return "triton was imported for devices before its interpreter was asked for: set TRITON_INTERPRET=1, or name the platform before anything imports triton"
    if state == "present" and interpreted():
        return "TRITON_INTERPRET=1 is set, with which triton runs on the host: unset it to use the device"
    return ""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on host tensors."""
    import triton

    # a function of triton's own library says how it was imported; the switch only what later functions become
    return type(triton.language.zeros).__name__ == "InterpretedFunction" and bool(triton.knobs.runtime.interpret)


def version() -> str:
    """The installed version, without importing it; empty without one."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""


def state_of(platform: str, needs: tuple[str, ...] = ()) -> str:
    """ "available (version; proof)", or why not, of this process: what a kernel's state() says, also where the device is only planned for."""
    why = _broken(target(platform).state == "simulated") or _too_old(needs) or missing(platform, needs)
    return why or f"available (triton {version()}; {PROOF})"


class TritonKernel:
    """What every kernel here says of itself; one instance serves one platform."""

    rank = 40
    proof = PROOF

    def __init__(self, platform: str) -> None:
        self.platform = platform

    @property
    def target(self) -> Platform:
        """What the kernel may count on."""
        return target(self.platform)

    @property
    def build(self) -> str:
        """What a remembered self-test depends on besides the kernel's name."""
        return f"{version()} {self.platform} {self.target.state} {' '.join(sorted(self.target.features))}"

    def state(self) -> str:
        """ "available (version; proof)", or why not."""
        return state_of(self.platform)
