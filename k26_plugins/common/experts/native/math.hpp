// Conversions of activations and the SwiGLU of a tile.

#pragma once

#include "kernel.hpp"

namespace k26 {

inline void store_bfloat16(uint16_t* to, __m512 values) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(values));
#else
  // Round to nearest, ties to even; a NaN keeps a bit of its payload so that it stays one.
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i chosen = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
#endif
}

inline void store_elements(uint16_t* to, __m512 values) { store_bfloat16(to, values); }
inline void store_elements(float* to, __m512 values) { _mm512_storeu_ps(to, values); }

// A token's group of 32 inputs, as the kernel reads it.
inline void copy_group(const uint16_t* from, uint16_t* to) { std::memcpy(to, from, kGroup * sizeof(uint16_t)); }
inline void copy_group(const uint16_t* from, float* to) {
  _mm512_storeu_ps(to, widen(from));
  _mm512_storeu_ps(to + 16, widen(from + 16));
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

inline __m512 silu_times(__m512 gate, __m512 up) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 denominator = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate)));
  return _mm512_mul_ps(_mm512_div_ps(gate, denominator), up);
}

}  // namespace k26
