// One tile of INT4 weights, 16 output rows, times the activations of some tokens.
//
// A 64-byte line of a tile holds 16 rows × 8 inputs: a 32-bit lane for each row, in its bytes the low nibbles are inputs
// 0 to 3 and the high nibbles inputs 4 to 7. So one mask, or a shift and a mask, makes 64 bytes u that the integer
// product of AVX512-VNNI takes as they are, four inputs of a row at once.
//
// The other side of that product are signed bytes. An activation is rounded to 16 bits, as a multiple of its group's
// scale, and enters as a high and a low byte: two products of 64 instead of one of 32 pairs with AVX512-BF16, the same
// arithmetic at half the unpacking. 16 bits of the group's largest value keep 3e-5 of the norm, where rounding to
// bfloat16 keeps 1.7e-3; the sums within a group are exact integers.
//
// The order of the operations on a token's total does not depend on how many tokens there are.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace k26 {

constexpr int kRows = 16;       // output rows of a tile
constexpr int kGroup = 32;      // inputs that share a scale
constexpr int kLineInputs = 8;  // inputs in a line
constexpr int kLine = 64;       // bytes
constexpr int kGroupBytes = kGroup / kLineInputs * kLine;
constexpr int kVectors = kGroup / 4;  // vectors of unpacked weights in a group

// A token's group: value = scale · (256 · high + low).
struct Quantised {
  int8_t high[kGroup];
  int8_t low[kGroup];
};

struct Terms {
  float scale;
  int32_t offset;  // −8 · Σ (256 · high + low), because the weights are u − 8
};

// The activations of the tokens of one expert, `[K / 32, stride]`.
struct Activations {
  const Quantised* groups;
  const Terms* terms;
  int64_t stride;         // tokens in a group
  const int32_t* tokens;  // which of them, or null for the first ones
  int count;

  int64_t index(int64_t group, int i) const { return group * stride + (tokens ? tokens[i] : i); }
};

inline void unpack(const uint8_t* lines, __m512i (&w)[kVectors]) {
  const __m512i mask = _mm512_set1_epi8(0x0F);
#pragma GCC unroll 4
  for (int j = 0; j < kVectors / 2; ++j) {
    const __m512i nibbles = _mm512_loadu_si512(lines + kLine * j);
    w[2 * j] = _mm512_and_si512(nibbles, mask);
    w[2 * j + 1] = _mm512_and_si512(_mm512_srli_epi16(nibbles, 4), mask);
  }
}

// Σ w · x over a group, for each row: w unsigned, x the group's signed bytes.
inline __m512i dot(__m512i sum, const __m512i (&w)[kVectors], const int8_t* x) {
#if defined(__AVX512VNNI__)
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
    // _mm512_dpbusd_epi32 with the broadcast as its memory operand, which GCC makes an instruction and a register of its own.
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w[i]), "m"(*reinterpret_cast<const int32_t(*)>(x + 4 * i)));
  }
  return sum;
#else
  // Without VNNI: sums of two in 16 bits. Eight of them stay below 8 · 2 · 15 · 128 = 30720.
  __m512i pairs = _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
    int32_t four;
    std::memcpy(&four, x + 4 * i, sizeof(four));
    pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16(w[i], _mm512_set1_epi32(four)));
  }
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}

inline __m512 widen(const uint16_t* bfloat16) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bfloat16));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// How far ahead weights are fetched, in bytes of the stream: the processor's own prefetching ends at a page. Zen 4, two
// cores, one token, 7168 inputs: 44 GB/s without, 47 at 2048, 50 at 4096.
constexpr int kAhead = 4096;

inline void prefetch(const void* from, int bytes) {
  for (int i = 0; i < bytes; i += kLine) _mm_prefetch(static_cast<const char*>(from) + i, _MM_HINT_T0);
}

// total + a group's products with the weights `w` of that scale, for the token at `index`.
inline __m512 add_group(__m512 total, const __m512i (&w)[kVectors], __m512 scale, const Activations& x, int64_t index) {
  const Terms& terms = x.terms[index];
  const __m512i high = dot(_mm512_setzero_si512(), w, x.groups[index].high);
  const __m512i low = dot(_mm512_set1_epi32(terms.offset), w, x.groups[index].low);
  // Below 2^24: float32 holds it.
  const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
  return _mm512_fmadd_ps(sum, _mm512_mul_ps(scale, _mm512_set1_ps(terms.scale)), total);
}

// totals `[count, 16]` = x · tileᵀ. tile: `[K / 8]` lines, scales: bfloat16 `[K / 32, 16]`.
inline void multiply(const uint8_t* tile, const uint16_t* scales, int64_t inputs, const Activations& x, float* totals) {
  // A single token's total stays in a register: 53 GB/s a core from its cache, 48 by way of memory.
  __m512 only = _mm512_setzero_ps();
  if (x.count > 1) std::memset(totals, 0, sizeof(float) * kRows * x.count);
  for (int64_t group = 0; group < inputs / kGroup; ++group) {
    const uint8_t* lines = tile + group * kGroupBytes;
    prefetch(lines + kAhead, kGroupBytes);
    prefetch(scales + group * kRows + kAhead / kGroupBytes * kRows, 1);
    __m512i w[kVectors];
    unpack(lines, w);
    const __m512 scale = widen(scales + group * kRows);
    if (x.count == 1) {
      only = add_group(only, w, scale, x, x.index(group, 0));
      continue;
    }
    // Four at a time, so that the first does not wait for its own sums.
    int n = 0;
    for (; n + 4 <= x.count; n += 4) {
#pragma GCC unroll 4
      for (int i = n; i < n + 4; ++i)
        _mm512_store_ps(totals + i * kRows,
                        add_group(_mm512_load_ps(totals + i * kRows), w, scale, x, x.index(group, i)));
    }
    for (; n < x.count; ++n)
      _mm512_store_ps(totals + n * kRows, add_group(_mm512_load_ps(totals + n * kRows), w, scale, x, x.index(group, n)));
  }
  if (x.count == 1) _mm512_store_ps(totals, only);
}

}  // namespace k26
