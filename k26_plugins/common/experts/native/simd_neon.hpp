// ARM's NEON with the dot product of ARMv8.2 (every server since Neoverse N1). The names are those of `simd.hpp`.

#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace k26 {

constexpr char kInstructionSet[] = "NEON with dot product";

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
// Of a NaN and a number these are the number, as x86's are where the number comes second.
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

// In two steps, each with an exponent that float32 has: the first is exact.
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

// The product takes four signed bytes of each of four rows: u, and the activations as a high and a low byte,
// value = 256 · high + low.
struct Quantised {
  int8_t high[32];
  int8_t low[32];
};

inline int32_t store_rounded(Quantised& to, Floats first, Floats second) {
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
      four_bytes(to.high + 16 * half + 4 * i, high);
      four_bytes(to.low + 16 * half + 4 * i, low);
      sum = vaddq_s32(sum, value);
    }
  return vaddvq_s32(sum);
}

class Weights {
 public:
  explicit Weights(const uint8_t* lines) {
    for (int line = 0; line < 4; ++line)
      for (int i = 0; i < 4; ++i) {
        const uint8x16_t nibbles = vld1q_u8(lines + 64 * line + 16 * i);
        w_[2 * line][i] = vreinterpretq_s8_u8(vandq_u8(nibbles, vdupq_n_u8(0x0F)));
        w_[2 * line + 1][i] = vreinterpretq_s8_u8(vshrq_n_u8(nibbles, 4));
      }
  }

  template <int kTokens>
  void sums(const Quantised* const (&x)[kTokens], const int32_t (&start)[kTokens], Ints (&to)[kTokens]) const {
    for (int token = 0; token < kTokens; ++token) {
      const Ints high = dot(0, x[token]->high), low = dot(start[token], x[token]->low);
      to[token] = each_part<Ints>([&](int i) { return vaddq_s32(vshlq_n_s32(high.part[i], 8), low.part[i]); });
    }
  }

 private:
  Ints dot(int32_t start, const int8_t* x) const {
    Ints sum = each_part<Ints>([&](int) { return vdupq_n_s32(start); });
    const int8x16_t first = vld1q_s8(x), second = vld1q_s8(x + 16);
#define K26_FOUR_INPUTS(index, from, lane) \
  for (int i = 0; i < 4; ++i) sum.part[i] = vdotq_laneq_s32(sum.part[i], w_[index][i], from, lane)
    K26_FOUR_INPUTS(0, first, 0);
    K26_FOUR_INPUTS(1, first, 1);
    K26_FOUR_INPUTS(2, first, 2);
    K26_FOUR_INPUTS(3, first, 3);
    K26_FOUR_INPUTS(4, second, 0);
    K26_FOUR_INPUTS(5, second, 1);
    K26_FOUR_INPUTS(6, second, 2);
    K26_FOUR_INPUTS(7, second, 3);
#undef K26_FOUR_INPUTS
    return sum;
  }

  int8x16_t w_[8][4];
};

inline Ints sums_of_one(const uint8_t* lines, const Quantised& x, int32_t start) {
  Ints to[1];
  Weights(lines).sums<1>({&x}, {start}, to);
  return to[0];
}

}  // namespace k26
