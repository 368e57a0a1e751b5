// What the experts need of an instruction set, in vectors of 16 lanes, the rows of a tile. Each set has a file with the same
// names, so that kernel.hpp and math.hpp have the arithmetic once:
//
//   Floats, Ints             16 float32, 16 int32; Floats have + − · /
//   all, load, store, …      what their names say; `load` and `store` want 64 bytes of alignment
//   widen, store_bfloat16    from and to bfloat16: to nearest, ties to even, and a NaN keeps a set bit, so that it stays one
//   Quantized                32 activations in 16 bits, laid out for the set's product
//   store_rounded            writes one from values up to ±32512, to nearest, and returns their sum
//   Weights                  a group of a tile, unpacked: u of 16 rows × 32 inputs
//   Weights::sums            start + Σ u · activation of each row, for some tokens at once: exact, in any order
//   sums_of_one              the same of packed weights for one token
//   ThreadState              what a thread holds while it computes
//   refusal                  0 if the system lets this process use the set, else why not, as errno; asked before anything else
//   kFewestInTiles           tokens of an expert from which on it is computed in tiles, 16 tokens by 16 rows; then too
//   TileInput, expand        32 activations as a tile takes them, and how they are made of `Quantized`
//   TileWeights, unpack      a group of a tile of weights likewise
//   load_weights             of two groups into the tile registers
//   multiply_tiles           Σ weight · activation of 16 tokens with both: exact, into one of two places
//   store_sums               from there
//
// A set adds no rounding of its own, so the results have the same bits on each of them.

#pragma once

#include <climits>

#if defined(__AMX_BF16__)
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

#if !defined(__AMX_BF16__)
namespace k26 {

struct ThreadState {};
inline int refusal() { return 0; }
constexpr int kFewestInTiles = INT_MAX;  // no tiles
struct TileInput {};
inline void expand(const Quantized&, TileInput&) {}

}  // namespace k26
#endif
