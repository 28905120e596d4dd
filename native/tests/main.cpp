// Runs every test on every instruction set of the machine; exits with 1 when something differs, or a function was not called.
#include <chrono>

#include "checks.hpp"

int main() {
  const struct {
    const char* name;
    void (*run)();
  } tests[] = {{"grouped", test_grouped}, {"integer", test_integer}, {"blocks", test_blocks},     {"packing", test_packing},
               {"codebooks", test_codebooks}, {"hadamard", test_hadamard}, {"steps", test_steps}, {"experts", test_experts},
               {"dense", test_dense}, {"decode", test_decode_step}, {"peaks", test_peaks}};
  test_first_use();
  int32_t bit = 1;  // of bg_available_sets
  for (const char* set : {"portable", "avx2", "avx512", "avx512bf16", "amx", "avxvnni", "neon", "neondot"}) {
    const bool there = native::bg_available_sets() & bit;
    bit <<= 1;
    expect(native::bg_choose_set(set) == (there ? 0 : 2), std::string("choosing ") + set);
    if (!there) continue;
    expect(std::strcmp(native::bg_instruction_set(), set) == 0, std::string(set) + " is in use");
    for (const auto& test : tests) {
      const auto start = std::chrono::steady_clock::now();
      const int64_t before = failures;
      printed = 0;
      test.run();
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      std::printf("%-10s %-10s %6.2f s  %s\n", set, test.name, seconds, failures == before ? "ok" : "FAILED");
      std::fflush(stdout);
    }
  }
  expect(native::bg_choose_set("none such") == 1, "choosing an unknown set");
  expect(native::bg_abi_version() > 0, "the interface has a version");
  for (const Called* function : Called::all()) expect(function->times > 0, std::string(function->name) + " was never called");
  std::printf("%d functions, %lld failures\n", int(Called::all().size()), static_cast<long long>(failures));
  return failures ? 1 : 0;
}
