// Repacks a tile of weights from the checkpoint's layout to the kernel's.
//
// One core of a Zen 4 repacks 7 to 9 GB/s. It repacked 4 GB/s when it took one word after another.

#pragma once

#include <cstdint>
#include <cstring>

#include "kernel.hpp"

namespace k26 {

// Four words of a row, in the compiler's own type of vector: every instruction set has vectors of 16 bytes.
using Words = uint32_t __attribute__((vector_size(16)));

// Transposes four rows of four words.
inline void exchange(Words (&rows)[4]) {
#if defined(__clang__)
#define K26_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define K26_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#endif
  const Words a = K26_SHUFFLE(rows[0], rows[1], 0, 4, 1, 5), b = K26_SHUFFLE(rows[2], rows[3], 0, 4, 1, 5);
  const Words c = K26_SHUFFLE(rows[0], rows[1], 2, 6, 3, 7), d = K26_SHUFFLE(rows[2], rows[3], 2, 6, 3, 7);
  rows[0] = K26_SHUFFLE(a, b, 0, 1, 4, 5);
  rows[1] = K26_SHUFFLE(a, b, 2, 3, 6, 7);
  rows[2] = K26_SHUFFLE(c, d, 0, 1, 4, 5);
  rows[3] = K26_SHUFFLE(c, d, 2, 3, 6, 7);
#undef K26_SHUFFLE
}

// Repacks the checkpoint's tile, 16 rows of K / 8 words and of K / 32 scales, to the kernel's.
inline void repack_tile(const uint32_t* packed, const uint16_t* scales, int64_t inputs, uint32_t* tile, uint16_t* tile_scales) {
  // Spreads four nibbles to the low halves of four bytes.
  const auto spread = [](Words nibbles) {
    nibbles = (nibbles | nibbles << 8) & 0x00FF00FF;
    return (nibbles | nibbles << 4) & 0x0F0F0F0F;
  };
  const int64_t words = inputs / kLineInputs;  // a multiple of four
  for (int64_t word = 0; word < words; word += 4)
    for (int row = 0; row < kRows; row += 4) {
      Words values[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&values[i], packed + (row + i) * words + word, sizeof(Words));
      for (Words& value : values) value = spread(value & 0xFFFF) | spread(value >> 16) << 4;
      exchange(values);
      for (int i = 0; i < 4; ++i) std::memcpy(tile + (word + i) * kRows + row, &values[i], sizeof(Words));
    }
  const int64_t groups = inputs / kGroup;
  for (int64_t group = 0; group < groups; ++group)
    for (int row = 0; row < kRows; ++row) tile_scales[group * kRows + row] = scales[row * groups + group];
}

}  // namespace k26
