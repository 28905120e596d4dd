// Compares every instruction set that this machine (or its emulator) has with the portable one, through the C interface, on odd
// shapes; and every row with the same row alone, bit for bit.  Prints a line per set and function; fails if any differ.
//
//   compare_sets [library]     libbitgrain_cpu.so beside it unless named
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "block_layout.hpp"
#include "codebook.hpp"
#include "hadamard.hpp"
#include "kernels.hpp"

using namespace bitgrain;

namespace {

using Floats = std::vector<float>;

void* library;

template <class Function>
Function* symbol(const char* name) {
  void* found = dlsym(library, name);
  if (found == nullptr) {
    std::printf("no function %s\n", name);
    std::exit(2);
  }
  return reinterpret_cast<Function*>(found);
}

uint64_t state = 88172645463325252u;

uint32_t random_bits() {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return uint32_t(state >> 20);
}

float random_float() { return float(int32_t(random_bits())) / 2147483648.0f; }

Floats random_floats(int64_t count, float size = 1.0f) {
  Floats values;
  for (int64_t i = 0; i < count; ++i) values.push_back(random_float() * size);
  return values;
}

template <class T>
std::vector<T> random_codes(int64_t count, uint32_t range) {
  std::vector<T> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(T(range ? random_bits() % range : random_bits()));
  return values;
}

// halves or bfloat16 of numbers from 1/4 to 1
std::vector<uint16_t> random_scales(int64_t count, int32_t dtype) {
  std::vector<uint16_t> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(uint16_t(dtype == F16 ? 0x3400 + random_bits() % 0x800 : 0x3e80 + random_bits() % 0x100));
  return values;
}

struct Case {
  std::string name;
  int64_t rows, n;
  double tolerance;  // of the largest number; 0: the same bits
  std::function<void(int64_t first, int64_t rows, float* y)> run;  // of these rows alone
};

std::vector<Case> cases;
int64_t failures = 0;

void grouped_cases() {
  auto* call = symbol<int32_t(const void*, int32_t, int64_t, int64_t, const int32_t*, const void*, int32_t, const void*, int32_t, const float*, const float*,
                              const int8_t*, float, const void*, int32_t, float, const int32_t*, int64_t, int64_t, int64_t, const float*, const void*, void*,
                              int32_t, int32_t)>("bg_grouped_table");
  static const char* const NAMES[] = {"grouped nibble", "grouped byte", "grouped e4m3", "grouped e5m2", "grouped table", "grouped bf16", "grouped f16", "grouped f32"};
  const int64_t BYTES[] = {64, 128, 128, 128, 64, 256, 256, 512};
  for (int32_t kind = NIBBLE; kind <= DENSE_F32; ++kind)
    for (const int32_t variant : {0, 1, 2, 3}) {  // activations of bfloat16 may take tiles: rows for several, groups of whole steps
      const bool whole = variant & 1, bf16 = variant & 2;
      if (whole && kind != TABLE4) continue;
      const int64_t n = 37, units = 53, panels = 3, groups = 5, rows = bf16 ? 37 : 11;
      const auto ends = bf16 ? std::vector<int32_t>{16, 20, 36, 40, 53} : std::vector<int32_t>{16, 20, 37, 38, 53};
      auto codes = random_codes<uint8_t>(panels * units * BYTES[kind], 0);
      if (kind == E4M3) for (auto& code : codes) code = uint8_t((code & 0x7f) == 0x7f ? 0x7e : code);
      if (kind == E5M2) for (auto& code : codes) code = uint8_t((code & 0x7c) == 0x7c ? code & 0xbf : code);
      if (kind >= DENSE_BF16) {
        const auto dense = random_floats(panels * units * 128);
        if (kind == DENSE_F32) std::memcpy(codes.data(), dense.data(), codes.size());
        else for (size_t i = 1; i < codes.size(); i += 2) codes[i] = uint8_t((codes[i] & 0x83) | 0x38);
      }
      const auto scale = random_scales(panels * groups * 16, BF16);
      const auto zero = random_codes<int16_t>(panels * groups * 16, 8);
      auto table = random_floats(16);
      auto numbers = std::vector<int8_t>{0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
      if (whole) for (int i = 0; i < 16; ++i) table[size_t(i)] = float(numbers[size_t(i)]) * 0.5f;
      const auto wide = random_floats(rows * units * 8);
      auto narrow = random_scales(rows * units * 8, BF16);
      for (auto& value : narrow) value = uint16_t(value | (random_bits() & 0x8000));
      const std::string name = std::string(whole ? "grouped whole table" : NAMES[kind]) + (bf16 ? ", x bf16" : "");
      cases.push_back({name, rows, n, 3e-6, [=](int64_t first, int64_t count, float* y) {
        const void* x = bf16 ? static_cast<const void*>(narrow.data() + first * units * 8) : wide.data() + first * units * 8;
        call(x, bf16 ? BF16 : F32, count, units * 8, nullptr, codes.data(), kind, scale.data(), BF16, nullptr, table.data(),
             whole ? numbers.data() : nullptr, 0.5f, kind == NIBBLE ? zero.data() : nullptr, 0, 0.0f, ends.data(), groups, units, n, nullptr, nullptr, y, F32, 2);
      }});
    }
}

void integer_cases() {
  auto* call = symbol<int32_t(const void*, int32_t, int64_t, int64_t, int32_t, int32_t, float, int32_t, float, const void*, const float*, const int32_t*, int64_t,
                              int64_t, const void*, void*, int32_t)>("bg_integer");
  for (const bool extreme : {false, true}) {
    const int64_t n = 45, k = 1003, quads = 252, rows = 13, panels = 3;
    auto codes = random_codes<uint8_t>(panels * quads * 64, 0);
    if (extreme) for (auto& code : codes) code = uint8_t(code & 1 ? 0x80 : 0x7f);
    auto sums = std::vector<int32_t>(size_t(panels * 16));
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t q = 0; q < quads; ++q)
        for (int64_t c = 0; c < 16; ++c)
          for (int64_t j = 0; j < 4; ++j) {
            uint8_t& code = codes[size_t(((p * quads + q) * 16 + c) * 4 + j)];
            if (4 * q + j >= k) code = 0;
            sums[size_t(p * 16 + c)] += int8_t(code);
          }
    const auto scale = random_floats(panels * 16);
    auto x = random_floats(rows * k);
    if (extreme) for (auto& value : x) value = value < 0 ? -1.0f : 1.0f;
    for (const int32_t rules : {0, 1}) {
      cases.push_back({"integer", rows, n, 0.0, [=](int64_t first, int64_t count, float* y) {
        call(x.data() + first * k, F32, count, k, rules, PER_TOKEN, 1.0f, 0, 127.0f, codes.data(), scale.data(), sums.data(), quads, n, nullptr, y, 2);
      }});
    }
  }
}

// The scales (and minima) at the head of every record: random numbers from -1 to 1 instead of random bits, so that no result is infinite.
void set_scales(const BlockFormat& format, int64_t k, int64_t panels, int64_t panel_bytes, std::vector<uint8_t>& data) {
  const int64_t units = k / 32, record_bytes = RecordLayout(format, 8).end;
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t first = 0; first < units; first += 8) {
      uint8_t* to = data.data() + panel * panel_bytes + first / 8 * record_bytes;
      const int64_t count = RecordLayout(format, std::min(units - first, int64_t(8))).points / (format.scale_dtype == F32 ? 4 : 2);
      for (int64_t i = 0; i < count; ++i) {
        const float value = random_float();
        const uint16_t half = uint16_t((random_bits() & 0x83ff) | (0x2c00 + (random_bits() % 4 << 10)));
        if (format.scale_dtype == F32) std::memcpy(to + 4 * i, &value, 4);
        else if (format.scale_dtype == BF16) std::memcpy(to + 2 * i, reinterpret_cast<const uint8_t*>(&value) + 2, 2);
        else std::memcpy(to + 2 * i, &half, 2);
      }
    }
}

void block_cases() {
  auto* call = symbol<int32_t(const void*, int32_t, int64_t, int64_t, const int32_t*, const void*, const float*, int64_t, const void*, void*, int32_t, int32_t)>(
      "bg_block_linear");
  auto* size = symbol<int64_t(const int32_t*, int64_t)>("bg_block_panel_bytes");
  const BlockFormat FORMATS[] = {
      {CODE_1, NO_SUB, NO_MINIMUM, F16, 32, 128, 1},       {CODE_2, NIBBLE_SUB, SCALED_MINIMUM, F16, 16, 256, 0}, {CODE_3, SIGNED_SUB, NO_MINIMUM, F16, 16, 256, 4},
      {CODE_4, UNSIGNED_SUB, SCALED_MINIMUM, F16, 32, 256, 0}, {CODE_4, NO_SUB, ZERO_POINT, BF16, 32, 128, 0}, {CODE_4, NO_SUB, FLOAT_POINT, F32, 32, 64, 0},   {CODE_5, NO_SUB, ADDED_MINIMUM, F16, 32, 32, 0},
      {CODE_6, SIGNED_SUB, NO_MINIMUM, F16, 16, 256, 32},  {CODE_8, NO_SUB, NO_MINIMUM, F16, 32, 32, 128},         {CODE_8, NO_SUB, ZERO_POINT, F32, 32, 64, 0},
      {CODE_8, NO_SUB, NO_MINIMUM, F16, 16, 32, 128},      {LEVELS_4, SIGNED_SUB, NO_MINIMUM, F16, 32, 256, 128},  {FLOAT_4, E8M0_SUB, NO_MINIMUM, F32, 32, 0, 12},
      {FLOAT_4, E4M3_SUB, NO_MINIMUM, F32, 16, 0, 12},
  };
  for (const BlockFormat& format : FORMATS)
    for (const int32_t dtype : {F32, BF16, F16})
      for (const int32_t precision : {0, 1}) {
        const int64_t n = 75, k = 864, rows = 35, panels = 5;  // 27 units: three records and a short one
        int32_t numbers[7];
        std::memcpy(numbers, &format, sizeof numbers);
        const int64_t bytes = size(numbers, k);
        auto data = random_codes<uint8_t>(panels * bytes, 0);
        for (uint8_t& byte : data) {  // scales of bytes stay near 1
          if (format.sub == E4M3_SUB) byte &= 0x77;
          if (format.sub == E8M0_SUB) byte = uint8_t(100 + byte % 32);
        }
        if (format.span) set_scales(format, k, panels, bytes, data);
        const auto wide = random_floats(rows * k);
        auto narrow = std::vector<uint16_t>();
        for (float value : wide) {
          uint32_t bits;
          std::memcpy(&bits, &value, 4);
          narrow.push_back(uint16_t(dtype == BF16 ? bits >> 16 : (bits >> 16 & 0x8000) | 0x2c00 | (bits & 0xfff)));
        }
        const auto factor = random_floats(n);
        cases.push_back({precision ? "blocks, fast" : "blocks", rows, n, dtype == F32 && !precision ? 3e-6 : dtype == BF16 ? 8e-3 : precision ? 3e-2 : 1e-3, [=](int64_t first, int64_t count, float* y) {
          const void* x = dtype == F32 ? static_cast<const void*>(wide.data() + first * k) : narrow.data() + first * k;
          if (dtype == F32) {
            call(x, dtype, count, k, numbers, data.data(), factor.data(), n, nullptr, y, precision, 2);
            return;
          }
          std::vector<uint16_t> half(size_t(count * n));
          call(x, dtype, count, k, numbers, data.data(), factor.data(), n, nullptr, half.data(), precision, 2);
          for (size_t i = 0; i < half.size(); ++i) {
            const uint32_t h = half[i], sign = (h & 0x8000) << 16, bits = h & 0x7fff;
            if (dtype == BF16) {
              const uint32_t wide_bits = h << 16;
              std::memcpy(&y[i], &wide_bits, 4);
            } else {
              const float value = bits >= 0x7c00 ? INFINITY : bits < 0x400 ? std::ldexp(float(bits), -24) : std::ldexp(float((bits & 0x3ff) | 0x400), int(bits >> 10) - 25);
              y[i] = sign ? -value : value;
            }
          }
        }});
      }
}

CodeProduct product_of(const Floats& x, int64_t first, int64_t rows, int64_t k, int64_t n, float* y) {
  CodeProduct p = {};
  p.x = x.data() + first * k;
  p.rows = rows;
  p.k = k;
  p.n = n;
  p.units = (k + 7) / 8;
  p.scale_rows = 1;
  p.factor = 0.5f;
  p.y = y;
  p.threads = 2;
  return p;
}

void codebook_cases() {
  auto* additive = symbol<int32_t(const CodeProduct*, const AdditiveCodes*)>("bg_additive");
  auto* lattice = symbol<int32_t(const CodeProduct*, const LatticeCodes*)>("bg_lattice");
  auto* trellis = symbol<int32_t(const CodeProduct*, const TrellisCodes*)>("bg_trellis");
  auto* vector = symbol<int32_t(const CodeProduct*, const VectorCodes*, int32_t)>("bg_vector");
  auto* lookup = symbol<int32_t(const CodeProduct*, const LookupCodes*)>("bg_lookup");
  const int64_t rows = 7;
  for (const int64_t g : {8, 16, 6}) {
    const int64_t k = 48 * 9, n = 38;
    const auto x = random_floats(rows * k);
    const auto codes = random_codes<uint8_t>(n * (k / g) * 2, 0);
    const auto books = random_scales(2 * 256 * g, F16);
    cases.push_back({"additive", rows, n, 3e-6, [=](int64_t first, int64_t count, float* y) {
      const CodeProduct p = product_of(x, first, count, k, n, y);
      const AdditiveCodes c = {codes.data(), 1, 8, 2, books.data(), F16, 1, g};
      additive(&p, &c);
    }});
  }
  for (const int32_t residual : {0, 1, 2}) {
    const int64_t k = 1096, n = 41, units = k / 8;
    const auto x = random_floats(rows * k);
    const auto codes = random_codes<uint16_t>(n * units, 0), more = random_codes<uint16_t>(n * units, 0);
    const auto magnitudes = random_floats(256 * 8), shifts = random_floats(256), second = random_floats(256 * 8);
    auto signs = random_codes<int32_t>(256 * 8, 0);
    for (auto& sign : signs) sign = int32_t(uint32_t(sign) & 0x80000000u);
    cases.push_back({"lattice", rows, n, 3e-6, [=](int64_t first, int64_t count, float* y) {
      const CodeProduct p = product_of(x, first, count, k, n, y);
      const LatticeCodes c = {codes.data(), residual ? more.data() : nullptr, residual, 0.25f, magnitudes.data(), signs.data(), shifts.data(), second.data()};
      lattice(&p, &c);
    }});
  }
  for (int32_t decoder = LUT; decoder <= THREE_INST; ++decoder)
    for (const int32_t bits : {2, 3, 4})
      for (const int32_t step : {1, 2}) {
        if (step == 2 && decoder >= ONE_MAD) continue;
        const int64_t k = 160, n = 48;
        const auto x = random_floats(rows * k);
        const auto packed = random_codes<uint8_t>(n / 16 * (k / 16) * 32 * bits, 0);
        const int32_t table_bits = decoder == LUT ? 16 : 9;
        const auto table = random_floats((int64_t(1) << table_bits) * step);
        cases.push_back({"trellis", rows, n, 3e-6, [=](int64_t first, int64_t count, float* y) {
          const CodeProduct p = product_of(x, first, count, k, n, y);
          const TrellisCodes c = {packed.data(), bits, 16, step, decoder, table_bits, bits == 3, decoder >= ONE_MAD ? nullptr : table.data()};
          trellis(&p, &c);
        }});
      }
  for (const int32_t dtype : {F32, F16, BF16})
    for (const int64_t v : {8, 6}) {
      const int64_t k = 163, n = 44, blocks = (n + v - 1) / v;
      const auto x = random_floats(rows * k);
      const auto codes = random_codes<uint16_t>(blocks * k, 256);
      const auto small = random_codes<uint8_t>(blocks * k, 0);
      const auto wide = random_floats(256 * v);
      const auto narrow = random_scales(256 * v, dtype);
      cases.push_back({"vector", rows, n, 3e-6, [=](int64_t first, int64_t count, float* y) {
        const CodeProduct p = product_of(x, first, count, k, n, y);
        const void* book = dtype == F32 ? static_cast<const void*>(wide.data()) : narrow.data();
        const VectorCodes c = {{codes.data(), book, 2, nullptr}, {small.data(), book, 1, nullptr}, dtype, v, k, p.units};
        vector(&p, &c, 1);
      }});
    }
  for (const int32_t bits : {2, 3, 4, 5, 8}) {
    const int64_t k = 256, n = 39, row_bytes = k * bits / 8;
    const auto x = random_floats(rows * k);
    const auto packed = random_codes<uint8_t>(n * row_bytes + 16, 0);
    const auto table = random_floats(n << bits);
    const auto scale = random_scales(n * 4, BF16);
    cases.push_back({"lookup", rows, n, 3e-6, [=](int64_t first, int64_t count, float* y) {
      const CodeProduct p = product_of(x, first, count, k, n, y);
      const LookupCodes c = {packed.data(), row_bytes, bits, table.data(), int64_t(1) << bits, scale.data(), BF16, 4, 8};
      lookup(&p, &c);
    }});
  }
}

void hadamard_cases() {
  auto* call = symbol<int32_t(const HadamardArgs*)>("bg_hadamard");
  for (const int64_t size : {4, 64, 1024, 2048, 12, 96, 768})
    for (const int32_t dtype : {F32, F16, BF16}) {
      const int64_t order = size % 3 ? 1 : 12, rows = 5;
      const auto wide = random_floats(rows * size);
      const auto narrow = random_scales(rows * size, dtype);
      auto base = random_floats(order * order);
      for (auto& sign : base) sign = sign < 0 ? -1.0f : 1.0f;
      cases.push_back({"hadamard", rows, dtype == F32 ? size : (size + 1) / 2, dtype == F32 ? 2e-6 : 0.0, [=](int64_t first, int64_t count, float* y) {
        const void* x = dtype == F32 ? static_cast<const void*>(wide.data() + first * size) : narrow.data() + first * size;
        std::memset(y, 0, size_t(count * size) * (dtype == F32 ? 4 : 2));
        const HadamardArgs args = {x, y, dtype, count, size, order > 1 ? base.data() : nullptr, order, 0.125f, 2, nullptr};
        call(&args);
      }});
    }
}

bool same_bits(const Floats& a, const Floats& b) { return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * 4) == 0; }

double error_of(const Floats& got, const Floats& want) {
  double largest = 1e-30, worst = 0;
  for (float value : want) largest = std::max(largest, std::isfinite(value) ? std::fabs(double(value)) : 0.0);
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::memcmp(&got[i], &want[i], 4) == 0) continue;
    const double difference = std::fabs(double(got[i]) - double(want[i]));
    worst = std::max(worst, difference == difference ? difference / largest : 1e30);
  }
  return worst;
}

Floats result(const Case& one) {
  Floats y(size_t(one.rows * one.n) + 16, 0.0f);
  one.run(0, one.rows, y.data());
  y.resize(size_t(one.rows * one.n));
  return y;
}

// What a set did with the cases of one name.
struct Line {
  int64_t count = 0, equal = 0;
  double worst = 0;
};

bool rows_stand_alone(const Case& one, const Floats& together) {
  for (const int64_t row : {int64_t(0), one.rows / 2, one.rows - 1}) {
    Floats alone(size_t(one.n) + 16, 0.0f);
    one.run(row, 1, alone.data());
    if (std::memcmp(alone.data(), together.data() + row * one.n, size_t(one.n) * 4) != 0) return false;
  }
  return true;
}

void report(const char* set, const std::vector<Floats>& want) {
  std::map<std::string, Line> lines;
  for (size_t i = 0; i < cases.size(); ++i) {
    const Case& one = cases[i];
    const Floats got = result(one);
    const double error = error_of(got, want[i]);
    const bool alone = rows_stand_alone(one, got), near = error <= one.tolerance;
    Line& line = lines[one.name];
    line.worst = std::max(line.worst, error);
    line.equal += same_bits(got, want[i]);
    ++line.count;
    failures += !(near && alone);
    if (!near) std::printf("FAILED %s: %s, case %zu: error %.3g, tolerance %.3g\n", set, one.name.c_str(), i, error, one.tolerance);
    if (!alone) std::printf("FAILED %s: %s, case %zu: a row depends on the others\n", set, one.name.c_str(), i);
  }
  for (const auto& [name, line] : lines)
    std::printf("%-12s %-28s %3d cases, %3d bit-equal to portable, largest error %.2g\n", set, name.c_str(), int(line.count), int(line.equal), line.worst);
}

}  // namespace

int main(int count, char** arguments) {
  library = dlopen(count > 1 ? arguments[1] : "./libbitgrain_cpu.so", RTLD_NOW);
  if (library == nullptr) {
    std::printf("%s\n", dlerror());
    return 2;
  }
  auto* choose = symbol<int32_t(const char*)>("bg_choose_set");
  auto* active = symbol<const char*()>("bg_instruction_set");
  std::printf("chosen by itself: %s\n", active());
  grouped_cases();
  integer_cases();
  block_cases();
  codebook_cases();
  hadamard_cases();
  choose("portable");
  std::vector<Floats> want;
  for (const Case& one : cases) want.push_back(result(one));
  for (const char* name : {"portable", "avx2", "avxvnni", "avx512", "avx512bf16", "amx", "neon", "neondot"}) {
    if (choose(name) == 0 && std::strcmp(name, active()) == 0) report(name, want);
  }
  std::printf("%lld failures\n", (long long)failures);
  return failures ? 1 : 0;
}
