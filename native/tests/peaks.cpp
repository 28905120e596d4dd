// bg_peak, of which only some results are known, and bg_read.
#include "checks.hpp"

void test_peaks() {
  const bool portable = std::strcmp(native::bg_instruction_set(), "portable") == 0;
  for (int32_t kind = 0; kind < 4; ++kind) {
    for (const int32_t threads : {1, 2}) {
      const double rate = native::bg_peak(kind, threads);
      const std::string what = "peak " + std::to_string(kind) + " of " + std::to_string(threads) + " threads";
      expect(std::isfinite(rate) && (kind == 0 ? rate > 0 : rate >= 0), what);
      if (portable && kind > 0) expect(rate == 0, what + ": there is no such arithmetic");
    }
  }
  Random random(11);
  for (const int64_t words : {0, 1, 2, 15, 16, 17, 33, 1000, 4111}) {
    Buffer<uint64_t> data(words);
    uint64_t want = 0;
    for (int64_t i = 0; i < words; ++i) {
      data[i] = uint64_t(random.next()) << 32 | random.next();
      want ^= data[i];
    }
    for (int32_t threads = 1; threads <= 3; ++threads) {
      expect(native::bg_read(data.data(), words, threads) == want, "reading " + std::to_string(words) + " words by " + std::to_string(threads) + " threads");
    }
  }
}
