// ARM's NEON with the dot product of ARMv8.2 (every server since Neoverse N1), with and without i8mm's product of matrices
// (Neoverse V1 and N2, Grace). The names are those of `simd.hpp`.

#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace k26 {

#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr char kInstructionSet[] = "NEON with i8mm";
#else
constexpr char kInstructionSet[] = "NEON with dot product";
#endif

struct Floats {
  float32x4_t part[4];
};
struct Ints {
  int32x4_t part[4];
};

template <class To = Floats, class Function>
inline To each_part(Function function) {
  return {{function(0), function(1), function(2), function(3)}};
}

inline Floats operator+(Floats a, Floats b) {
  return each_part([&](int i) { return vaddq_f32(a.part[i], b.part[i]); });
}
inline Floats operator-(Floats a, Floats b) {
  return each_part([&](int i) { return vsubq_f32(a.part[i], b.part[i]); });
}
inline Floats operator*(Floats a, Floats b) {
  return each_part([&](int i) { return vmulq_f32(a.part[i], b.part[i]); });
}
inline Floats operator/(Floats a, Floats b) {
  return each_part([&](int i) { return vdivq_f32(a.part[i], b.part[i]); });
}

inline Floats all(float value) {
  return each_part([&](int) { return vdupq_n_f32(value); });
}
inline Floats load(const float* from) {
  return each_part([&](int i) { return vld1q_f32(from + 4 * i); });
}
inline void store(float* to, Floats values) {
  for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, values.part[i]);
}
inline void store_unaligned(float* to, Floats values) { store(to, values); }
inline Floats fma(Floats a, Floats b, Floats c) {
  return each_part([&](int i) { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); });
}
inline Floats fnma(Floats a, Floats b, Floats c) {
  return each_part([&](int i) { return vfmsq_f32(c.part[i], a.part[i], b.part[i]); });
}
// For a NaN and a number these return the number, as x86's do if the number comes second.
inline Floats max(Floats a, Floats b) {
  return each_part([&](int i) { return vmaxnmq_f32(a.part[i], b.part[i]); });
}
inline Floats min(Floats a, Floats b) {
  return each_part([&](int i) { return vminnmq_f32(a.part[i], b.part[i]); });
}
inline Floats abs(Floats a) {
  return each_part([&](int i) { return vabsq_f32(a.part[i]); });
}
inline Floats round(Floats a) {
  return each_part([&](int i) { return vrndnq_f32(a.part[i]); });
}
inline Floats to_float(Ints a) {
  return each_part([&](int i) { return vcvtq_f32_s32(a.part[i]); });
}

// Multiplies in two steps, each by a power of two that float32 has. The first step is exact.
inline Floats times_power_of_two(Floats a, Floats n) {
  return each_part([&](int i) {
    const auto power = [](int32x4_t n) {
      return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
    };
    const int32x4_t whole = vcvtnq_s32_f32(n.part[i]), half = vshrq_n_s32(whole, 1);
    return vmulq_f32(vmulq_f32(a.part[i], power(half)), power(vsubq_s32(whole, half)));
  });
}

inline float largest(Floats a) {
  return vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(a.part[0], a.part[1]), vmaxnmq_f32(a.part[2], a.part[3])));
}

inline bool has_nan(Floats a) {
  uint32x4_t number = vdupq_n_u32(~0u);
  for (int i = 0; i < 4; ++i) number = vandq_u32(number, vceqq_f32(a.part[i], a.part[i]));
  return vminvq_u32(number) == 0;
}

inline Floats widen(const uint16_t* bfloat16) {
  return each_part([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(bfloat16 + 4 * i), 16)); });
}

inline void store_bfloat16(uint16_t* to, Floats values) {
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t bits = vreinterpretq_u32_f32(values.part[i]);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t nearest = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    const uint32x4_t number = vceqq_f32(values.part[i], values.part[i]);
    vst1_u16(to + 4 * i, vshrn_n_u32(vbslq_u32(number, nearest, vorrq_u32(bits, vdupq_n_u32(0x400000))), 16));
  }
}

// Both products take signed bytes: u, and an activation as a high and a low byte, value = 256 · high + low.
//
// The dot product takes four inputs of each of four rows, as a line has them, and four inputs of a token. The product
// of matrices takes eight inputs of each of two rows and of each of two columns. The columns are the high and the low
// bytes of one token, so that a single token fills the product.
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int kSpan = 8;  // inputs whose high bytes lie together, followed by their low bytes
#else
constexpr int kSpan = 32;
#endif

struct Quantized {
  int8_t value[32 / kSpan][2][kSpan];  // [][0] are the high bytes
};

inline int32_t store_rounded(Quantized& to, Floats first, Floats second) {
  int32x4_t sum = vdupq_n_s32(0);
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 4; ++i) {
      const int32x4_t value = vcvtnq_s32_f32((half ? second : first).part[i]);
      const int32x4_t high = vshrq_n_s32(vaddq_s32(value, vdupq_n_s32(128)), 8);
      const int32x4_t low = vsubq_s32(value, vshlq_n_s32(high, 8));
      const auto four_bytes = [](int8_t* to, int32x4_t values) {
        const int16x4_t shorts = vmovn_s32(values);
        const int32_t bytes = vget_lane_s32(vreinterpret_s32_s8(vmovn_s16(vcombine_s16(shorts, shorts))), 0);
        std::memcpy(to, &bytes, sizeof(bytes));
      };
      const int input = 16 * half + 4 * i;
      four_bytes(to.value[input / kSpan][0] + input % kSpan, high);
      four_bytes(to.value[input / kSpan][1] + input % kSpan, low);
      sum = vaddq_s32(sum, value);
    }
  return vaddvq_s32(sum);
}

// Four rows of a line as the product takes them. For the dot product these are inputs 0 to 3 of each row, and inputs 4
// to 7; for the product of matrices they are all eight inputs of the first two rows, and those of the other two.
struct Halves {
  int8x16_t first, second;
};

inline Halves unpack(const uint8_t* from) {
  const uint8x16_t nibbles = vld1q_u8(from), low = vandq_u8(nibbles, vdupq_n_u8(0x0F)), high = vshrq_n_u8(nibbles, 4);
#if defined(__ARM_FEATURE_MATMUL_INT8)
  const uint32x4_t first = vreinterpretq_u32_u8(low), second = vreinterpretq_u32_u8(high);
  return {vreinterpretq_s8_u32(vzip1q_u32(first, second)), vreinterpretq_s8_u32(vzip2q_u32(first, second))};
#else
  return {vreinterpretq_s8_u8(low), vreinterpretq_s8_u8(high)};
#endif
}

#if defined(__ARM_FEATURE_MATMUL_INT8)

// The sums of a token. Each vector has [row][high, low] for two rows.
struct Sums {
  int32x4_t two_rows[8];

  explicit Sums(int32_t start) {
    const int32x4_t both = vzip1q_s32(vdupq_n_s32(0), vdupq_n_s32(start));
    for (int i = 0; i < 8; ++i) two_rows[i] = both;
  }

  void add_line(int line, const Halves (&w)[4], const Quantized& x) {
    const int8x16_t values = vld1q_s8(x.value[line][0]);
    for (int i = 0; i < 4; ++i) {
      two_rows[2 * i] = vmmlaq_s32(two_rows[2 * i], w[i].first, values);
      two_rows[2 * i + 1] = vmmlaq_s32(two_rows[2 * i + 1], w[i].second, values);
    }
  }

  Ints total() const {
    return each_part<Ints>([&](int i) {
      const int32x4_t high = vuzp1q_s32(two_rows[2 * i], two_rows[2 * i + 1]);
      return vaddq_s32(vshlq_n_s32(high, 8), vuzp2q_s32(two_rows[2 * i], two_rows[2 * i + 1]));
    });
  }
};

#else

struct Sums {
  int32x4_t high[4], low[4];

  explicit Sums(int32_t start) {
    for (int i = 0; i < 4; ++i) high[i] = vdupq_n_s32(0), low[i] = vdupq_n_s32(start);
  }

  void add_line(int line, const Halves (&w)[4], const Quantized& x) {
    const int8x8_t high_bytes = vld1_s8(x.value[0][0] + 8 * line), low_bytes = vld1_s8(x.value[0][1] + 8 * line);
    for (int i = 0; i < 4; ++i) {
      high[i] = vdotq_lane_s32(vdotq_lane_s32(high[i], w[i].first, high_bytes, 0), w[i].second, high_bytes, 1);
      low[i] = vdotq_lane_s32(vdotq_lane_s32(low[i], w[i].first, low_bytes, 0), w[i].second, low_bytes, 1);
    }
  }

  Ints total() const {
    return each_part<Ints>([&](int i) { return vaddq_s32(vshlq_n_s32(high[i], 8), low[i]); });
  }
};

#endif

class Weights {
 public:
  explicit Weights(const uint8_t* lines) {
    for (int line = 0; line < 4; ++line)
      for (int i = 0; i < 4; ++i) w_[line][i] = unpack(lines + 64 * line + 16 * i);
  }

  template <int kTokens>
  void sums(const Quantized* const (&x)[kTokens], const int32_t (&start)[kTokens], Ints (&to)[kTokens]) const {
#pragma GCC unroll 4
    for (int token = 0; token < kTokens; ++token) {
      Sums sums(start[token]);
#pragma GCC unroll 4
      for (int line = 0; line < 4; ++line) sums.add_line(line, w_[line], *x[token]);
      to[token] = sums.total();
    }
  }

 private:
  Halves w_[4][4];
};

// This takes a line at a time, because all of a group's weights would not fit the registers.
inline Ints sums_of_one(const uint8_t* lines, const Quantized& x, int32_t start) {
  Sums sums(start);
#pragma GCC unroll 4
  for (int line = 0; line < 4; ++line) {
    const uint8_t* rows = lines + 64 * line;
    const Halves w[4] = {unpack(rows), unpack(rows + 16), unpack(rows + 32), unpack(rows + 48)};
    sums.add_line(line, w, x);
  }
  return sums.total();
}

}  // namespace k26
