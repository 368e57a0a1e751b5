// The AVX512 intrinsics that simd_avx512.hpp uses, lane by lane, as Intel's guide defines them: for a CPU without AVX512.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "amx.hpp"

template <class Lane, int kLanes>
struct Vector {
  Lane lane[kLanes];
};
using __m512 = Vector<float, 16>;
using __m512i = Vector<int32_t, 16>;
using __m256i = Vector<uint16_t, 16>;
using __m128i = Vector<int8_t, 16>;
using __mmask16 = uint16_t;

constexpr int _CMP_UNORD_Q = 3, _MM_FROUND_TO_NEAREST_INT = 0;

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class To, class Function>
To lanes(Function function) {
  To to;
  for (int i = 0; i < 16; ++i) to.lane[i] = function(i);
  return to;
}

inline __m512 floats(float (*function)(float, float), __m512 a, __m512 b) {
  return lanes<__m512>([&](int i) { return function(a.lane[i], b.lane[i]); });
}
inline __m512 operator+(__m512 a, __m512 b) {
  return floats([](float a, float b) { return a + b; }, a, b);
}
inline __m512 operator-(__m512 a, __m512 b) {
  return floats([](float a, float b) { return a - b; }, a, b);
}
inline __m512 operator*(__m512 a, __m512 b) {
  return floats([](float a, float b) { return a * b; }, a, b);
}
inline __m512 operator/(__m512 a, __m512 b) {
  return floats([](float a, float b) { return a / b; }, a, b);
}

inline __m512 _mm512_set1_ps(float a) {
  return lanes<__m512>([&](int) { return a; });
}
inline __m512 _mm512_loadu_ps(const float* from) {
  return lanes<__m512>([&](int i) { return from[i]; });
}
inline __m512 _mm512_load_ps(const float* from) {
  if (reinterpret_cast<uintptr_t>(from) % 64) __builtin_trap();
  return _mm512_loadu_ps(from);
}
inline void _mm512_storeu_ps(float* to, __m512 a) { std::memcpy(to, &a, sizeof(a)); }
inline void _mm512_store_ps(float* to, __m512 a) {
  if (reinterpret_cast<uintptr_t>(to) % 64) __builtin_trap();
  _mm512_storeu_ps(to, a);
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return lanes<__m512>([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
}
inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) {
  return lanes<__m512>([&](int i) { return std::fma(-a.lane[i], b.lane[i], c.lane[i]); });
}
// The second operand where one is no number.
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
  return floats([](float a, float b) { return a > b ? a : b; }, a, b);
}
inline __m512 _mm512_min_ps(__m512 a, __m512 b) {
  return floats([](float a, float b) { return a < b ? a : b; }, a, b);
}
inline __m512 _mm512_abs_ps(__m512 a) {
  return lanes<__m512>([&](int i) { return std::fabs(a.lane[i]); });
}
inline __m512 _mm512_roundscale_ps(__m512 a, int) {
  return lanes<__m512>([&](int i) { return std::nearbyint(a.lane[i]); });
}
inline __m512 _mm512_scalef_ps(__m512 a, __m512 n) {
  return lanes<__m512>([&](int i) { return std::ldexp(a.lane[i], static_cast<int>(std::floor(n.lane[i]))); });
}
inline float _mm512_reduce_max_ps(__m512 a) {
  float largest = a.lane[0];
  for (float lane : a.lane) largest = largest > lane ? largest : lane;
  return largest;
}
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int) {
  __mmask16 mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<__mmask16>((std::isnan(a.lane[i]) || std::isnan(b.lane[i])) << i);
  return mask;
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  return lanes<__m512>([&](int i) { return static_cast<float>(a.lane[i]); });
}
inline __m512i _mm512_cvtps_epi32(__m512 a) {
  return lanes<__m512i>([&](int i) { return std::isnan(a.lane[i]) ? INT32_MIN : static_cast<int32_t>(std::nearbyint(a.lane[i])); });
}
inline __m512 _mm512_castsi512_ps(__m512i a) { return bits<__m512>(a); }
inline __m512i _mm512_castps_si512(__m512 a) { return bits<__m512i>(a); }

inline __m512i ints(int64_t (*function)(int64_t, int64_t), __m512i a, __m512i b) {
  return lanes<__m512i>([&](int i) { return static_cast<int32_t>(function(a.lane[i], b.lane[i])); });
}
inline __m512i _mm512_setzero_si512() { return {}; }
inline __m512i _mm512_set1_epi32(int32_t a) {
  return lanes<__m512i>([&](int) { return a; });
}
inline __m512i _mm512_set1_epi8(int8_t a) { return _mm512_set1_epi32(static_cast<uint8_t>(a) * 0x01010101); }
inline __m512i _mm512_set1_epi16(int16_t a) { return _mm512_set1_epi32(static_cast<uint16_t>(a) * 0x00010001); }
inline __m512i _mm512_loadu_si512(const void* from) {
  __m512i to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
  return ints([](int64_t a, int64_t b) { return a + b; }, a, b);
}
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) {
  return ints([](int64_t a, int64_t b) { return a - b; }, a, b);
}
inline __m512i _mm512_and_si512(__m512i a, __m512i b) {
  return ints([](int64_t a, int64_t b) { return a & b; }, a, b);
}
inline __m512i _mm512_slli_epi32(__m512i a, unsigned n) {
  return lanes<__m512i>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) << n); });
}
inline __m512i _mm512_srli_epi32(__m512i a, unsigned n) {
  return lanes<__m512i>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) >> n); });
}
inline __m512i _mm512_srai_epi32(__m512i a, unsigned n) {
  return lanes<__m512i>([&](int i) { return a.lane[i] >> n; });
}
inline __m512i _mm512_mask_or_epi32(__m512i otherwise, __mmask16 mask, __m512i a, __m512i b) {
  return lanes<__m512i>([&](int i) { return mask >> i & 1 ? a.lane[i] | b.lane[i] : otherwise.lane[i]; });
}
inline int32_t _mm512_reduce_add_epi32(__m512i a) {
  int64_t sum = 0;
  for (int32_t lane : a.lane) sum += lane;
  return static_cast<int32_t>(sum);
}

using Shorts = Vector<int16_t, 32>;
using Bytes = Vector<int8_t, 64>;
template <class Function>
__m512i shorts(Function function) {
  Shorts to;
  for (int i = 0; i < 32; ++i) to.lane[i] = static_cast<int16_t>(function(i));
  return bits<__m512i>(to);
}
inline __m512i _mm512_srli_epi16(__m512i a, unsigned n) {
  const auto from = bits<Shorts>(a);
  return shorts([&](int i) { return static_cast<uint16_t>(from.lane[i]) >> n; });
}
inline __m512i _mm512_add_epi16(__m512i a, __m512i b) {
  const auto x = bits<Shorts>(a), y = bits<Shorts>(b);
  return shorts([&](int i) { return x.lane[i] + y.lane[i]; });
}
inline __m512i _mm512_maddubs_epi16(__m512i a, __m512i b) {
  const auto x = bits<Bytes>(a), y = bits<Bytes>(b);
  return shorts([&](int i) {
    const auto product = [&](int j) { return static_cast<uint8_t>(x.lane[j]) * y.lane[j]; };
    const int sum = product(2 * i) + product(2 * i + 1);
    return sum > INT16_MAX ? INT16_MAX : sum < INT16_MIN ? INT16_MIN : sum;
  });
}
inline __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
  const auto x = bits<Shorts>(a), y = bits<Shorts>(b);
  return lanes<__m512i>([&](int i) { return x.lane[2 * i] * y.lane[2 * i] + x.lane[2 * i + 1] * y.lane[2 * i + 1]; });
}

inline __m512i _mm512_permutexvar_epi16(__m512i index, __m512i a) {
  const auto from = bits<Shorts>(a), chosen = bits<Shorts>(index);
  return shorts([&](int i) { return from.lane[chosen.lane[i] & 31]; });
}
inline __m512i _mm512_permutexvar_epi32(__m512i index, __m512i a) {
  return lanes<__m512i>([&](int i) { return a.lane[index.lane[i] & 15]; });
}
template <class... Ints>
inline __m512i _mm512_setr_epi32(Ints... a) {
  return {{a...}};
}
inline void _mm512_storeu_si512(void* to, __m512i a) { std::memcpy(to, &a, sizeof(a)); }

inline __m256i _mm256_loadu_si256(const __m256i* from) {
  __m256i to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}
inline void _mm256_storeu_si256(__m256i* to, __m256i a) { std::memcpy(to, &a, sizeof(a)); }
inline __m128i _mm_loadu_si128(const __m128i* from) {
  __m128i to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}
inline void _mm_storeu_si128(__m128i* to, __m128i a) { std::memcpy(to, &a, sizeof(a)); }
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return lanes<__m512i>([&](int i) { return a.lane[i]; });
}
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
  return lanes<__m256i>([&](int i) { return static_cast<uint16_t>(a.lane[i]); });
}
inline __m128i _mm512_cvtepi32_epi8(__m512i a) {
  return lanes<__m128i>([&](int i) { return static_cast<int8_t>(a.lane[i]); });
}
inline __m512i _mm512_cvtepi8_epi32(__m128i a) {
  return lanes<__m512i>([&](int i) { return a.lane[i]; });
}
