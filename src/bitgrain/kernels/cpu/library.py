"""The native library: found, checked and loaded on first use.  Absent, broken and present are three answers.

BITGRAIN_CPU_ISA chooses the instruction set (a name of SETS) instead of the best that the machine has; BITGRAIN_CPU_LIBRARY another
file, such as one that was built with sanitizers.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

from bitgrain.errors import RequestError, RunError
from bitgrain.settings import variable

ABI_VERSION = 6
SETS = {"portable": 1, "avx2": 2, "avxvnni": 32, "avx512": 4, "avx512bf16": 8, "amx": 16, "neon": 64, "neondot": 128}
FILE = Path(variable("BITGRAIN_CPU_LIBRARY") or Path(__file__).with_name("libbitgrain_cpu.so"))

POINTER, I32, I64, F32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
SIGNATURES = {
    "bg_block_linear": [POINTER, I32, I64, I64, POINTER, POINTER, POINTER, I64, POINTER, POINTER, I32, I32],
    "bg_dense": [POINTER, I64, I64, POINTER, I32, I64, POINTER, POINTER, I32, I32],
    "bg_run_step": [POINTER, I64, POINTER, POINTER, POINTER],
    "bg_step_scratch": [POINTER, I64, POINTER],
    "bg_grouped": [POINTER, I32, I64, I64, POINTER, POINTER, I32, POINTER, I32, POINTER, I32, F32, POINTER, I64, I64, I64, POINTER, POINTER, POINTER, I32, I32],
    "bg_grouped_table": [
        POINTER, I32, I64, I64, POINTER, POINTER, I32, POINTER, I32, POINTER, POINTER, POINTER, F32, POINTER, I32, F32, POINTER, I64, I64, I64, POINTER, POINTER,
        POINTER, I32, I32,
    ],
    "bg_experts": [POINTER, POINTER, POINTER, I64, I64, POINTER, I32, I64, POINTER, I32, POINTER, I64, I32, F32, F32, POINTER, I32],
    "bg_experts_product": [POINTER, POINTER, I64, POINTER, I32, POINTER, POINTER, POINTER, I32, I32],
    "bg_integer": [POINTER, I32, I64, I64, I32, I32, F32, I32, F32, POINTER, POINTER, POINTER, I64, I64, POINTER, POINTER, I32],
    "bg_quantize": [POINTER, I64, I64, I64, I32, I32, F32, I32, F32, POINTER, POINTER, POINTER, I32],
    "bg_norm": [POINTER, I64, I64, I64, POINTER, I32, POINTER, F32, I32, I32, POINTER, I32],
    "bg_rotate": [POINTER, I64, I64, I64, I64, POINTER, POINTER, I64, I32, I32, POINTER, I32],
    "bg_gate": [POINTER, POINTER, I64, I64, I64, I32, POINTER, I32],
    "bg_attend": [POINTER, I64, I64, I64, I64, POINTER, I64, POINTER, I64, I64, I64, I64, I64, POINTER, F32, F32, I32, POINTER, I32],
    "bg_pack_blocks": [POINTER, POINTER, I32, POINTER, I64, POINTER, I32],
    "bg_pack_units": [POINTER, POINTER, I64, I32, I32, I32, POINTER, I32],
    "bg_block_panel_bytes": [POINTER, I64],
    "bg_choose_set": [ctypes.c_char_p],
    "bg_peak": [I32, I32],
    "bg_read": [POINTER, I64, I32],
}


@lru_cache(maxsize=1)
def _open() -> tuple[ctypes.CDLL | None, str]:
    """(library, "") or (None, why not)."""
    if not FILE.exists():
        return None, "the native library was not built"
    try:
        library = ctypes.CDLL(str(FILE))
        version = library.bg_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"the native library is broken: {error}"
    if version != ABI_VERSION:
        return None, f"the native library has interface {version}, this package needs {ABI_VERSION}: build the package again"
    library.bg_instruction_set.restype = ctypes.c_char_p
    library.bg_block_panel_bytes.restype = library.bg_step_scratch.restype = I64
    library.bg_peak.restype = ctypes.c_double
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    asked = variable("BITGRAIN_CPU_ISA")
    if asked is not None:
        _choose(library, asked)
    return library, ""


def _choose(library: ctypes.CDLL, name: str) -> None:
    available = [known for known, bit in SETS.items() if library.bg_available_sets() & bit]
    if name not in available:
        found = "not on this machine" if name in SETS else "no such instruction set"
        raise RequestError(f"instruction set {name!r} (BITGRAIN_CPU_ISA)", found, f"one of {', '.join(available)}", "choose one of them, or unset the variable")
    library.bg_choose_set(name.encode())


def missing() -> str:
    """Why the native kernels cannot run; empty when they can."""
    return _open()[1]


def native() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RunError: it is absent or broken.
    """
    library, why = _open()
    if library is None:
        raise RunError("native kernels", why, "the library beside the package", "install the package again where a C++ compiler is present")
    return library


def instruction_set() -> str:
    """The instruction set in use, or "" without the library."""
    library, _ = _open()
    return library.bg_instruction_set().decode() if library else ""


def build_stamp() -> int:
    """Changes when the library is built again; 0 without one."""
    return FILE.stat().st_mtime_ns if FILE.exists() else 0


def choose_instruction_set(name: str) -> None:
    """Switch every native kernel to another instruction set of this machine (for tests and comparisons).

    Raises:
        RequestError: unknown, or not on this machine.
    """
    _choose(native(), name)


def available_sets() -> list[str]:
    """Instruction sets that the library and this machine have."""
    library, _ = _open()
    return [name for name, bit in SETS.items() if library and library.bg_available_sets() & bit]


def check(status: int, operation: str) -> None:
    """Raise RunError unless a native call succeeded."""
    if status:
        raise RunError(operation, f"native status {status} (out of memory)", "memory for the converted activations", "use shorter chunks of tokens")
