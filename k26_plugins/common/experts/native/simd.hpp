// The types and functions that the experts need for an instruction set, on vectors of 16 lanes, which are the rows of a
// tile. Each set has a file with the same names, so that kernel.hpp and math.hpp have the arithmetic once:
//
//   Floats, Ints             16 float32, 16 int32; Floats have + − · /
//   all, load, store, …      what their names say; `load` and `store` need 64 bytes of alignment
//   widen, store_bfloat16    convert from and to bfloat16, to nearest with ties to even; a NaN stays a NaN
//   Quantized                32 activations in 16 bits, laid out for the set's product
//   store_rounded            writes a `Quantized` from values up to ±32512, to nearest, and returns their sum
//   Weights                  a group of a tile, unpacked: u of 16 rows × 32 inputs
//   Weights::sums            start + Σ u · activation of each row, for some tokens at once: exact, in any order
//   sums_of_one              these sums from packed weights for one token
//   ThreadState              the state that a thread holds while it computes
//   refusal                  0 if the system lets this process use the set, else an errno; called before all else
//   kFewestInTiles           the fewest tokens for which an expert is computed in tiles of 16 tokens by 16 rows
//
// A set with tiles has these names too:
//
//   TileInput, expand        32 activations as a tile takes them, and the function that makes them from a `Quantized`
//   TileWeights, unpack      a group of weights as a tile takes it, and the function that makes it from packed weights
//   load_weights             loads two groups of weights into the tile registers
//   multiply_tiles           Σ weight · activation of 16 tokens with both groups: exact, into one of two places
//   store_sums               stores the sums from one of these places
//
// No set adds a rounding of its own, so the results have the same bits on every set.

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
