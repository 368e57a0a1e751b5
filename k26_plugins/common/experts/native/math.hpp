// What happens to activations between the products: rounding to 16 bits, SwiGLU, rounding to bfloat16.

#pragma once

#include "kernel.hpp"

namespace k26 {

// A group of 32 activations as 16-bit multiples of a scale. A group that is not finite gets the scale NaN: it must not
// look like numbers further on.
inline void quantise(__m512 first, __m512 second, Quantised& to, Terms& terms) {
  constexpr float kLargest = 32512;  // 127 · 256, so that the high byte holds it
  const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(first), _mm512_abs_ps(second)));
  const __m512 zero = _mm512_add_ps(_mm512_sub_ps(first, first), _mm512_sub_ps(second, second));
  const bool finite = _mm512_cmp_ps_mask(zero, zero, _CMP_UNORD_Q) == 0;
  // Below 1e-30 the inverse would overflow; such a group is zero.
  const float inverse = finite && largest > 1e-30f ? kLargest / largest : 0;
  terms.scale = finite ? largest / kLargest : __builtin_nanf("");
  __m512i sum = _mm512_setzero_si512();
  for (int half = 0; half < 2; ++half) {
    const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(half ? second : first, _mm512_set1_ps(inverse)));
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
    const __m512i low = _mm512_sub_epi32(value, _mm512_slli_epi32(high, 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to.high + 16 * half), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to.low + 16 * half), _mm512_cvtepi32_epi8(low));
    sum = _mm512_add_epi32(sum, value);
  }
  terms.offset = -8 * _mm512_reduce_add_epi32(sum);
}

// e^x to 2e-7: 2^n · e^r with |r| ≤ ln 2 / 2, the second by its series.
inline __m512 exponential(__m512 x) {
  const __m512 bounded = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(89.0f)), _mm512_set1_ps(-104.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(bounded, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), bounded);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 sum = _mm512_set1_ps(1.0f / 720);
  for (const float coefficient : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(coefficient));
  return _mm512_scalef_ps(sum, n);
}

// silu(gate) · up
inline __m512 swiglu(__m512 gate, __m512 up) {
  const __m512 negative = _mm512_sub_ps(_mm512_setzero_ps(), gate);
  const __m512 denominator = _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(negative));
  return _mm512_mul_ps(_mm512_div_ps(gate, denominator), up);
}

// To nearest, ties to even; a NaN keeps a set bit, so that it stays one.
inline void store_bfloat16(uint16_t* to, __m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i chosen = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
}

}  // namespace k26
