#include "weights.hpp"

namespace {

int64_t unit_size(int32_t kind) {
  constexpr int64_t BYTES[] = {64, 128, 128, 128, 64, 256, 256, 512};
  return BYTES[kind];
}

template <class T>
T read(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

double bf16_value(uint16_t bits) {
  float value;
  const uint32_t wide = uint32_t(bits) << 16;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Finite codes only.
void fill_codes(Random& random, int32_t kind, Buffer<uint8_t>& codes) {
  const int64_t width = kind == DENSE_F32 ? 4 : kind == DENSE_BF16 || kind == DENSE_F16 ? 2 : 1;
  for (int64_t i = 0; i < codes.size(); i += width) {
    const float value = float(random.uniform());
    const uint16_t half = kind == DENSE_F16 ? float_to_half(value) : float_to_bf16(value);
    if (width == 4) std::memcpy(&codes[i], &value, 4);
    else if (width == 2) std::memcpy(&codes[i], &half, 2);
    else codes[i] = uint8_t(kind == E4M3 && (random.next() & 0x7f) == 0x7f ? 0 : random.next() & (kind == E5M2 ? 0xbf : 0xff));
  }
}

}  // namespace

GroupedWeight::GroupedWeight(Random& random, int32_t kind, int64_t n, int64_t k, bool gathered, int64_t groups_wanted)
    : kind(kind), scale_dtype(int32_t(random.below(3))), n(n), k(k), units((k + UNIT - 1) / UNIT + (gathered ? 1 : 0)), groups(0), gathered(gathered),
      scaled(random.below(8) != 0), has_second(scaled && random.coin()), has_zero(random.below(3) == 0), scale(F32, 0) {
  codes = Buffer<uint8_t>(panels() * units * unit_size(kind));
  fill_codes(random, kind, codes);
  std::vector<int32_t> ends;
  while (int64_t(ends.size()) + 1 < groups_wanted && (ends.empty() ? 0 : ends.back()) + 1 < units) {
    const int64_t from = ends.empty() ? 0 : ends.back();
    ends.push_back(int32_t(from + random.between(random.coin() ? 1 : 0, units - from - 1)));  // a group may be empty
  }
  ends.push_back(int32_t(units));
  groups = int64_t(ends.size());
  group_ends = Buffer<int32_t>(groups);
  std::copy(ends.begin(), ends.end(), group_ends.data());
  gather = Buffer<int32_t>(gathered ? units * UNIT : 0);
  for (int64_t i = 0; i < gather.size(); ++i) gather[i] = int32_t(random.between(-1, k - 1));
  scale = random_numbers(random, scale_dtype, scaled ? panels() * groups * PANEL : 0);
  second = random_floats(random, has_second ? panels() * PANEL : 0);
  zero_is_float = has_zero && random.coin();
  zero = random_floats(random, has_zero && zero_is_float ? panels() * groups * PANEL : 0, 4);
  whole_zero = Buffer<int16_t>(has_zero && !zero_is_float ? panels() * groups * PANEL : 0);
  for (int64_t i = 0; i < whole_zero.size(); ++i) whole_zero[i] = int16_t(random.between(-8, 8));
  zero_constant = !has_zero && random.coin() ? 3.0f : 0.0f;
  if (kind != TABLE4) return;
  table = random_floats(random, 16);
  whole = random.coin();
  whole_table = Buffer<int8_t>(whole ? 16 : 0);
  whole_step = 0.5f;
  for (int64_t i = 0; i < whole_table.size(); ++i) {
    whole_table[i] = int8_t(random.between(-12, 12));
    table[i] = float(whole_table[i]) * whole_step;
  }
}

double GroupedWeight::code(int64_t row, int64_t place) const {
  const int64_t lane = row % PANEL, j = place % UNIT;
  const uint8_t* unit = codes.data() + (row / PANEL * units + place / UNIT) * unit_size(kind);
  const int nibble = kind == NIBBLE || kind == TABLE4 ? unit[4 * lane + j / 2] >> (4 * (j & 1)) & 15 : 0;
  switch (kind) {
    case NIBBLE: return nibble - 8;
    case BYTE: return int8_t(unit[64 * (j / 4) + 4 * lane + j % 4]);
    case E4M3: return float8_value(unit[16 * j + lane]) / 256;
    case E5M2: return half_value(uint16_t(unit[16 * j + lane] << 8));
    case TABLE4: return table[nibble];
    case DENSE_BF16: return bf16_value(read<uint16_t>(unit + 64 * (j / 2) + 4 * lane + 2 * (j & 1)));
    case DENSE_F16: return half_value(read<uint16_t>(unit + 32 * j + 2 * lane));
    default: return read<float>(unit + 64 * j + 4 * lane);
  }
}

double GroupedWeight::scale_of(int64_t row, int64_t group) const {
  const double own = scaled ? scale[(row / PANEL * groups + group) * PANEL + row % PANEL] : 1.0;
  return has_second ? own * second[row] : own;
}

double GroupedWeight::zero_of(int64_t row, int64_t group) const {
  if (!has_zero) return zero_constant;
  const int64_t at = (row / PANEL * groups + group) * PANEL + row % PANEL;
  return zero_is_float ? double(zero[at]) : whole_zero[at];
}

void GroupedWeight::multiply(const double* x, int64_t out, double& sum, double& size) const {
  double most = 0;  // the fixed-point kernel loses a part of the largest
  for (int64_t i = 0; i < k; ++i) most = std::max(most, std::fabs(x[i]));
  int64_t place = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const double factor = scale_of(out, g), shift = zero_of(out, g);
    double unscaled = 0;
    for (; place < group_ends[g] * UNIT; ++place) {
      const int64_t from = source(place);
      if (from < 0) continue;
      const double c = code(out, place);
      sum += factor * (c - shift) * x[from];
      size += std::fabs(factor) * (std::fabs(c) + std::fabs(shift) + (kind == NIBBLE || kind == TABLE4 ? 1 : 0)) * (std::fabs(x[from]) + most / 4);
      unscaled += std::fabs(c / whole_step * x[from]);
    }
    if (unscaled > 3e38) size = HUGE_VAL;  // float32 may overflow before the scale comes to it
  }
}

ExpertMatrix GroupedWeight::matrix(const void* bias) const {
  return {codes.data(), scale.or_null(scaled), zeros(), second.or_null(has_second), table.or_null(kind == TABLE4), whole_table.or_null(whole),
          group_ends.data(), gather.or_null(gathered), nullptr, bias, units, groups, zero_constant, whole_step, 1.0, 0};
}

IntegerWeight::IntegerWeight(Random& random, int64_t n, int64_t k) : n(n), k(k), quads((k + 7) / 8 * 2) {
  const int64_t panels = (n + PANEL - 1) / PANEL;
  codes = Buffer<int8_t>(panels * quads * 64);
  scale = random_floats(random, panels * PANEL);
  sums = Buffer<int32_t>(panels * PANEL);
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t i = 0; i < k; ++i) {
      const int8_t code = int8_t(random.between(-128, 127));
      codes[((row / PANEL * quads + i / 4) * PANEL + row % PANEL) * 4 + i % 4] = code;
      sums[row] += code;
    }
  }
}

QuantizedRow quantized(const Quantization& how, const std::vector<float>& x, float low, float high, bool nan) {
  QuantizedRow row = {std::vector<int32_t>(x.size(), 0), how.static_scale, how.static_zero};
  if (how.dynamic != STATIC) {
    const bool symmetric = how.rules & 1;
    row.scale = symmetric ? std::max(-low, high) / how.top : (high - low) / 255.0f;
    if (row.scale == 0.0f) row.scale = std::numeric_limits<float>::epsilon();
    row.zero = symmetric || !std::isfinite(row.scale) ? 0 : int32_t(std::nearbyint(std::min(std::max(-128.0f - low / row.scale, -128.0f), 127.0f)));
  }
  if (nan || !std::isfinite(row.scale)) return {row.codes, std::nanf(""), 0};
  for (size_t i = 0; i < x.size(); ++i) {
    const float moved = how.rules & 2 ? std::nearbyint(x[i] * (1.0f / row.scale)) + float(row.zero) : x[i] / row.scale + float(row.zero);
    row.codes[i] = std::isnan(moved) ? 0 : int32_t(std::nearbyint(std::min(std::max(moved, -128.0f), 127.0f)));
  }
  return row;
}

namespace {

constexpr int CODE_BITS[BLOCK_CODES] = {1, 2, 3, 4, 5, 6, 8, 4, 4};

int64_t spans_of(const BlockFormat& format, int64_t k) { return format.span ? (k + format.span - 1) / format.span : 0; }

}  // namespace

BlockWeights::BlockWeights(Random& random, const BlockFormat& format, int64_t n, int64_t k)
    : format(format), n(n), k(k), scales(format.scale_dtype, 0), minima(format.scale_dtype, 0), has_factor(random.coin()) {
  const int64_t spans = spans_of(format, k), groups = k / format.group, row_bytes = (k * CODE_BITS[format.code] + 7) / 8;
  const bool minimum = format.minimum != NO_MINIMUM && format.minimum != ZERO_POINT, nibbles = format.sub == NIBBLE_SUB;
  scales = random_numbers(random, format.scale_dtype, n * spans);
  minima = random_numbers(random, format.scale_dtype, minimum ? n * spans : 0);
  stream = random_bytes(random, n * row_bytes);
  points = random_bytes(random, format.minimum == ZERO_POINT ? n * spans : 0);
  sub = random_bytes(random, format.sub == NO_SUB ? 0 : n * groups);
  for (int64_t i = 0; i < sub.size(); ++i) {
    if (format.sub == E8M0_SUB) sub[i] = uint8_t(random.between(117, 130));
    if (format.sub == E4M3_SUB) sub[i] = uint8_t(random.below(0x7f));
  }
  sub_minima = random_bytes(random, format.minimum == SCALED_MINIMUM && !nibbles ? n * groups : 0);
  factor = random_floats(random, has_factor ? n : 0);
  std::vector<PackedField> fields;
  const int64_t wide = format.scale_dtype == F32 ? 4 : 2;
  if (format.span) fields.push_back({static_cast<const uint8_t*>(scales.data()), spans, format.span, wide});
  if (minimum) fields.push_back({static_cast<const uint8_t*>(minima.data()), spans, format.span, wide});
  if (points.size()) fields.push_back({points.data(), spans, format.span, 1});
  if (sub.size()) fields.push_back({sub.data(), groups, format.group, 1});
  if (sub_minima.size()) fields.push_back({sub_minima.data(), groups, format.group, 1});
  const CodeStream codes = {stream.data(), row_bytes, n, k, CODE_BITS[format.code]};
  const int64_t bytes = native::bg_block_panel_bytes(&this->format.code, k);
  panels = Buffer<uint8_t>((n + PANEL - 1) / PANEL * bytes);
  expect(native::bg_pack_blocks(&codes, fields.data(), int32_t(fields.size()), &this->format.code, bytes, panels.data(), 2) == 0, "packing blocks");
}

int32_t BlockWeights::stored(int64_t row, int64_t column) const {
  const int bits = CODE_BITS[format.code];
  const uint8_t* from = stream.data() + row * ((k * bits + 7) / 8);
  int32_t code = 0;
  for (int bit = 0; bit < bits; ++bit) {
    const int64_t at = column * bits + bit;
    code |= (from[at / 8] >> (at % 8) & 1) << bit;
  }
  return code;
}

double BlockWeights::value(int64_t row, int64_t column) const {
  constexpr int LEVELS[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  constexpr int DOUBLED[] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  const int32_t code = stored(row, column);
  const double number = format.code == LEVELS_4 ? LEVELS[code] : format.code == FLOAT_4 ? DOUBLED[code] : (format.code == CODE_1 ? 2 * code : code) - format.zero;
  const int64_t span = format.span ? row * spans_of(format, k) + column / format.span : 0, group = row * (k / format.group) + column / format.group;
  const uint8_t byte = format.sub == NO_SUB ? 0 : sub[group];
  double scale = format.span ? scales[span] : 1.0;
  switch (format.sub) {
    case UNSIGNED_SUB: scale *= byte; break;
    case SIGNED_SUB: scale *= int8_t(byte); break;
    case NIBBLE_SUB: scale *= byte & 15; break;
    case E8M0_SUB: scale *= std::ldexp(1.0, byte - 127); break;
    case E4M3_SUB: scale *= float8_value(byte); break;
    default: break;
  }
  double minimum = 0;
  if (format.minimum == ADDED_MINIMUM) minimum = minima[span];
  if (format.minimum == SCALED_MINIMUM) minimum = -minima[span] * (format.sub == NIBBLE_SUB ? byte >> 4 : sub_minima[group]);
  if (format.minimum == ZERO_POINT) minimum = -scale * points[span];
  if (format.minimum == FLOAT_POINT) minimum = -scale * minima[span];
  return (scale * number + minimum) * (has_factor ? factor[row] : 1.0);
}

// Every code, every scale of a group, every minimum; each group size, several spans.
std::vector<BlockFormat> block_formats() {
  std::vector<BlockFormat> formats;
  for (int32_t code = 0; code < BLOCK_CODES; ++code) {
    const int32_t zero = code == LEVELS_4 ? 128 : code == FLOAT_4 ? 12 : code == CODE_1 ? 1 : 1 << (CODE_BITS[code] - 1);
    formats.push_back({code, NO_SUB, NO_MINIMUM, code % 3, 32, 32, zero});
    formats.push_back({code, SIGNED_SUB, NO_MINIMUM, (code + 1) % 3, 16, 256, zero});
    const int32_t plain = code == LEVELS_4 || code == FLOAT_4 ? zero : 0;  // of codes beside a minimum
    formats.push_back({code, UNSIGNED_SUB, SCALED_MINIMUM, F16, 32, 256, plain});
    formats.push_back({code, NIBBLE_SUB, SCALED_MINIMUM, F16, 16, 256, plain});
    formats.push_back({code, E8M0_SUB, NO_MINIMUM, F16, 32, 0, zero});
    formats.push_back({code, E4M3_SUB, ADDED_MINIMUM, F32, 16, 128, zero});
    formats.push_back({code, NO_SUB, ZERO_POINT, BF16, 32, 64, plain});
    formats.push_back({code, NO_SUB, FLOAT_POINT, F32, 32, 128, plain});
  }
  return formats;
}
