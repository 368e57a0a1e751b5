// AVX2, with and without AVX-VNNI. The names are those of `simd.hpp`.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace k26 {

#if defined(__AVXVNNI__)
constexpr char kInstructionSet[] = "AVX2 with AVX-VNNI";
#else
constexpr char kInstructionSet[] = "AVX2";
#endif

struct Floats {
  __m256 low, high;
};
struct Ints {
  __m256i low, high;
};

inline Floats operator+(Floats a, Floats b) { return {a.low + b.low, a.high + b.high}; }
inline Floats operator-(Floats a, Floats b) { return {a.low - b.low, a.high - b.high}; }
inline Floats operator*(Floats a, Floats b) { return {a.low * b.low, a.high * b.high}; }
inline Floats operator/(Floats a, Floats b) { return {a.low / b.low, a.high / b.high}; }

inline Floats all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Floats load(const float* from) { return {_mm256_load_ps(from), _mm256_load_ps(from + 8)}; }
inline void store(float* to, Floats values) {
  _mm256_store_ps(to, values.low);
  _mm256_store_ps(to + 8, values.high);
}
inline void store_unaligned(float* to, Floats values) {
  _mm256_storeu_ps(to, values.low);
  _mm256_storeu_ps(to + 8, values.high);
}
inline Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats fnma(Floats a, Floats b, Floats c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Floats abs(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
inline Floats round(Floats a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, kNearest), _mm256_round_ps(a.high, kNearest)};
}
inline Floats to_float(Ints a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }

// Multiplies in two steps, each by a power of two that float32 has. The first step is exact.
inline Floats times_power_of_two(Floats a, Floats n) {
  const auto scaled = [](__m256 a, __m256 n) {
    const auto power = [](__m256i n) {
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
    };
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return a * power(half) * power(_mm256_sub_epi32(whole, half));
  };
  return {scaled(a.low, n.low), scaled(a.high, n.high)};
}

inline float largest(Floats a) {
  const __m256 eight = _mm256_max_ps(a.low, a.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline bool has_nan(Floats a) {
  const __m256 nan = _mm256_or_ps(_mm256_cmp_ps(a.low, a.low, _CMP_UNORD_Q), _mm256_cmp_ps(a.high, a.high, _CMP_UNORD_Q));
  return _mm256_movemask_ps(nan) != 0;
}

inline Floats widen(const uint16_t* bfloat16) {
  const auto eight = [](const uint16_t* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  };
  return {eight(bfloat16), eight(bfloat16 + 8)};
}

inline void store_bfloat16(uint16_t* to, Floats values) {
  const auto rounded = [](__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(nearest, quiet, nan), 16);
  };
  // The instruction packs each half of its operands separately, so the quarters are put in order afterwards.
  const __m256i packed = _mm256_packus_epi32(rounded(values.low), rounded(values.high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0b11011000));
}

// The product takes pairs of 16-bit values: u fits them without an offset, and activations fit them whole. With bytes,
// as for AVX512, the high and the low bytes would need two products and two sums, and the sums in 16 bits would have to
// be widened in each group.
//
// The 32 bits of a row in a line hold the inputs 0, 4, 1, 5, 2, 6, 3, 7. A mask after shifts by 0, 4, 8 and 12 leaves
// the pairs (0, 2), (4, 6), (1, 3) and (5, 7), and the activations are kept in this order.
struct Quantized {
  int16_t value[32];
};

inline int32_t store_rounded(Quantized& to, Floats first, Floats second) {
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  __m256i sum = _mm256_setzero_si256();
  const __m256 parts[4] = {first.low, first.high, second.low, second.high};
  for (int line = 0; line < 4; ++line) {
    const __m256i value = _mm256_cvtps_epi32(parts[line]);
    sum = _mm256_add_epi32(sum, value);
    const __m256i ordered = _mm256_permutevar8x32_epi32(value, order);
    const __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to.value + 8 * line), packed);
  }
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
}

inline __m256i dot(__m256i sum, __m256i w, __m256i x) {
#if defined(__AVXVNNI__)
  return _mm256_dpwssd_avx_epi32(sum, w, x);
#else
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w, x));
  // Without this line GCC computes all products before it adds them up and keeps them in memory meanwhile, at a third
  // of the rate.
  asm("" : "+x"(sum));
  return sum;
#endif
}

// Returns the pairs of 8 rows at one of the four shifts.
template <int kPair>
inline __m256i pair(__m256i line) {
  if (kPair == 3) return _mm256_srli_epi16(line, 12);
  return _mm256_and_si256(_mm256_srli_epi16(line, 4 * kPair), _mm256_set1_epi16(0x000F));
}

inline __m256i pair_of(const Quantized& x, int index) {
  int32_t two;
  std::memcpy(&two, x.value + 2 * index, sizeof(two));
  return _mm256_set1_epi32(two);
}

// The unpacked weights are 32 vectors, more than there are registers, so they are kept in the first-level cache.
class Weights {
 public:
  explicit Weights(const uint8_t* lines) {
    for (int line = 0; line < 4; ++line)
      for (int half = 0; half < 2; ++half) {
        const __m256i rows = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lines + 64 * line + 32 * half));
        w_[4 * line][half] = pair<0>(rows);
        w_[4 * line + 1][half] = pair<1>(rows);
        w_[4 * line + 2][half] = pair<2>(rows);
        w_[4 * line + 3][half] = pair<3>(rows);
      }
  }

  template <int kTokens>
  void sums(const Quantized* const (&x)[kTokens], const int32_t (&start)[kTokens], Ints (&to)[kTokens]) const {
    for (int i = 0; i < kTokens; ++i) to[i] = {_mm256_set1_epi32(start[i]), _mm256_set1_epi32(start[i])};
#pragma GCC unroll 16
    for (int index = 0; index < 16; ++index) {
      __m256i low = w_[index][0], high = w_[index][1];
      asm("" : "+x"(low), "+x"(high));  // so that they are loaded once and not for each token
#pragma GCC unroll 8
      for (int i = 0; i < kTokens; ++i) {
        const __m256i two = pair_of(*x[i], index);
        to[i] = {dot(to[i].low, low, two), dot(to[i].high, high, two)};
      }
    }
  }

 private:
  __m256i w_[16][2];
};

// The nibbles stay where they are in their 16 bits, so that those at the shifts 4 and 8 give products 16 and 256 times
// as large. This takes a mask for each, and one shift for a whole sum. The largest sum is 256 · 15 · 32512 · 8, below
// 2^30. The function is always inlined, because a call for each group of a tile would cost what the masks save.
__attribute__((always_inline)) inline Ints sums_of_one(const uint8_t* lines, const Quantized& x, int32_t start) {
  const __m256i masks[3] = {_mm256_set1_epi16(0x000F), _mm256_set1_epi16(0x00F0), _mm256_set1_epi16(0x0F00)};
  __m256i sums[3][2] = {};
  for (auto& sum : sums[0]) sum = _mm256_set1_epi32(start);
#pragma GCC unroll 4
  for (int line = 0; line < 4; ++line)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i rows = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lines + 64 * line + 32 * half));
#pragma GCC unroll 3
      for (int shift = 0; shift < 3; ++shift)
        sums[shift][half] = dot(sums[shift][half], _mm256_and_si256(rows, masks[shift]), pair_of(x, 4 * line + shift));
      sums[0][half] = dot(sums[0][half], _mm256_srli_epi16(rows, 12), pair_of(x, 4 * line + 3));
    }
  const auto total = [&](int half) {
    const __m256i upper = _mm256_add_epi32(sums[1][half], _mm256_srai_epi32(sums[2][half], 4));
    return _mm256_add_epi32(sums[0][half], _mm256_srai_epi32(upper, 4));
  };
  return {total(0), total(1)};
}

}  // namespace k26
