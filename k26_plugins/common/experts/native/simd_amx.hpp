// AMX beside AVX512: the sums of 16 tokens with a tile of weights, whose unpacked group is a tile register as it is. The names
// are those of `simd.hpp`, and what is not here is AVX512's.
//
// A group is 8 of a register's 16 rows, half of the depth that the product could take, because the sums must leave the
// registers after each group. So are they exact, and a token has the same bits with tiles as without.

#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "simd_avx512.hpp"

namespace k26 {

constexpr int kTogether = 16;

// Linux, since 5.16, gives tile registers to a process that asks for them; it may refuse.
inline bool permitted() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, and the number of the registers' state
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

// The shapes of the tile registers, as `sums` uses them: 0 and 1 are its sums by high and by low bytes, 2 and 3 the high and
// the low bytes of the tokens, 4 the weights. Other users of the thread's registers set their own.
class ThreadState {
 public:
  ThreadState() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 32, 32, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 8};
    } shapes;
    asm volatile("" : : "r"(&shapes) : "memory");  // GCC 12 takes the instruction to read 8 bytes only
    _tile_loadconfig(&shapes);
  }
  // Registers in use are saved whenever the thread gives way.
  ~ThreadState() { _tile_release(); }
  ThreadState(const ThreadState&) = delete;
};

template <>
inline void Weights::sums<kTogether>(const Quantised* const (&x)[kTogether], const int32_t (&start)[kTogether],
                                     Ints (&to)[kTogether]) const {
  alignas(64) Quantised tokens[kTogether];
  alignas(64) int32_t high[kTogether][16], low[kTogether][16];
  for (int i = 0; i < kTogether; ++i) tokens[i] = *x[i];
  asm volatile("" : : "r"(tokens), "r"(w_) : "memory");  // GCC does not know that loading a tile reads memory
  _tile_loadd(4, w_, 64);
  _tile_loadd(2, tokens[0].high, sizeof(Quantised));
  _tile_loadd(3, tokens[0].low, sizeof(Quantised));
  _tile_zero(0);
  _tile_zero(1);
  _tile_dpbsud(0, 2, 4);
  _tile_dpbsud(1, 3, 4);
  _tile_stored(0, high, 64);
  _tile_stored(1, low, 64);
  for (int i = 0; i < kTogether; ++i) {
    const Ints both = _mm512_add_epi32(_mm512_slli_epi32(_mm512_loadu_si512(high[i]), 8), _mm512_loadu_si512(low[i]));
    to[i] = _mm512_add_epi32(both, _mm512_set1_epi32(start[i]));
  }
}

}  // namespace k26
