#!/usr/bin/env bash
# Builds the native library for instruction sets that this machine lacks, and compares them with the portable one in an emulator;
# see docs/instruction-sets.md.
#   tools/emulate_sets.sh neon|vnni|avx512 [FOLDER]     FOLDER keeps the build (default build/emulated-…); OPTIMIZE=-O1 builds sooner
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
kind=${1:-}
folder=${2:-$root/build/emulated-$kind}
optimize=${OPTIMIZE:--O3}
cmake=$(command -v cmake || echo "$root/.venv/bin/cmake")
options=(-DCMAKE_BUILD_TYPE=Release "-DCMAKE_CXX_FLAGS_RELEASE=$optimize")
run=()
case $kind in
  neon)
    compiler=$(command -v aarch64-linux-gnu-g++ || command -v aarch64-linux-gnu-g++-12 || true)
    emulator=$(command -v qemu-aarch64-static || command -v qemu-aarch64 || true)
    [ -n "$compiler" ] || { echo "no aarch64-linux-gnu-g++"; exit 77; }
    [ -n "$emulator" ] || { echo "no qemu-aarch64"; exit 77; }
    options+=(-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 "-DCMAKE_CXX_COMPILER=$compiler")
    run=("$emulator" -L /usr/aarch64-linux-gnu)
    ;;
  vnni)
    compiler=${CXX:-c++}
    options+=(-DBITGRAIN_EMULATE_VNNI=ON)
    ;;
  avx512)
    compiler=$(command -v "${CXX:-c++}" || true)
    [ -n "$compiler" ] || { echo "no ${CXX:-c++}"; exit 77; }
    grep -qw avx2 /proc/cpuinfo || { echo "no AVX2, which the loops are built for"; exit 77; }
    options+=(-DBITGRAIN_EMULATE_AVX512=ON)
    ;;
  *)
    echo "usage: $0 neon|vnni|avx512 [FOLDER]"
    exit 2
    ;;
esac
"$cmake" -S "$root/native" -B "$folder" "${options[@]}" > "$folder.log" 2>&1 || { cat "$folder.log"; exit 1; }
"$cmake" --build "$folder" -j "$(nproc)" >> "$folder.log" 2>&1 || { tail -50 "$folder.log"; exit 1; }
"$compiler" -std=c++17 -O1 -I "$root/native/include" "$root/native/tests/compare_sets.cpp" -o "$folder/compare_sets" -ldl
export OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive
if [ "$kind" = neon ]; then
  "${run[@]}" -cpu max "$folder/compare_sets" "$folder/libbitgrain_cpu.so"
  "${run[@]}" -cpu cortex-a53 "$folder/compare_sets" "$folder/libbitgrain_cpu.so"
else
  "$folder/compare_sets" "$folder/libbitgrain_cpu.so"
fi
