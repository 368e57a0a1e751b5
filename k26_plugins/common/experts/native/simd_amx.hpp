// AMX beside AVX512, for the sums of 16 tokens with a group of a tile of weights. The names are those of `simd.hpp`;
// names that are not here come from AVX512's file.
//
// A group of 32 inputs fills the depth of a product of bfloat16. bfloat16 holds u − 8 and each of the two bytes of an
// activation, the higher one times 256. Their sums stay below 2^24 in any order, so the registers' float32 holds them
// exactly, and one number leaves the registers to be scaled. A product of bytes has the same rate, because a group
// fills only half of its depth, and two numbers would leave the registers.

#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

#include "simd_avx512.hpp"

namespace k26 {

constexpr int kTileTokens = 16;
// Fewer tokens are computed by AVX512's code. From a cache 8 tokens take as long either way, and 16 take 47 ns for a
// group of a tile instead of 68, but in a whole layer 8 to 12 tokens were up to a tenth slower in tiles (Emerald
// Rapids).
constexpr int kFewestInTiles = 13;

// Asks for the tile registers, which Linux gives since 5.16 to a process that asks for them, unless it refuses.
inline int refusal() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, and the number of the registers' state
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0 ? 0 : errno;
}

// The tile registers, all of full size. Registers 0 to 3 hold the sums of two groups, in two places; 4 and 5 the
// groups' weights; 6 and 7 the tokens' high and low bytes. Other users of the thread's registers set their own shapes.
class ThreadState {
 public:
  ThreadState() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    asm volatile("" : : "r"(&shapes) : "memory");  // GCC 12 believes that the instruction reads 8 bytes only
    _tile_loadconfig(&shapes);
  }
  // The registers are released because registers in use are saved whenever the thread gives way.
  ~ThreadState() { _tile_release(); }
  ThreadState(const ThreadState&) = delete;
};

// The high bytes of a group, times 256, and the low bytes, in bfloat16. The 32 bits of a row in a line of weights hold
// the inputs 0, 4, 1, 5, 2, 6, 3, 7, so that the pairs of a product are (0, 2), (4, 6), (1, 3) and (5, 7), and the
// activations are kept in this order.
struct TileInput {
  uint16_t high[32];
  uint16_t low[32];
};

inline void expand(const Quantized& from, TileInput& to) {
  const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  const auto half = [&](const int8_t* bytes, int shift) {
    const __m512i values = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m512i ordered = _mm512_permutexvar_epi32(order, _mm512_slli_epi32(values, shift));
    // The values have eight bits, which bfloat16 holds exactly.
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(ordered)), 16));
  };
  for (int i = 0; i < 32; i += 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.high + i), half(from.high + i, 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.low + i), half(from.low + i, 0));
  }
}

// u − 8 in bfloat16, with the pairs of inputs of 16 rows side by side.
using TileWeights = uint16_t[16][32];

inline void unpack(const uint8_t* lines, TileWeights& to) {
  alignas(64) static constexpr uint16_t kValues[32] = {
      0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000,
      0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040,
      0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0};
  const __m512i values = _mm512_loadu_si512(kValues);  // each value twice, because the instruction looks at five bits
  for (int line = 0; line < 4; ++line) {
    const __m512i nibbles = _mm512_loadu_si512(lines + 64 * line);
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair)
      _mm512_storeu_si512(to[4 * line + pair], _mm512_permutexvar_epi16(_mm512_srli_epi16(nibbles, 4 * pair), values));
  }
}

// Loads two groups of weights into the tile registers.
inline void load_weights(const TileWeights (&groups)[2]) {
  asm volatile("" : : "r"(groups) : "memory");  // GCC does not know that loading a tile reads memory
  _tile_loadd(4, groups[0], 64);
  _tile_loadd(5, groups[1], 64);
}

// Computes Σ (u − 8) · activation of 16 tokens with the two groups of weights that were loaded, into one of two places.
// The tokens' activations lie side by side, from `first` on those of the first group and from `second` on those of the
// second. Registers have to be written as numbers.
inline void multiply_tiles(int which, const TileInput* first, const TileInput* second) {
  asm volatile("" : : "r"(first), "r"(second) : "memory");
  if (which) {
    _tile_loadd(6, first->high, sizeof(TileInput));
    _tile_loadd(7, first->low, sizeof(TileInput));
    _tile_zero(2);
    _tile_dpbf16ps(2, 6, 4);
    _tile_dpbf16ps(2, 7, 4);
    _tile_loadd(6, second->high, sizeof(TileInput));
    _tile_loadd(7, second->low, sizeof(TileInput));
    _tile_zero(3);
    _tile_dpbf16ps(3, 6, 5);
    _tile_dpbf16ps(3, 7, 5);
  } else {
    _tile_loadd(6, first->high, sizeof(TileInput));
    _tile_loadd(7, first->low, sizeof(TileInput));
    _tile_zero(0);
    _tile_dpbf16ps(0, 6, 4);
    _tile_dpbf16ps(0, 7, 4);
    _tile_loadd(6, second->high, sizeof(TileInput));
    _tile_loadd(7, second->low, sizeof(TileInput));
    _tile_zero(1);
    _tile_dpbf16ps(1, 6, 5);
    _tile_dpbf16ps(1, 7, 5);
  }
}

inline void store_sums(int which, float (&to)[2][kTileTokens * 16]) {
  if (which) {
    _tile_stored(2, to[0], 64);
    _tile_stored(3, to[1], 64);
  } else {
    _tile_stored(0, to[0], 64);
    _tile_stored(1, to[1], 64);
  }
  asm volatile("" : : "r"(to) : "memory");
}

}  // namespace k26
