// Multiplies one tile of INT4 weights, 16 output rows, by the activations of some tokens.
//
// A 64-byte line of a tile holds 16 rows × 8 inputs, with a 32-bit lane for each row. The low nibbles of a lane's bytes
// are inputs 0 to 3, the high nibbles inputs 4 to 7. So one mask, or a shift and a mask, makes operands u = weight + 8,
// which an integer product takes as they are.
//
// An activation is rounded to 16 bits, as a multiple of its group's scale. With 16 bits for the group's largest value
// the error is 3e-5 of the norm; rounding to bfloat16 has an error of 1.7e-3. The sums within a group are exact
// integers.
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
  const int32_t* tokens;  // their indices in a group, or null for the first `count`
  int count;

  int64_t index(int64_t group, int i) const { return group * stride + (tokens ? tokens[i] : i); }
};

// This is always inlined, because GCC drops the call of a function that only fetches ahead, as a call without effect.
template <int kLocality>
__attribute__((always_inline)) inline void prefetch(const void* from, int bytes) {
  for (int i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(from) + i, 0, kLocality);
}

#if defined(__x86_64__)
inline const bool kIntel = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
#else
constexpr bool kIntel = false;
#endif

// How far ahead weights are fetched, in bytes of the stream. They are fetched because the processor's own prefetching
// ends at a page.
//
// They are fetched to the outer caches first (kFarAhead), and then past the second-level cache, as data that is used
// once (kAhead). One token on two cores of a Zen 4 reached, of the 58 GB/s at which torch reads: with AVX2 76 % by the
// nearer fetch only and 82 % by both (77 % at 8192 and 1024 bytes), with AVX512 with VNNI 82 % by either and 75 % by
// none. The nearer fetch alone reached 78 % at 2048 bytes, 84 % at 4096, 74 % at 6144, and 80 % as data to be kept.
constexpr int kAhead = 4096;
constexpr int kFarAhead = 16384;
// On Intel they are fetched to the second-level cache, because fetching them as data that is used once halves the rate
// of a plain sum there (10 instead of 26 GB/s). On an Emerald Rapids, of the 20 GB/s at which torch reads, AVX2 reached
// 93 % this way and 90 % as above, AVX512 with VNNI 103 % this way and 95 to 104 % as above; without fetches they
// reached 61 and 69 %.
constexpr int kIntelAhead = 8192;

// The distance from a tile's end to the tile that the thread reads next; 0 if this is the one behind it in memory. With
// many threads a stream of `down` has only a few tiles of 16 KB, and weights fetched beyond its end would be another
// thread's.
struct Jump {
  int64_t lines = 0, scales = 0;
};

// Fetches a group's weights and scales ahead. `far` and `near` are the jumps for the farther and the nearer fetch; both
// are 0 until the fetch goes beyond the tile's end.
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

// Returns the total plus a group's products, whose sums are below 2^24, so that float32 holds them exactly.
inline Floats add_group(Floats total, Floats sums, Floats scale, const Terms& terms) {
  return fma(sums, scale * all(terms.scale), total);
}

// Adds a group's products to the totals of tokens [first, first + kTokens). Several are computed at a time, so that no
// token waits for its own sums.
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

// Computes totals `[count, 16]` = x · tileᵀ over the groups [begin, end), added to the totals of the groups before
// `begin`; for a single token all groups come in one call. tile: `[K / 8]` lines. scales: bfloat16 `[K / 32, 16]`.
// jump: to the tile that the thread reads next.
inline void multiply(const uint8_t* tile, const uint16_t* scales, int64_t begin, int64_t end, const Activations& x,
                     float* totals, Jump jump = {}) {
  // A single token's total stays in a register: a core of a Zen 4 takes weights from its cache at 53 GB/s this way, and
  // at 48 GB/s if the total goes through memory.
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
