// Loops whose index is a constant, so that arrays indexed by it stay in registers.  Internal linkage.
#pragma once
#include <type_traits>
#include <utility>

#define BITGRAIN_INLINE inline __attribute__((always_inline))
#define BITGRAIN_INLINE_LAMBDA __attribute__((always_inline))

namespace bitgrain {
namespace {

template <class Body, int... I>
BITGRAIN_INLINE void each_of(const Body& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>()), ...);
}

// body(0), body(1), ... body(COUNT - 1)
template <int COUNT, class Body>
BITGRAIN_INLINE void each(const Body& body) {
  each_of(body, std::make_integer_sequence<int, COUNT>());
}

}  // namespace
}  // namespace bitgrain
