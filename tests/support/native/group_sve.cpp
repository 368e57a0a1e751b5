// What `sums_of_one` would be in SVE with i8mm's product, for vectors of __ARM_FEATURE_SVE_BITS: only to be read as
// instructions. Rows lie in a vector side by side, a token's eight high and low bytes are repeated in each 128 bits of another.

#include <arm_sve.h>

#include <cstdint>

constexpr int kBytes = __ARM_FEATURE_SVE_BITS / 8, kVectors = 64 / kBytes;
using Bytes = svint8_t __attribute__((arm_sve_vector_bits(__ARM_FEATURE_SVE_BITS)));
using Ints = svint32_t __attribute__((arm_sve_vector_bits(__ARM_FEATURE_SVE_BITS)));

extern "C" void one(const uint8_t* lines, const int8_t* x, int32_t start, int32_t* to) {
  Ints sums[2 * kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < 2 * kVectors; ++i) sums[i] = svzip1_s32(svdup_s32(0), svdup_s32(start));
#pragma GCC unroll 4
  for (int line = 0; line < 4; ++line) {
    const Bytes values = svld1rq_s8(svptrue_b8(), x + 16 * line);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const svuint8_t nibbles = svld1_u8(svptrue_b8(), lines + 64 * line + kBytes * i);
      const svint32_t low = svreinterpret_s32_u8(svand_n_u8_x(svptrue_b8(), nibbles, 0x0F));
      const svint32_t high = svreinterpret_s32_u8(svlsr_n_u8_x(svptrue_b8(), nibbles, 4));
      sums[2 * i] = svmmla_s32(sums[2 * i], svreinterpret_s8_s32(svzip1_s32(low, high)), values);
      sums[2 * i + 1] = svmmla_s32(sums[2 * i + 1], svreinterpret_s8_s32(svzip2_s32(low, high)), values);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) {
    const svint32_t high = svuzp1_s32(sums[2 * i], sums[2 * i + 1]), low = svuzp2_s32(sums[2 * i], sums[2 * i + 1]);
    svst1_s32(svptrue_b32(), to + kBytes / 4 * i, svadd_s32_x(svptrue_b32(), svlsl_n_s32_x(svptrue_b32(), high, 8), low));
  }
}
