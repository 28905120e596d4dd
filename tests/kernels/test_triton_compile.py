"""Every Triton kernel compiles to machine code for generations of devices that are not here: no driver is needed for that.

A module of src/bitgrain/kernels/triton that defines kernels lists them in COMPILE_EXAMPLES (kernels/triton/ahead.py: CompileExample): one
entry per launched kernel and important variant, with the types of its arguments as triton writes them and its constants:

    COMPILE_EXAMPLES = [
        CompileExample(my_kernel, {"x": "*fp16", "codes": "*u8", "out": "*fp16", "m": "i32", "n": "i32"}, {"BITS": 4, "WIDE": False, "BLOCK_N": 64}),
        CompileExample(my_kernel, ..., name="native", feature="fp8_dot"),   # only generations with that feature compile it
    ]

A module that defines a kernel (a function under @triton.jit that some launch names with [grid]) without an example fails here.  An example
takes a second or more for a generation, so each is compiled for one of those that run it, in turn; BITGRAIN_COMPILE=all compiles everything for
all.  Each generation is compiled in one process of its own, since this one has Triton's interpreter; what it prints is the list of failures.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bitgrain.kernels.triton
from bitgrain.kernels.triton import availability
from bitgrain.kernels.triton.ahead import TARGETS

FOLDER = Path(bitgrain.kernels.triton.__path__[0])
WORKER = """
import importlib, json, sys, time
from bitgrain.kernels.triton.ahead import TARGETS, compile_for, runs_on
from bitgrain.platforms import cuda, hip
generation, everything, modules = sys.argv[1], sys.argv[2] == "all", sys.argv[3:]
features = {name: {"cuda": cuda, "hip": hip}[backend].GENERATIONS[name] for name, (backend, *_) in TARGETS.items()}
done, failed, listed = [], {}, []
for module in modules:
    for example in getattr(importlib.import_module(f"bitgrain.kernels.triton.{module}"), "COMPILE_EXAMPLES", []):
        takers = [name for name in TARGETS if runs_on(example, name, features[name])]
        if generation in takers and (everything or takers[len(listed) % len(takers)] == generation):
            start = time.time()
            try:
                shared = compile_for(example, generation)
                done.append([module, example.kernel.__name__, example.label, shared, round(time.time() - start, 2)])
            except Exception as error:
                failed[f"{module}: {example.label}"] = f"{type(error).__name__}: {error}"[-1500:]
        listed.append([module, example.kernel.__name__])
print(json.dumps({"done": done, "failed": failed, "listed": listed}))
"""
# what a program of a generation can have of shared memory, in bytes
SHARED = {"sm80": 163 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx942": 64 << 10}


def defined(path):
    """Names of the file's functions under @triton.jit."""
    functions = [f for f in ast.walk(ast.parse(path.read_text())) if isinstance(f, ast.FunctionDef)]
    return {f.name for f in functions if any(ast.unparse(d).startswith("triton.jit") for d in f.decorator_list)}


def launched():
    """Names that some file of the folder launches: NAME[grid](...)."""
    names = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name | ast.Attribute):
                value = node.func.value
                names.add(value.id if isinstance(value, ast.Name) else value.attr)
    return names


MODULES = {path.stem: defined(path) & launched() for path in sorted(FOLDER.glob("*.py"))}
WITH_KERNELS = {module: kernels for module, kernels in MODULES.items() if kernels}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What compiling for each generation gave; all at once, one process each."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    running = {}
    for generation in TARGETS:
        command = [sys.executable, "-c", WORKER, generation, os.environ.get("BITGRAIN_COMPILE", ""), *WITH_KERNELS]
        own = environment | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp(generation))}
        running[generation] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=own)
    found = {}
    for generation, process in running.items():
        out, err = process.communicate()
        found[generation] = json.loads(out.strip().splitlines()[-1]) if process.returncode == 0 else {"failed": {"process": err[-3000:]}, "done": [], "listed": []}
    return found


@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(availability.missing()), reason=availability.missing() or "present")
@pytest.mark.parametrize("generation", TARGETS)
def test_every_kernel_compiles_for(generation, answers):
    answer = answers[generation]
    assert not answer["failed"], "\n".join(f"{where}: {what}" for where, what in answer["failed"].items())
    too_large = [(label, shared) for _, _, label, shared, _ in answer["done"] if shared > SHARED[generation]]
    assert not too_large, f"more shared memory than {SHARED[generation]} bytes"
    listed = {tuple(pair) for pair in answer["listed"]}
    without = [f"{module}.{kernel}" for module, kernels in WITH_KERNELS.items() for kernel in sorted(kernels) if (module, kernel) not in listed]
    assert not without, "launched, and not in COMPILE_EXAMPLES"
