// One tile of INT4 weights, 16 output rows, times the activations of some tokens.
//
// A 64-byte line of a tile holds 16 rows × 8 inputs: a 32-bit lane for each row, in its bytes the low nibbles are inputs
// 0 to 3 and the high nibbles inputs 4 to 7. So one mask, or a shift and a mask, makes operands that an integer product
// takes as they are, u = weight + 8.
//
// An activation is rounded to 16 bits, as a multiple of its group's scale. 16 bits of the group's largest value keep 3e-5 of
// the norm, where rounding to bfloat16 keeps 1.7e-3; the sums within a group are exact integers.
//
// The order of the operations on a token's total does not depend on how many tokens there are, or on the instruction set.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "simd.hpp"

namespace k26 {

constexpr int kRows = 16;       // output rows of a tile
constexpr int kGroup = 32;      // inputs that share a scale
constexpr int kLineInputs = 8;  // inputs in a line
constexpr int kLine = 64;       // bytes
constexpr int kGroupBytes = kGroup / kLineInputs * kLine;

struct Terms {
  float scale;
  int32_t offset;  // −8 · Σ activation, because the weights are u − 8
};

// The activations of the tokens of one expert, `[K / 32, stride]`.
struct Activations {
  const Quantized* groups;
  const Terms* terms;
  int64_t stride;         // tokens in a group
  const int32_t* tokens;  // which of them, or null for the first ones
  int count;

  int64_t index(int64_t group, int i) const { return group * stride + (tokens ? tokens[i] : i); }
};

// Inlined always: GCC drops the call of a function that only fetches ahead, as without effect.
template <int kLocality>
__attribute__((always_inline)) inline void prefetch(const void* from, int bytes) {
  for (int i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(from) + i, 0, kLocality);
}

#if defined(__x86_64__)
inline const bool kIntel = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
#else
constexpr bool kIntel = false;
#endif

// How far ahead weights are fetched, in bytes of the stream, since the processor's own prefetching ends at a page.
//
// To the outer caches first, and then as data used once, past the second-level cache. Zen 4, two cores, one token, of the 58 GB/s
// at which torch reads: AVX2 76 % with the nearer one only and 82 % with both (at 8192 and 1024 bytes 77 %), AVX512 with VNNI
// 82 % with either, 75 % with none. The nearer one alone: 78 % at 2048, 84 % at 4096, 74 % at 6144, and 80 % as data to be kept.
constexpr int kAhead = 4096;
constexpr int kFarAhead = 16384;
// To the second-level cache on Intel, where fetching data as used once halves the rate of a plain sum (10 for 26 GB/s). Emerald
// Rapids, of the 20 GB/s at which torch reads: AVX2 93 % so and 90 % as above, AVX512 with VNNI 103 % and 95 to 104 %, with
// none 61 and 69 %.
constexpr int kIntelAhead = 8192;

// From a tile's end to the tile that its thread reads next: 0 where that is the one behind it in memory. With many threads a
// stream of `down` has a few tiles of 16 KB, and what was fetched beyond its end would be another thread's.
struct Jump {
  int64_t lines = 0, scales = 0;
};

// A group's worth of weights, and their scales. The jumps are those of what lies so far ahead.
__attribute__((always_inline)) inline void fetch_ahead(const uint8_t* lines, const uint16_t* scales, Jump far, Jump near) {
  if (kIntel) {
    prefetch<1>(lines + near.lines + kIntelAhead, kGroupBytes);
    prefetch<1>(scales + near.scales + kIntelAhead / kGroupBytes * kRows, 1);
    return;
  }
  prefetch<1>(lines + far.lines + kFarAhead, kGroupBytes);
  prefetch<0>(lines + near.lines + kAhead, kGroupBytes);
  prefetch<0>(scales + near.scales + kAhead / kGroupBytes * kRows, 1);
}

// total + a group's products, whose sums are below 2^24: float32 holds them.
inline Floats add_group(Floats total, Floats sums, Floats scale, const Terms& terms) {
  return fma(sums, scale * all(terms.scale), total);
}

// The totals of tokens [first, first + kTokens): some at a time, so that one does not wait for its own sums.
template <int kTokens>
inline void add_groups(const Weights& weights, Floats scale, const Activations& x, int64_t group, int first, float* totals) {
  const Quantized* values[kTokens];
  const Terms* terms[kTokens];
  int32_t offsets[kTokens];
  Ints sums[kTokens];
#pragma GCC unroll 4
  for (int i = 0; i < kTokens; ++i) {
    const int64_t index = x.index(group, first + i);
    values[i] = x.groups + index;
    terms[i] = x.terms + index;
    offsets[i] = terms[i]->offset;
  }
  weights.sums<kTokens>(values, offsets, sums);
#pragma GCC unroll 4
  for (int i = 0; i < kTokens; ++i) {
    float* total = totals + (first + i) * kRows;
    store(total, add_group(load(total), to_float(sums[i]), scale, *terms[i]));
  }
}

// totals `[count, 16]` = x · tileᵀ over the groups [begin, end), added to those before `begin`; a single token's come in one
// call. tile: `[K / 8]` lines, scales: bfloat16 `[K / 32, 16]`. jump: where to go on from there.
inline void multiply(const uint8_t* tile, const uint16_t* scales, int64_t begin, int64_t end, const Activations& x,
                     float* totals, Jump jump = {}) {
  // A single token's total stays in a register: 53 GB/s a core from its cache, 48 by way of memory (Zen 4).
  Floats only = all(0);
  if (x.count > 1 && begin == 0) std::memset(totals, 0, sizeof(float) * kRows * x.count);
  const int64_t far_end = std::max(begin, end - kFarAhead / kGroupBytes);
  const int64_t near_end = std::max(begin, end - (kIntel ? kIntelAhead : kAhead) / kGroupBytes);
  Jump far, near;
  for (int64_t group = begin; group < end; ++group) {
    const uint8_t* lines = tile + group * kGroupBytes;
    if (group == far_end) far = jump;
    if (group == near_end) near = jump;
    fetch_ahead(lines, scales + group * kRows, far, near);
    const Floats scale = widen(scales + group * kRows);
    if (x.count == 1) {
      const int64_t index = x.index(group, 0);
      const Ints sums = sums_of_one(lines, x.groups[index], x.terms[index].offset);
      only = add_group(only, to_float(sums), scale, x.terms[index]);
      continue;
    }
    const Weights weights(lines);
    int n = 0;
    for (; n + 4 <= x.count; n += 4) add_groups<4>(weights, scale, x, group, n, totals);
    for (; n < x.count; ++n) add_groups<1>(weights, scale, x, group, n, totals);
  }
  if (x.count == 1) store(totals, only);
}

}  // namespace k26
