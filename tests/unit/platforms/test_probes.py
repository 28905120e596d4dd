"""The probe of each accelerator, on fake device modules: present, absent, broken and incompatible, each with its reason."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import bitgrain.kernels
from bitgrain.platforms import cuda, devices, hip, mps, npu, xpu
from bitgrain.platforms.base import ProbeReport
from bitgrain.platforms.probe import known_platforms, parse_request

GIB = 1 << 30


@pytest.fixture(autouse=True)
def no_device(monkeypatch):
    """A torch without any accelerator, whatever this machine has."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.fixture
def operators():
    """Registers operators with torch's dispatcher: `operators(dispatch key, "namespace::name(schema)", …)`."""
    made = []

    def register(key, *names):
        for name in names:
            space, rest = name.split("::")
            library = torch.library.Library(space, "FRAGMENT")
            if "(" in rest:
                library.define(rest)
            library.impl(rest.partition("(")[0], lambda *arguments: None, key)
            made.append(library)

    yield register
    for library in made:
        library._destroy()


def cuda_module(*capabilities, arch=("sm_80", "sm_90", "compute_90"), names=(), **changes):
    """torch.cuda with devices of these capabilities, or of these gfx names."""
    found = [
        SimpleNamespace(name=f"GPU {i}", major=c[0], minor=c[1], multi_processor_count=100 + i, total_memory=(80 - i) * GIB) for i, c in enumerate(capabilities)
    ] + [SimpleNamespace(name=f"Card {i}", gcnArchName=n, major=9, minor=4, multi_processor_count=304, total_memory=192 * GIB) for i, n in enumerate(names)]
    return SimpleNamespace(**{
        "is_available": lambda: bool(found), "device_count": lambda: len(found), "get_device_properties": lambda i: found[i], "get_arch_list": lambda: list(arch), **changes,
    })  # fmt: skip


def with_cuda(monkeypatch, module, version="cuda"):
    monkeypatch.setattr(torch.version, version, "13.0")
    monkeypatch.setattr(torch, "cuda", module)


def raising(error):
    def function(*arguments):
        raise error

    return function


# NVIDIA


def test_cuda_is_absent_without_a_build_without_a_device_and_under_rocm(monkeypatch):
    assert cuda._probe() == ProbeReport("cuda", "absent: torch is built without CUDA")
    with_cuda(monkeypatch, cuda_module())
    assert cuda._probe().state == "absent: no device is visible"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert cuda._probe().state.startswith("absent: torch is built for ROCm")


def test_cuda_is_present_with_features_of_its_generation(monkeypatch, operators):
    operators("CUDA", "aten::_scaled_mm", "aten::_weight_int8pack_mm")
    with_cuda(monkeypatch, cuda_module((9, 0)))
    report = cuda._probe()
    assert (report.state, report.platform.generation, report.platform.devices) == ("present", "sm90", ("GPU 0",))
    assert report.platform.features == {"sm90", "bf16", "fp16", "int8_dot", "fp8_dot", "op:aten::_scaled_mm", "op:aten::_weight_int8pack_mm"}
    assert (report.platform.cores, report.platform.memory, report.platform.device_type) == (100, 80 * GIB, "cuda")


def test_operators_are_those_that_are_registered_now(monkeypatch, operators):
    with_cuda(monkeypatch, cuda_module((9, 0)))
    assert not any(f.startswith("op:") for f in cuda._probe().platform.features)
    operators("CUDA", "aten::_int_mm")
    assert {f for f in cuda._probe().platform.features if f.startswith("op:")} == {"op:aten::_int_mm"}
    assert devices.registered(["no_such::operator"], "CUDA") == frozenset()


def test_several_devices_count_on_what_all_of_them_have(monkeypatch):
    with_cuda(monkeypatch, cuda_module((9, 0), (8, 0)))
    platform = cuda._probe().platform
    assert platform.features == {"bf16", "fp16", "int8_dot"} and platform.generation == ""
    assert (platform.cores, platform.memory, platform.devices) == (100, 79 * GIB, ("GPU 0", "GPU 1"))


def test_device_that_torch_has_no_code_for_is_incompatible(monkeypatch):
    with_cuda(monkeypatch, cuda_module((7, 5)))
    report = cuda._probe()
    assert report.platform is None and report.state == "incompatible: GPU 0 is of generation sm75, and this torch has code for sm_80, sm_90, compute_90 only"
    with_cuda(monkeypatch, cuda_module((7, 5), (9, 0)))
    report = cuda._probe()
    assert report.state == "present" and report.platform.generation == "sm90" and list(report.unusable) == [0]


@pytest.mark.parametrize(
    "number, built_for, runs",
    [
        (90, ["sm_90"], True), (86, ["sm_80"], True), (80, ["sm_86"], False), (90, ["sm_80"], False), (120, ["sm_90", "compute_90"], True), (75, ["compute_90"], False),
        (87, ["sm_80"], False), (90, ["sm_90a"], True), (100, ["sm_90a"], False), (103, ["sm_100a"], False), (103, ["sm_100f"], True), (120, ["compute_100f"], False), (90, [], True),
    ],
)  # fmt: skip
def test_code_runs_where_nvidia_guarantees_it(number, built_for, runs):
    assert cuda.has_code(number, built_for) is runs


def test_generation_without_a_profile_has_what_its_predecessors_guarantee():
    assert cuda._features(88) == {"sm88", "bf16", "fp16", "int8_dot"}
    assert cuda._features(122) == {"sm122", "bf16", "fp16", "int8_dot", "fp8_dot", "scaled_dot"}
    assert cuda._features(130) == {"sm130", "bf16", "fp16", "int8_dot", "fp8_dot"}
    assert cuda._features(61) == {"sm61"}


@pytest.mark.parametrize("function", ["is_available", "device_count", "get_device_properties"])
def test_cuda_whose_driver_raises_is_broken(monkeypatch, function):
    with_cuda(monkeypatch, cuda_module((9, 0), **{function: raising(RuntimeError("CUDA driver error 999\nmore lines"))}))
    assert cuda._probe().state == "broken: asking torch.cuda for devices raised RuntimeError: CUDA driver error 999"


def test_torch_whose_device_module_lacks_what_is_asked_is_incompatible(monkeypatch):
    module = cuda_module((9, 0))
    del module.get_arch_list
    with_cuda(monkeypatch, module)
    assert cuda._probe().state == "incompatible: torch.cuda of this torch has no get_arch_list"


# AMD


def test_cuda_and_hip_never_both_claim_the_devices(monkeypatch):
    with_cuda(monkeypatch, cuda_module((9, 0)))
    assert cuda._probe().platform is not None and hip._probe().state == "absent: torch is built without ROCm"
    monkeypatch.setattr(torch.version, "cuda", None)
    with_cuda(monkeypatch, cuda_module(names=["gfx942:sramecc+:xnack-"], arch=["gfx90a", "gfx942"]), "hip")
    assert hip._probe().platform is not None and cuda._probe().platform is None


def test_hip_answers(monkeypatch, operators):
    operators("CUDA", "aten::_scaled_mm")
    with_cuda(monkeypatch, cuda_module(names=["gfx942:sramecc+:xnack-"], arch=["gfx90a", "gfx942"]), "hip")
    platform = hip._probe().platform
    assert platform.features == {"gfx942", "bf16", "fp16", "int8_dot", "fp8_fnuz_dot", "op:aten::_scaled_mm"} and platform.device_type == "cuda"
    with_cuda(monkeypatch, cuda_module(names=["gfx1100"], arch=["gfx90a", "gfx942"]), "hip")
    assert hip._probe().state == "incompatible: Card 0 is of generation gfx1100, and this torch has code for gfx90a, gfx942 only"
    with_cuda(monkeypatch, cuda_module(names=["gfx1103"], arch=["gfx11-generic"]), "hip")
    assert hip._probe().platform.features == {"gfx1103", "op:aten::_scaled_mm"}
    with_cuda(monkeypatch, cuda_module(names=["gfx942"], device_count=raising(RuntimeError("HIP error"))), "hip")
    assert hip._probe().state == "broken: asking torch.cuda for devices raised RuntimeError: HIP error"
    with_cuda(monkeypatch, cuda_module(), "hip")
    assert hip._probe().state == "absent: no device is visible"


# Intel


def xpu_module(found=None, **changes):
    return SimpleNamespace(**{
        "is_available": lambda: found is not None, "device_count": lambda: int(found is not None), "get_device_properties": lambda i: found, "_is_compiled": lambda: True, **changes,
    })  # fmt: skip


def intel(**changes):
    return SimpleNamespace(**{
        "name": "Max 1550", "architecture": 13136561920, "has_fp16": True, "has_bfloat16_conversions": True, "has_subgroup_matrix_multiply_accumulate": True,
        "gpu_subslice_count": 64, "max_compute_units": 512, "total_memory": 64 * GIB, **changes,
    })  # fmt: skip


def test_xpu_answers(monkeypatch, operators):
    monkeypatch.setattr(torch, "xpu", xpu_module(_is_compiled=lambda: False))
    assert xpu._probe().state == "absent: torch is built without XPU"
    monkeypatch.setattr(torch, "xpu", xpu_module())
    assert xpu._probe().state == "absent: no device is visible"
    monkeypatch.setattr(torch, "xpu", xpu_module(intel(), device_count=raising(RuntimeError("level zero"))))
    assert xpu._probe().state == "broken: asking torch.xpu for devices raised RuntimeError: level zero"
    monkeypatch.setattr(torch, "xpu", xpu_module(intel(has_fp16=False, has_bfloat16_conversions=False)))
    assert xpu._probe().state == "incompatible: Max 1550 computes in neither float16 nor bfloat16"
    operators("XPU", "aten::_weight_int4pack_mm_with_scales_and_zeros")
    monkeypatch.setattr(torch, "xpu", xpu_module(intel()))
    platform = xpu._probe().platform
    assert platform.features == {"xe_hpc", "bf16", "fp16", "int8_dot", "op:aten::_weight_int4pack_mm_with_scales_and_zeros"} and platform.cores == 64
    monkeypatch.delattr(torch, "xpu")
    assert xpu._probe().state == "absent: torch is built without XPU"


@pytest.mark.parametrize("architecture, name", [(13136561920, "xe_hpc"), (21479031808, "xe2"), (0, ""), (12 << 30 | 55 << 22, "xe_hpg"), (30 << 30, "xe3")])
def test_xpu_generation_is_read_from_the_graphics_ip(architecture, name):
    assert xpu.generation_of(architecture) == name
    assert name in xpu.GENERATIONS or not name


# Ascend


def npu_module(name="Ascend910B3", **changes):
    properties = SimpleNamespace(total_memory=64 * GIB, cube_core_num=20)
    return SimpleNamespace(**{
        "is_available": lambda: bool(name), "device_count": lambda: int(bool(name)), "get_device_name": lambda i: name, "get_device_properties": lambda i: properties, **changes,
    })  # fmt: skip


@pytest.fixture
def torch_npu(monkeypatch):
    """Installs a fake package with this torch.npu."""

    def install(module):
        monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
        monkeypatch.setattr(torch, "npu", module, raising=False)

    return install


def test_npu_is_absent_without_its_package_and_without_a_device(torch_npu, monkeypatch):
    monkeypatch.setattr(npu, "importable", lambda package: False)
    assert npu._probe() == ProbeReport("npu", "absent: torch_npu is not installed")
    monkeypatch.undo()
    torch_npu(npu_module(name=""))
    assert npu._probe().state == "absent: no device is visible"


def test_npu_package_that_does_not_import_is_broken(tmp_path, monkeypatch):
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    assert npu._probe().state == "broken: importing torch_npu failed: ImportError: libhccl.so: cannot open shared object file"


def test_npu_whose_driver_raises_is_broken(torch_npu):
    torch_npu(npu_module(is_available=raising(RuntimeError("aclInit failed, error 507008"))))
    assert npu._probe().state == "broken: asking torch.npu of torch_npu for devices raised RuntimeError: aclInit failed, error 507008"


def test_npu_that_lacks_functions_or_operators_or_is_unknown_is_incompatible(torch_npu):
    torch_npu(npu_module())
    assert npu._probe().state == "incompatible: this torch_npu registers none of npu::npu_quant_matmul, npu::npu_weight_quant_batchmatmul, npu::npu_grouped_matmul"
    torch_npu(npu_module(name="Ascend910A"))
    assert npu._probe().state.startswith("incompatible: Ascend910A is of none of the generations 910b, ")
    module = npu_module()
    del module.get_device_name
    torch_npu(module)
    assert npu._probe().state == "incompatible: torch.npu of torch_npu of this torch has no get_device_name"


def test_npu_is_present_with_the_operators_that_its_package_registers(torch_npu, operators):
    operators("PrivateUse1", "npu::npu_quant_matmul(Tensor x) -> Tensor", "npu::npu_dynamic_quant(Tensor x) -> Tensor")
    torch_npu(npu_module())
    platform = npu._probe().platform
    assert platform.features == {"910b", "bf16", "fp16", "int8_dot", "int4_dot", "op:npu::npu_quant_matmul", "op:npu::npu_dynamic_quant"}
    assert (platform.cores, platform.memory, platform.device_type) == (20, 64 * GIB, "npu")


@pytest.mark.parametrize("name, generation", [("Ascend910B3", "910b"), ("Ascend910B", ""), ("Ascend910_9382", "910_93"), ("Ascend910_9589", "910_95"), ("Ascend950PR_9579", "910_95"), ("Ascend310P3", "310p")])
def test_npu_generation_is_read_from_the_devices_name(name, generation):
    assert npu.generation_of(name) == generation


# Apple


def mps_module(**changes):
    return SimpleNamespace(**{"is_built": lambda: True, "is_available": lambda: True, "get_name": lambda: "Apple M3 Max", "get_core_count": lambda: 40, **changes})


def test_mps_answers(monkeypatch, operators):
    monkeypatch.setattr(mps, "_holds", lambda dtype: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 48 * GIB)
    monkeypatch.setattr(torch.backends, "mps", mps_module(is_built=lambda: False))
    assert mps._probe().state == "absent: torch is built without MPS"
    monkeypatch.setattr(torch.backends, "mps", mps_module(is_available=lambda: False))
    assert mps._probe().state == "absent: no device is visible"
    operators("MPS", "aten::_weight_int4pack_mm")
    monkeypatch.setattr(torch.backends, "mps", mps_module())
    platform = mps._probe().platform
    assert platform.features == {"m3", "bf16", "fp16", "op:aten::_weight_int4pack_mm"} and (platform.cores, platform.memory) == (40, 48 * GIB)
    monkeypatch.setattr(torch.backends, "mps", mps_module(get_name=raising(RuntimeError("Metal"))))
    assert mps._probe().state == "broken: asking torch.backends.mps for devices raised RuntimeError: Metal"
    module = mps_module()
    del module.get_core_count
    monkeypatch.setattr(torch.backends, "mps", module)
    assert mps._probe().state == "incompatible: torch.backends.mps of this torch has no get_core_count"
    monkeypatch.setattr(mps, "_holds", lambda dtype: False)
    monkeypatch.setattr(torch.backends, "mps", mps_module())
    assert mps._probe().state == "incompatible: Apple M3 Max holds neither float16 nor bfloat16"


# profiles


@pytest.mark.parametrize("module", [cuda, hip, xpu, npu, mps], ids=lambda m: m.__name__.rpartition(".")[2])
def test_every_generation_has_its_name_and_only_operators_that_the_probe_asks_for(module):
    asked = {f"op:{name}" for name in module._ASKING.operators}
    for name, features in module.GENERATIONS.items():
        assert name in features and {f for f in features if f.startswith("op:")} <= asked
        assert parse_request(f"{module.PLATFORM.key}:{name}").generation == name
    assert module.PLATFORM.key in known_platforms()


def test_operators_that_kernels_ask_for_are_ones_that_a_probe_looks_at():
    known = {f"op:{name}" for module in (cuda, hip, xpu, npu, mps) for name in module._ASKING.operators}
    asked = {text for path in Path(bitgrain.kernels.__path__[0]).rglob("*.py") for text in re.findall(r'"(op:\w+::\w+)"', path.read_text())}
    assert asked <= known
