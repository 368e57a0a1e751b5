// One tile of INT4 weights, 16 output rows, times the activations of some tokens. One source for two instruction sets.
//
// A 64-byte line of a tile holds 16 rows × 8 inputs, a 32-bit lane for each row. The 8 nibbles of a lane are, lowest
// first, inputs 0 2 4 6 1 3 5 7: shifted by 4 i, the low nibbles of its two 16-bit halves are the neighbours 2 i and
// 2 i + 1, as the bfloat16 product of pairs wants them. A table lookup turns a nibble u into u − 8 exactly; it reads
// only the index bits that it needs, so nothing is masked off.
//
// The products of a step are summed in float32, scaled by the group's scale and added to the token's total. The order
// of the operations on a token's total does not depend on how many tokens there are.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace k26 {

constexpr int kRows = 16;        // output rows of a tile
constexpr int kGroup = 32;       // inputs that share a scale
constexpr int kLineInputs = 8;   // inputs in a 64-byte line of a tile
constexpr int kVectors = 16;     // unpacked weight vectors in a step: half of the 32 registers

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

using Element = uint16_t;        // activations: bfloat16
constexpr int kStep = 2 * kVectors;
using Weights = __m512bh;

inline void unpack(const uint8_t* line, Weights (&w)[kVectors]) {
  // bfloat16 of −8 to 7, twice, because the lookup reads 5 bits of the index.
  static const uint16_t table_values[32] = {
      0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000,
      0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040,
      0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0};
  const __m512i table = _mm512_loadu_si512(table_values);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i nibbles = _mm512_loadu_si512(line + 64 * j);
    w[4 * j] = (__m512bh)_mm512_permutexvar_epi16(nibbles, table);
    w[4 * j + 1] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(nibbles, 4), table);
    w[4 * j + 2] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(nibbles, 8), table);
    w[4 * j + 3] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(nibbles, 12), table);
  }
}

// sum + w · x, where `x` are this vector's two inputs, `i` its number in the step.
inline __m512 dot(__m512 sum, Weights w, const Element* x, int i) {
  int32_t pair;
  std::memcpy(&pair, x + 2 * i, sizeof(pair));
  return _mm512_dpbf16_ps(sum, w, (__m512bh)_mm512_set1_epi32(pair));
}

#else

using Element = float;
constexpr int kStep = kVectors;
using Weights = __m512;

inline void unpack(const uint8_t* line, Weights (&w)[kVectors]) {
  const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    const __m512i nibbles = _mm512_loadu_si512(line + 64 * j);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      w[8 * j + 2 * i] = _mm512_permutexvar_ps(_mm512_srli_epi32(nibbles, 4 * i), table);
      w[8 * j + 2 * i + 1] = _mm512_permutexvar_ps(_mm512_srli_epi32(nibbles, 4 * i + 16), table);
    }
  }
}

inline __m512 dot(__m512 sum, Weights w, const Element* x, int i) { return _mm512_fmadd_ps(w, _mm512_set1_ps(x[i]), sum); }

#endif

// The activations of the tokens of one expert, in groups of 32 inputs: `[K / 32, stride, 32]`.
struct Activations {
  const Element* data;
  int64_t stride;         // tokens in a group
  const int32_t* tokens;  // which of them, or null for the first ones
  int count;

  const Element* at(int64_t group, int i) const {
    return data + (group * stride + (tokens ? tokens[i] : i)) * kGroup;
  }
};

inline __m512 widen(const uint16_t* values) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

template <int N>
inline void step_tokens(const Weights (&w)[kVectors], __m512 scale, const Element* const (&x)[N], float* totals) {
  __m512 even[N], odd[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) even[n] = odd[n] = _mm512_setzero_ps();
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; i += 2) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      even[n] = dot(even[n], w[i], x[n], i);
      odd[n] = dot(odd[n], w[i + 1], x[n], i + 1);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    const __m512 total = _mm512_load_ps(totals + n * kRows);
    _mm512_store_ps(totals + n * kRows, _mm512_fmadd_ps(_mm512_add_ps(even[n], odd[n]), scale, total));
  }
}

// totals `[count, 16]` = x · tileᵀ. tile: `[K / 8]` lines, scales: bfloat16 `[K / 32, 16]`.
inline void multiply(const uint8_t* tile, const uint16_t* scales, int64_t inputs, const Activations& x, float* totals) {
  std::memset(totals, 0, sizeof(float) * kRows * x.count);
  for (int64_t k = 0; k < inputs; k += kStep) {
    Weights w[kVectors];
    unpack(tile + k * (64 / kLineInputs), w);
    const int64_t group = k / kGroup;
    const int64_t within = k % kGroup;
    const __m512 scale = widen(scales + group * kRows);
    int n = 0;
    for (; n + 4 <= x.count; n += 4) {
      const Element* const rows[4] = {x.at(group, n) + within, x.at(group, n + 1) + within,
                                      x.at(group, n + 2) + within, x.at(group, n + 3) + within};
      step_tokens<4>(w, scale, rows, totals + n * kRows);
    }
    for (; n < x.count; ++n) {
      const Element* const rows[1] = {x.at(group, n) + within};
      step_tokens<1>(w, scale, rows, totals + n * kRows);
    }
  }
}

}  // namespace k26
