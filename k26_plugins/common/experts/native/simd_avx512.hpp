// AVX512, with and without VNNI. The names are those of `simd.hpp`.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace k26 {

#if defined(__AMX_BF16__)
constexpr char kInstructionSet[] = "AMX with AVX512";
#elif defined(__AVX512VNNI__)
constexpr char kInstructionSet[] = "AVX512 with VNNI";
#else
constexpr char kInstructionSet[] = "AVX512";
#endif

using Floats = __m512;
using Ints = __m512i;

inline Floats all(float value) { return _mm512_set1_ps(value); }
inline Floats load(const float* from) { return _mm512_load_ps(from); }
inline void store(float* to, Floats values) { _mm512_store_ps(to, values); }
inline void store_unaligned(float* to, Floats values) { _mm512_storeu_ps(to, values); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats abs(Floats a) { return _mm512_abs_ps(a); }
inline Floats round(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
inline Floats times_power_of_two(Floats a, Floats n) { return _mm512_scalef_ps(a, n); }
inline float largest(Floats a) { return _mm512_reduce_max_ps(a); }
inline bool has_nan(Floats a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
inline Floats to_float(Ints a) { return _mm512_cvtepi32_ps(a); }

inline Floats widen(const uint16_t* bfloat16) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bfloat16));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void store_bfloat16(uint16_t* to, Floats values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i chosen = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
}

// The product of AVX512-VNNI takes bytes. One operand is 64 bytes of u, four inputs of each row, as a line has them
// after one mask, or a shift and a mask. The other operand is signed bytes of activations, so an activation is kept as
// a high and a low byte, value = 256 · high + low. These are two products of 64 bytes instead of one of 32 pairs with
// AVX512-BF16: the same arithmetic with half the unpacking.
struct Quantized {
  int8_t high[32];
  int8_t low[32];
};

inline int32_t store_rounded(Quantized& to, Floats first, Floats second) {
  __m512i sum = _mm512_setzero_si512();
  for (int half = 0; half < 2; ++half) {
    const __m512i value = _mm512_cvtps_epi32(half ? second : first);
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
    const __m512i low = _mm512_sub_epi32(value, _mm512_slli_epi32(high, 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to.high + 16 * half), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to.low + 16 * half), _mm512_cvtepi32_epi8(low));
    sum = _mm512_add_epi32(sum, value);
  }
  return _mm512_reduce_add_epi32(sum);
}

class Weights {
 public:
  explicit Weights(const uint8_t* lines) {
    const __m512i mask = _mm512_set1_epi8(0x0F);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i nibbles = _mm512_loadu_si512(lines + 64 * j);
      w_[2 * j] = _mm512_and_si512(nibbles, mask);
      w_[2 * j + 1] = _mm512_and_si512(_mm512_srli_epi16(nibbles, 4), mask);
    }
  }

  template <int kTokens>
  void sums(const Quantized* const (&x)[kTokens], const int32_t (&start)[kTokens], Ints (&to)[kTokens]) const {
#pragma GCC unroll 4
    for (int i = 0; i < kTokens; ++i) {
      const __m512i high = dot(_mm512_setzero_si512(), x[i]->high);
      const __m512i low = dot(_mm512_set1_epi32(start[i]), x[i]->low);
      to[i] = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
    }
  }

 private:
  __m512i dot(__m512i sum, const int8_t* x) const {
#if defined(__AVX512VNNI__)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      // This is _mm512_dpbusd_epi32 with the broadcast as its memory operand. From the intrinsics GCC makes the
      // broadcast an instruction with a register of its own.
      asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w_[i]), "m"(*reinterpret_cast<const int32_t(*)>(x + 4 * i)));
    }
    return sum;
#else
    // Without VNNI the instruction adds two products in 16 bits. Eight such sums stay below 8 · 2 · 15 · 128 = 30720.
    __m512i pairs = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      int32_t four;
      std::memcpy(&four, x + 4 * i, sizeof(four));
      pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16(w_[i], _mm512_set1_epi32(four)));
    }
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
  }

  __m512i w_[8];
};

inline Ints sums_of_one(const uint8_t* lines, const Quantized& x, int32_t start) {
  Ints to[1];
  Weights(lines).sums<1>({&x}, {start}, to);
  return to[0];
}

}  // namespace k26
