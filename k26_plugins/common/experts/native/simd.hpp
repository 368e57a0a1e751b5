// What the experts need of an instruction set, in vectors of 16 lanes, the rows of a tile. Each set has a file with the same
// names, so that kernel.hpp and math.hpp have the arithmetic once:
//
//   Floats, Ints             16 float32, 16 int32; Floats have + − · /
//   all, load, store, …      what their names say; `load` and `store` want 64 bytes of alignment
//   widen, store_bfloat16    from and to bfloat16: to nearest, ties to even, and a NaN keeps a set bit, so that it stays one
//   Quantised                32 activations in 16 bits, laid out for the set's product
//   store_rounded            writes one from values up to ±32512, to nearest, and returns their sum
//   Weights                  a group of a tile, unpacked: u of 16 rows × 32 inputs
//   Weights::sums            start + Σ u · activation of each row, for some tokens at once: exact, in any order
//   sums_of_one              the same of packed weights for one token
//   kTogether                tokens for which `Weights::sums` is at its best
//   ThreadState              what a thread holds while it computes
//   permitted                whether the system lets this process use the set, asked once before anything is computed
//
// A set adds no rounding of its own, so the results have the same bits on each of them.

#pragma once

#if defined(__AMX_INT8__)
#include "simd_amx.hpp"
#elif defined(__AVX512F__)
#include "simd_avx512.hpp"
#elif defined(__AVX2__)
#include "simd_avx2.hpp"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "simd_neon.hpp"
#else
#error "no instruction set that the experts are written for"
#endif

#if !defined(__AMX_INT8__)
namespace k26 {

constexpr int kTogether = 4;
struct ThreadState {};
inline bool permitted() { return true; }

}  // namespace k26
#endif
