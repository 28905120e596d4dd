"""Instruction sets that this machine lacks, in emulation: the sums of AVX-VNNI's sources, and NEON in another processor's emulator.

The whole library for NEON takes many minutes to build and to emulate: BITGRAIN_EMULATE=neon asks for it.
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
const Kernels& bitgrain::avx2_kernels() { static const Kernels none = {}; return none; }
int main() {
  const int64_t n = 21, k = 61, quads = 16, panels = 2, rows = 7;
  std::vector<uint8_t> a(rows * quads * 4), codes(panels * quads * 64);
  std::vector<float> ones(panels * 16, 1.0f), y(rows * n);
  std::vector<int32_t> zeros(rows, 3), sums(panels * 16);
  for (auto& code : a) code = std::rand() & 1 ? 255 : uint8_t(std::rand());
  for (auto& code : codes) code = std::rand() & 1 ? 0x80 : uint8_t(std::rand());
  const auto at = [&](int64_t column, int64_t i) { return int(int8_t(codes[((column / 16 * quads + i / 4) * 16 + column % 16) * 4 + i % 4])); };
  for (int64_t column = 0; column < panels * 16; ++column)
    for (int64_t i = 0; i < quads * 4; ++i) sums[column] += at(column, i);
  IntegerArgs args = {a.data(), ones.data(), zeros.data(), codes.data(), ones.data(), sums.data(), nullptr, y.data(), rows, n, quads, F32};
  avxvnni_kernels().integer(args, 0, panels, 0, rows);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < n; ++column) {
      int32_t dot = -3 * sums[column];
      for (int64_t i = 0; i < quads * 4; ++i) dot += int32_t(a[row * quads * 4 + i]) * at(column, i);
      if (y[row * n + column] != float(dot)) return std::printf("row %d, out feature %d\n", int(row), int(column)), 1;
    }
  std::puts("equal");
  return std::strcmp(avxvnni_kernels().name, "avxvnni") != 0;
}
"""


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.skipif("avx2" not in library.available_sets(), reason="a processor without AVX2")
def test_integers_of_avx_vnni_are_exact(tmp_path):
    (tmp_path / "check.cpp").write_text(CHECK)
    flags = ["-std=c++17", "-O1", "-mavx2", "-mfma", "-mf16c", "-DBITGRAIN_X86=1", "-DBITGRAIN_VNNI=1", "-DBITGRAIN_VNNI_EMULATED=1"]
    files = [str(tmp_path / "check.cpp"), str(ROOT / "native/src/avxvnni.cpp")]
    built = subprocess.run([COMPILER, *flags, "-I", str(ROOT / "native/include"), *files, "-o", str(tmp_path / "check")], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(tmp_path / "check")], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "equal\n")


@pytest.mark.skipif(os.environ.get("BITGRAIN_EMULATE") != "neon", reason="takes many minutes; BITGRAIN_EMULATE=neon runs it")
@pytest.mark.timeout(1200)
def test_neon_agrees_with_the_portable_set_in_an_emulator(tmp_path):
    env = {**os.environ, "OPTIMIZE": "-O0"}
    ran = subprocess.run([str(ROOT / "tools/emulate_sets.sh"), "neon", str(tmp_path / "neon")], capture_output=True, text=True, env=env)
    if ran.returncode == 77:
        pytest.skip(ran.stdout.strip())
    assert ran.returncode == 0, ran.stdout + ran.stderr
