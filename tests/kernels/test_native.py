"""The native library: exact packing, exact integers, determinism, tracing, and its absence."""

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitgrain.conformance.grid import float8, int_affine
from bitgrain.errors import BadValueError, RequestError
from bitgrain.kernels.base import Fidelity, LinearProblem
from bitgrain.kernels.cpu import library, panels
from bitgrain.kernels.cpu.float8 import Float8Linear
from bitgrain.kernels.cpu.int_affine import IntAffineLinear
from bitgrain.kernels.cpu.int_dot import RANGES, STATIC, IntDotLinear, rules_of
from bitgrain.kernels.cpu.native_packing import COLUMNS, NIBBLES, QUADS, pack_units
from bitgrain.kernels.selection import Policy, select
from bitgrain.numerics.bitpack import pack_dense
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, DenseWeight, FloatWeight
from bitgrain.weights.synthetic import sample_weight

needs_library = pytest.mark.skipif(bool(library.missing()), reason=library.missing() or "present")


@needs_library
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("index", [False, True])
def test_unpack_of_prepared_codes_is_exact(bits, index):
    weight = sample_weight(int_affine(bits, "group", 24, "integer", index), 37, 100)
    kernel = IntAffineLinear()
    assert torch.equal(kernel.unpack(kernel.prepare(weight, NO_ACTIVATION)), weight.codes())


@needs_library
def test_group_without_columns_leaves_the_others_right():
    weight = sample_weight(int_affine(4, "group", 32, "integer", index=True), 40, 128)
    index = weight.group_index.clone()
    index[index == 1] = 2
    weight = replace(weight, group_index=index)
    kernel, x = IntAffineLinear(), torch.randn(5, 128, generator=torch.Generator().manual_seed(7))
    want = x.double() @ weight.dequantize().double().T
    assert torch.allclose(kernel.apply(x, kernel.prepare(weight, NO_ACTIVATION), None).double(), want, atol=2e-5 * want.abs().max().item())


def test_columns_are_a_bijection():
    codes = torch.randint(0, 256, (32, 64), dtype=torch.uint8)
    assert torch.equal(panels.unpack_columns(panels.pack_columns(codes)), codes)


UNPACK = {NIBBLES: panels.unpack_nibbles, QUADS: panels.unpack_quads, COLUMNS: panels.unpack_columns}


@needs_library
@pytest.mark.parametrize("layout", UNPACK)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("n", "k"), [(16, 64), (37, 100), (1, 7), (50, 13)])
def test_packed_units_hold_the_codes_of_a_stream(layout, bits, n, k):
    if layout == NIBBLES and bits > 4:
        return  # two codes share a byte
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=generator)
    stream, fill, flip = pack_dense(codes, bits), 1, 0 if layout == NIBBLES else 0x80
    units = -(-k // 8) + 1
    got = UNPACK[layout](pack_units(stream, bits, k, None, units, layout, fill, flip)) ^ flip
    assert torch.equal(got[:n, :k], codes) and (got[:n, k:] == fill).all() and (got[n:] == fill).all()
    gather = torch.cat([torch.randperm(k, generator=generator), torch.full((units * 8 - k,), -1)]).roll(3).to(torch.int32)
    placed = UNPACK[layout](pack_units(stream, bits, k, gather, units, layout, fill, flip)) ^ flip
    assert torch.equal(placed[:n, gather >= 0], codes[:, gather[gather >= 0].long()]) and (placed[:n, gather < 0] == fill).all()


@needs_library
def test_prepared_four_bit_weight_stays_near_its_packed_size():
    weight = sample_weight(int_affine(4, "group", 128), 512, 1024)
    assert IntAffineLinear().prepare(weight, NO_ACTIVATION).nbytes <= 1.05 * weight.nbytes


ACTS = [
    ActivationSpec("int8", "token"),
    ActivationSpec("int8", "token", top=127.0),
    ActivationSpec("int8", "token", symmetric=False),
    ActivationSpec("int8", "tensor"),
    ActivationSpec("int8", "tensor", top=127.0),
    ActivationSpec("int8", "tensor", symmetric=False),
    ActivationSpec("int8", "tensor", dynamic=False, scale=0.02),
    ActivationSpec("int8", "tensor", symmetric=False, dynamic=False, scale=0.02, zero=11),
    ActivationSpec("int8", "token", reciprocal=True),
    ActivationSpec("int8", "token", symmetric=False, reciprocal=True),
    ActivationSpec("int8", "tensor", symmetric=False, dynamic=False, scale=0.02, zero=11, reciprocal=True),
]


@needs_library
@pytest.mark.parametrize("isa", library.available_sets())
@pytest.mark.parametrize("act", ACTS, ids=lambda a: f"{a.describe()} {a.top_code:g}{' reciprocal' * a.reciprocal}".replace(" ", "-"))
def test_activation_codes_equal_the_definition_bit_for_bit(isa, act):
    before = library.instruction_set()
    library.choose_instruction_set(isa)
    x = torch.randn(9, 203, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 3, 9)[:, None]
    x[4], x[5, :100] = 0.0, 0.5
    quads = 52
    a, scale, zero = torch.zeros(9, quads * 4, dtype=torch.uint8), torch.zeros(9), torch.zeros(9, dtype=torch.int32)
    library.native().bg_quantize(
        x.data_ptr(), 9, 203, quads, rules_of(act), RANGES[act.granularity] if act.dynamic else STATIC, act.scale or 1.0, act.zero, act.top_code, a.data_ptr(), scale.data_ptr(), zero.data_ptr(), 2
    )
    library.choose_instruction_set(before)
    codes, want_scale, want_zero = act.quantize(x)
    assert torch.equal(a[:, :203].to(torch.int16) - 128, codes.to(torch.int16))
    assert torch.equal(scale, want_scale.reshape(-1).expand(9)) and torch.equal(zero - 128, want_zero.reshape(-1).expand(9).to(torch.int32))


@needs_library
def test_multiplying_by_the_reciprocal_is_another_rounding_than_dividing():
    x, act = torch.full((1, 16), 3.3), ActivationSpec("int8", "tensor", dynamic=False, scale=0.6)
    weight = replace(sample_weight(int_affine(8, "channel"), 16, 16), scale=torch.ones(16, 1))
    both = [replace(act, reciprocal=reciprocal) for reciprocal in (False, True)]
    assert not torch.equal(*(a.quantize(x)[0] for a in both))  # 5.5 to one side and to the other
    for each in both:
        want = each.fake_quantize(x).double() @ weight.dequantize().double().T
        got = IntDotLinear().apply(x, IntDotLinear().prepare(weight, each), None).double()
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-6)


# around the tiles of rows, panels and in features of every instruction set; long K is more than one widening of the activations
INTEGER_SHAPES = [(48, 1000), (1, 7), (33, 64), (100, 260), (16, 16_500)]


@needs_library
@pytest.mark.parametrize("isa", library.available_sets())
@pytest.mark.parametrize(("n", "k"), INTEGER_SHAPES)
def test_integer_products_are_exact(isa, n, k):
    """To the rounding of the sum to float32, for random codes and for the extreme ones, -128 times -128 among them."""
    weight = sample_weight(replace(int_affine(8, "channel"), scale_dtype="float32"), n, k)
    extreme = torch.where(weight.codes() < 128, 0, 255).to(torch.uint8)
    before, act = library.instruction_set(), ActivationSpec("int8", "tensor", dynamic=False, scale=1.0)
    library.choose_instruction_set(isa)
    try:
        for packed in (weight.packed, pack_dense(extreme, 8)):
            held = replace(weight, packed=packed, scale=torch.ones(n, 1))
            prepared, want = IntDotLinear().prepare(held, act), held.dequantize().double().T
            for rows in (1, 2, 3, 4, 5, 7, 8, 13, 49, 130):
                x = torch.randint(-128, 128, (rows, k), generator=torch.Generator().manual_seed(rows)).float()
                x[:, : k // 2] = -128 if rows % 2 else 127
                got = IntDotLinear().apply(x, prepared, None)
                assert torch.equal(got, (x.double() @ want).float()), rows
    finally:
        library.choose_instruction_set(before)


KERNELS = [
    (IntAffineLinear(), int_affine(4, "group", 32, "integer"), NO_ACTIVATION),
    (Float8Linear(), float8("fp8_e4m3fn", "block", (16, 32)), NO_ACTIVATION),
    (IntDotLinear(), int_affine(8, "channel"), ACTS[0]),
    (IntAffineLinear(), int_affine(8, "group", 40, "integer"), NO_ACTIVATION),
    (Float8Linear(), float8("fp8_e5m2", "tensor"), NO_ACTIVATION),
]


@needs_library
@pytest.mark.parametrize(("kernel", "spec", "act"), KERNELS, ids=lambda v: getattr(v, "name", ""))
def test_result_does_not_depend_on_threads_or_on_other_rows(kernel, spec, act):
    prepared = kernel.prepare(sample_weight(spec, 100, 600), act)
    x = torch.randn(130, 600, generator=torch.Generator().manual_seed(5)).bfloat16()
    whole = kernel.apply(x, prepared, None)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(kernel.apply(x, prepared, None), whole)
    finally:
        torch.set_num_threads(threads)
    for start, rows in ((0, 1), (0, 2), (0, 3), (0, 5), (0, 8), (50, 49), (100, 30), (33, 97)):
        assert torch.equal(kernel.apply(x[start : start + rows], prepared, None), whole[start : start + rows])


@needs_library
@pytest.mark.parametrize(("kernel", "spec", "act"), KERNELS, ids=lambda v: getattr(v, "name", ""))
def test_no_rows_give_no_rows(kernel, spec, act):
    prepared = kernel.prepare(sample_weight(spec, 32, 64), act)
    assert tuple(kernel.apply(torch.empty(0, 64), prepared, None).shape) == (0, 32)


@needs_library
@pytest.mark.parametrize(("kernel", "spec", "act"), [*KERNELS, (*KERNELS[2][:2], ActivationSpec("int8", "tensor"))], ids=lambda v: getattr(v, "name", ""))
def test_compiled_module_traces_through_the_operator(kernel, spec, act):
    prepared = kernel.prepare(sample_weight(spec, 48, 64), act)

    def step(x):
        return kernel.apply(x * 2, prepared, None) + 1

    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    x = torch.randn(4, 64)
    torch._dynamo.reset()
    got = torch.compile(step, backend=backend, fullgraph=True)(x)
    assert torch.equal(got, step(x))
    assert any("bitgrain" in str(node.target) for graph in graphs for node in graph.graph.nodes)


@needs_library
def test_fake_tensors_carry_shapes_through_the_operators():
    from torch._subclasses.fake_tensor import FakeTensorMode

    kernel, spec, _ = KERNELS[0]
    prepared = kernel.prepare(sample_weight(spec, 48, 64), NO_ACTIVATION)
    with FakeTensorMode() as mode:
        held = {name: mode.from_tensor(tensor) for name, tensor in prepared.tensors.items()}
        y = kernel.apply(torch.empty(7, 64, dtype=torch.bfloat16), replace(prepared, tensors=held), None)
    assert tuple(y.shape) == (7, 48) and y.dtype == torch.bfloat16


@needs_library
@pytest.mark.parametrize("isa", library.available_sets())
@pytest.mark.parametrize(("stored", "dtype"), [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_dense_weight_of_the_other_sixteen_bit_type_is_multiplied_as_it_is_stored(isa, stored, dtype):
    """Converted to the type of x, these weights would be rounded to one number, or be infinite."""
    generator = torch.Generator().manual_seed(11)
    if stored == torch.float16:
        data, size = 1 + torch.randint(0, 4, (37, 1100), generator=generator) * 2.0**-10, 1.0
    else:
        data, size = torch.randn(37, 1100, generator=generator) * 2.0**20, 2.0**-18
    weight = DenseWeight(data.to(stored))
    problem = LinearProblem(weight.spec, NO_ACTIVATION, 37, 1100, str(dtype).removeprefix("torch."))
    chosen = select(problem, "cpu", Policy()).kernel
    assert chosen.name == "cpu.dense_panels" and chosen.fidelity(problem) is Fidelity.EXACT
    prepared, before = chosen.prepare(weight, NO_ACTIVATION), library.instruction_set()
    library.choose_instruction_set(isa)
    try:
        for rows in (1, 2, 3, 9, 100):
            x = torch.randint(1, 4, (rows, 1100), generator=generator).to(dtype) * size
            x[:, 1::2] = -x[:, ::2]
            want = x.double() @ weight.data.double().T
            got = chosen.apply(x, prepared, None)
            assert got.dtype == dtype and torch.allclose(got.double(), want, rtol=2.0**-8, atol=want.abs().max().item() * 2.0**-8), rows
    finally:
        library.choose_instruction_set(before)


@needs_library
def test_nan_codes_are_refused():
    codes = torch.full((16, 32), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises(BadValueError, match="512 NaN codes"):
        Float8Linear().prepare(FloatWeight(codes, torch.ones(1, 1), (16, 32)), NO_ACTIVATION)


def test_refusals_give_the_reason():
    assert "32 bits" in _reason(IntDotLinear(), int_affine(8, "channel"), ACTS[0], k=100_000)
    assert "int8 activations" in _reason(IntDotLinear(), int_affine(8, "channel"), NO_ACTIVATION)
    assert "scale per channel" in _reason(IntDotLinear(), int_affine(8, "group", 32), ACTS[0])
    assert "fnuz" in _reason(Float8Linear(), float8("fp8_e4m3fnuz", "tensor"), NO_ACTIVATION)


def _reason(kernel, spec, act, k=128):
    why = library.missing()
    reason = kernel.refusal(LinearProblem(spec, act.without_values(), 64, k, "bfloat16")).reason
    return reason if not why else pytest.skip(why)


def run_python(code, **env):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, check=False)


@needs_library
@pytest.mark.parametrize("isa", library.available_sets())
def test_instruction_set_is_chosen_by_the_environment(isa):
    result = run_python("from bitgrain.kernels.cpu import library; print(library.missing() or library.instruction_set())", BITGRAIN_CPU_ISA=isa)
    assert result.stdout.strip() == isa, result.stderr


@needs_library
def test_unknown_instruction_set_is_refused_by_name():
    with pytest.raises(RequestError, match="sse9"):
        library.choose_instruction_set("sse9")
    result = run_python("from bitgrain.kernels.cpu import library; library.native()", BITGRAIN_CPU_ISA="sse9")
    assert result.returncode == 1 and "BITGRAIN_CPU_ISA" in result.stderr


@needs_library
@pytest.mark.parametrize("isa", [name for name in library.SETS if name not in library.available_sets()])
def test_instruction_set_of_another_machine_is_refused_with_those_of_this_one(isa):
    with pytest.raises(RequestError, match="not on this machine"):
        library.choose_instruction_set(isa)
    result = run_python("from bitgrain.kernels.cpu import library; library.native()", BITGRAIN_CPU_ISA=isa)
    assert result.returncode == 1 and f"one of {', '.join(library.available_sets())}" in result.stderr


ABSENT = """
from pathlib import Path
from bitgrain.kernels.cpu import library
library.FILE = Path({file!r})
from bitgrain.kernels.base import Fidelity, LinearProblem
from bitgrain.kernels.selection import Policy, select
from bitgrain.weights import NO_ACTIVATION, WeightSpec
spec = WeightSpec("int_affine", "uint4", 4, "group", 32, zero="constant", scale_dtype="float16")
chosen = select(LinearProblem(spec, NO_ACTIVATION, 64, 64, "bfloat16"), "cpu", Policy())
print(chosen.kernel.name, "|", next(c.reason for c in chosen.candidates if c.name == "cpu.int_affine"))
"""


def test_absent_and_broken_libraries_are_different_answers_and_the_floor_runs(tmp_path):
    absent = run_python(ABSENT.format(file=str(tmp_path / "nothing.so")))
    assert absent.stdout.startswith("reference.linear | the native library was not built"), absent.stderr
    (tmp_path / "broken.so").write_bytes(b"not a library")
    broken = run_python(ABSENT.format(file=str(tmp_path / "broken.so")))
    assert broken.stdout.startswith("reference.linear | the native library is broken"), broken.stderr


def object_files():
    """Object files of one instruction set each, newer than their sources, in this checkout's build folder or the one that the variable names."""
    root = Path(__file__).parents[2]
    folders = [Path(os.environ["BITGRAIN_BUILD"])] if "BITGRAIN_BUILD" in os.environ else [root / "build"]
    found = [path for folder in folders for pattern in ("*avx*.cpp.o", "amx.cpp.o", "*neon*.cpp.o") for path in folder.rglob(pattern)]
    sources = {path.name: path.stat().st_mtime for path in (root / "native/src").glob("*.cpp")}
    return [path for path in found if path.stat().st_mtime > sources.get(path.stem, math.inf)]


def test_files_of_an_instruction_set_share_no_code():
    """A weak symbol in two of them would be kept once, and might be the one that needs instructions this machine lacks."""
    files, tool = object_files(), shutil.which("nm")
    if not files or tool is None:
        pytest.skip("no object files of the native library, or no nm")
    for path in files:
        lines = subprocess.run([tool, "-C", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
        symbols = [line.split(maxsplit=2)[1:] if line[0] != " " else line.split(maxsplit=1) for line in lines]
        defined = [name for kind, name in symbols if kind in "TDBRC"]
        assert [name for kind, name in symbols if kind in "WVu" and not name.startswith("DW.ref.")] == [], path.name
        assert all(name.startswith("bitgrain::") for name in defined) and 1 <= len(defined) <= 2, path.name
