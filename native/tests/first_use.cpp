// What is made at the first use (the choice of an instruction set, tables of functions, scratch of a thread) at once on several threads.
#include <thread>

#include "checks.hpp"

namespace {

void use_all(int64_t seed, std::string& set) {
  Random random{uint64_t(seed)};
  set = native::bg_instruction_set();
  const int64_t size = 64;
  const Numbers x = random_numbers(random, F32, size), weight = random_numbers(random, F32, size);
  Numbers y(F32, size);
  native::bg_norm(x.data(), 1, size, size, weight.data(), F32, nullptr, 1e-5f, 0, F32, y.data(), 1);
  const HadamardArgs args = {x.data(), y.data(), F32, 1, size, nullptr, 1, 1.0f, 1, nullptr};
  native::bg_hadamard(&args);
  const BlockFormat format = {CODE_8, NO_SUB, NO_MINIMUM, F32, 32, 32, 128};
  const Buffer<uint8_t> panels(native::bg_block_panel_bytes(&format.code, size));
  native::bg_block_linear(x.data(), F32, 1, size, &format.code, panels.data(), nullptr, 1, nullptr, y.data(), EXACT_INPUT, 1);
  // half of the threads choose what is in use already
  if (seed % 2) native::bg_choose_set(set.c_str());
}

}  // namespace

void test_first_use() {
  std::string sets[4];
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < 4; ++i) threads.emplace_back([i, &sets] { use_all(i + 1, sets[i]); });
  for (std::thread& thread : threads) thread.join();
  for (const std::string& set : sets) expect(set == sets[0], "the first users have one instruction set");
}
