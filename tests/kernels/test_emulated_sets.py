"""Instruction sets that this machine lacks, in emulation: integers of AVX-VNNI, AVX-512 and AMX, whose sources run with plain loops in the
place of the instructions, and whole libraries.

These take many minutes to build and to emulate: BITGRAIN_EMULATE=neon, vnni or avx512 asks for one, as tools/emulate_sets.sh has them.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bitgrain.kernels.cpu import library

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")

CHECK = r"""
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#include "kernels.hpp"
using namespace bitgrain;
#ifdef BITGRAIN_VNNI
const Kernels& bitgrain::avx2_kernels() { static const Kernels none = {}; return none; }
#endif
int main() {
  const int64_t n = 37, k = 61, quads = 18, panels = 3, rows = 19;
  std::vector<uint8_t> a(rows * quads * 4), codes(panels * quads * 64);
  std::vector<float> ones(panels * 16, 1.0f), y(rows * n);
  std::vector<int32_t> zeros(rows, 3), sums(panels * 16);
  for (auto& code : a) code = std::rand() & 1 ? 255 : uint8_t(std::rand());
  for (auto& code : codes) code = std::rand() & 1 ? 0x80 : uint8_t(std::rand());
  const auto at = [&](int64_t column, int64_t i) { return int(int8_t(codes[((column / 16 * quads + i / 4) * 16 + column % 16) * 4 + i % 4])); };
  for (int64_t column = 0; column < panels * 16; ++column)
    for (int64_t i = 0; i < quads * 4; ++i) sums[column] += at(column, i);
  IntegerArgs args = {a.data(), ones.data(), zeros.data(), codes.data(), ones.data(), sums.data(), nullptr, y.data(), rows, n, quads, F32};
  TESTED_kernels().integer(args, 0, 2, 0, rows);  // two panels and one: tiles take pairs
  TESTED_kernels().integer(args, 2, panels, 0, rows);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < n; ++column) {
      int32_t dot = -3 * sums[column];
      for (int64_t i = 0; i < quads * 4; ++i) dot += int32_t(a[row * quads * 4 + i]) * at(column, i);
      if (y[row * n + column] != float(dot)) return std::printf("row %d, out feature %d\n", int(row), int(column)), 1;
    }
  std::puts("equal");
  return std::strcmp(TESTED_kernels().name, "TESTED") != 0;
}
"""


AVX512_OPTIONS = ["-DBITGRAIN_AVX512_EMULATED=1", "-DBITGRAIN_BF16=1", "-Wno-psabi", "-include", str(ROOT / "native/tests/emulated_avx512.hpp")]
BUILDS = {
    "avxvnni": (["avxvnni.cpp"], ["-O1", "-DBITGRAIN_VNNI=1", "-DBITGRAIN_VNNI_EMULATED=1"]),
    "avx512": (["avx512.cpp"], ["-O0", *AVX512_OPTIONS]),
    "amx": (["amx.cpp", "avx512.cpp"], ["-O0", *AVX512_OPTIONS]),
}


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.skipif("avx2" not in library.available_sets(), reason="a processor without AVX2")
@pytest.mark.parametrize("name", BUILDS)
def test_integers_of_emulated_instructions_are_exact(name, tmp_path):
    sources, options = BUILDS[name]
    (tmp_path / "check.cpp").write_text(CHECK.replace("TESTED", name))
    flags = ["-std=c++17", "-ffp-contract=off", "-mavx2", "-mfma", "-mf16c", "-DBITGRAIN_X86=1", *options]
    files = [str(tmp_path / "check.cpp"), *(str(ROOT / "native/src" / source) for source in sources)]
    built = subprocess.run([COMPILER, *flags, "-I", str(ROOT / "native/include"), *files, "-o", str(tmp_path / "check")], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(tmp_path / "check")], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "equal\n")


@pytest.mark.parametrize("name", ["neon", "vnni", "avx512"])
@pytest.mark.timeout(7200)
def test_emulated_sets_agree_with_the_portable_one(name, tmp_path):
    if os.environ.get("BITGRAIN_EMULATE") != name:
        pytest.skip(f"takes many minutes; BITGRAIN_EMULATE={name} runs it")
    env = {"OPTIMIZE": "-O0" if name == "neon" else "-O1", **os.environ}
    ran = subprocess.run([str(ROOT / "tools/emulate_sets.sh"), name, str(tmp_path / name)], capture_output=True, text=True, env=env)
    if ran.returncode == 77:
        pytest.skip(ran.stdout.strip())
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_machine_without_a_compiler_is_told_so(tmp_path):
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "dirname"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    env = {"PATH": str(tmp_path / "bin")}
    ran = subprocess.run([str(ROOT / "tools/emulate_sets.sh"), "avx512", str(tmp_path / "build")], capture_output=True, text=True, env=env)
    assert (ran.returncode, ran.stdout) == (77, "no c++\n")
