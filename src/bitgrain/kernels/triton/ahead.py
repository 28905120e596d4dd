"""Compiling kernels ahead of time for devices that are not here: no driver is needed, only triton without its interpreter.

A module of kernels lists COMPILE_EXAMPLES: for each kernel that it launches, the arguments of typical launches.  `compile_for` turns one
into a device's machine code, which finds what the interpreter lets pass: layouts, types that a generation lacks, sizes of products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# generation to what triton calls it: (backend, architecture, threads that run together)
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm80": ("cuda", 80, 32),
    "sm90": ("cuda", 90, 32),
    "sm100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class CompileExample:
    """One launch of one kernel.

    Args:
        kernel:    the function that @triton.jit made.
        types:     of every argument that is no constant, as triton writes them: "*fp16", "*u8", "*fp32", "*i32", "i32", "fp32"; a tuple of them.
        constants: values of the constexpr arguments.
        name:      tells examples of one kernel apart.
        feature:   of platforms.*: only generations that have it compile the example; "": all.
        only:      generations, where fewer than all do (compiling takes seconds); empty: all.
        multiples: arguments that are multiples of 16 in the launches that matter; pointers are taken to be.
        warps:     num_warps; stages: num_stages.
    """

    kernel: Any
    types: Mapping[str, Any]
    constants: Mapping[str, Any]
    name: str = ""
    feature: str = ""
    only: tuple[str, ...] = ()
    multiples: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 2

    @property
    def label(self) -> str:
        return f"{self.kernel.__name__}{f' ({self.name})' if self.name else ''}"


def runs_on(example: CompileExample, generation: str, features: frozenset[str]) -> bool:
    """Whether a generation with these features launches the example at all."""
    return (not example.feature or example.feature in features) and (not example.only or generation in example.only)


def compile_for(example: CompileExample, generation: str) -> int:
    """Bytes of shared memory that the kernel takes on that generation.

    Raises:
        Exception: whatever triton's compiler says.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = example.kernel.arg_names
    unknown = sorted((set(example.types) | set(example.constants)) ^ set(names))
    if unknown:
        raise TypeError(f"{example.label}: arguments {', '.join(unknown)} are not those of the kernel")
    signature = {name: example.types.get(name, "constexpr") for name in names}
    places = [place for i, name in enumerate(names) for place in _aligned((i,), signature[name], name in example.multiples)]
    source = ASTSource(example.kernel, signature, dict(example.constants), {place: [["tt.divisibility", 16]] for place in places})
    # whether sums may be fused is said at every launch; the tests compile as the launches do
    options = {"num_warps": example.warps, "num_stages": example.stages, "enable_fp_fusion": False}
    return int(triton.compile(source, target=GPUTarget(*TARGETS[generation]), options=options).metadata.shared)


def _aligned(place: tuple[int, ...], kind: Any, multiple: bool) -> list[tuple[int, ...]]:
    """Places of pointers in an argument, which may be a tuple of types; its own if it is a number that is a multiple of 16."""
    if isinstance(kind, tuple):
        return [inner for i, part in enumerate(kind) for inner in _aligned((*place, i), part, multiple)]
    return [place] if kind.startswith("*") or (multiple and kind.startswith("i")) else []
