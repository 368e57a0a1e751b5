// Computes the product of kernel.hpp on an instruction set that multiplies tiles of 16 rows by 16 tokens, in the same
// order and with the same bits.

#pragma once

#include "kernel.hpp"

namespace k26 {

// The activations of the tokens of one expert, side by side: `[groups, stride]`, beginning with group `first`.
struct TileActivations {
  const TileInput* groups;
  const Terms* terms;
  int64_t stride;
  int count;
  int64_t first;
};

#if defined(__AMX_BF16__)

// A step of the work: 16 tokens from `token` on, in two groups from `group` on. The steps go through all tokens first,
// 16 at a time, and then to the next two groups.
struct TileStep {
  int64_t group;
  int token;

  void next(int tokens) {
    token += kTileTokens;
    if (token < tokens) return;
    token = 0;
    group += 2;
  }
};

// Does what `multiply` of kernel.hpp does, and fetches the weights that are `ahead` bytes further on. Up to 15 tokens
// beyond the last are read and left out. A step's sums leave the registers in the next step and are added up in the
// step after that: 16 tokens then take 35 ns, and 52 ns if each step ends before the next one begins (Emerald Rapids;
// the products alone take 13).
inline void multiply(const uint8_t* tile, const uint16_t* scales, int64_t begin, int64_t end, const TileActivations& x,
                     int64_t ahead, float* totals) {
  alignas(64) TileWeights weights[2][2];
  alignas(64) float sums[2][2][kTileTokens * kRows];
  if (begin == 0) std::memset(totals, 0, sizeof(float) * kRows * x.count);
  const auto second = [&](int64_t group) { return group + 1 < end ? group + 1 : group; };
  const auto unpacked = [&](int64_t group) -> auto& { return weights[(group - begin) / 2 % 2]; };
  const auto take = [&](int64_t group) {
    prefetch<1>(tile + group * kGroupBytes + ahead, 2 * kGroupBytes);
    prefetch<1>(scales + group * kRows + ahead / kGroupBytes * kRows, 2 * kRows * sizeof(uint16_t));
    unpack(tile + group * kGroupBytes, unpacked(group)[0]);
    unpack(tile + second(group) * kGroupBytes, unpacked(group)[1]);
  };
  const auto start = [&](int which, const TileStep& at) {
    if (at.token == 0) {
      if (at.group + 2 < end) take(at.group + 2);
      load_weights(unpacked(at.group));
    }
    const TileInput* tokens = x.groups + at.token;
    multiply_tiles(which, tokens + (at.group - x.first) * x.stride, tokens + (second(at.group) - x.first) * x.stride);
  };
  const auto add = [&](int which, const TileStep& at) {
    const Floats scale[2] = {widen(scales + at.group * kRows), widen(scales + second(at.group) * kRows)};
    const Terms* terms = x.terms + (at.group - x.first) * x.stride + at.token;
    const int groups = at.group + 1 < end ? 2 : 1;
    for (int i = 0; i < kTileTokens && at.token + i < x.count; ++i) {
      float* to = totals + (at.token + i) * kRows;
      Floats total = add_group(load(to), load(sums[which][0] + i * kRows), scale[0], terms[i]);
      if (groups > 1) total = add_group(total, load(sums[which][1] + i * kRows), scale[1], terms[x.stride + i]);
      store(to, total);
    }
  };
  const int64_t steps = (end - begin + 1) / 2 * ((x.count + kTileTokens - 1) / kTileTokens);
  TileStep started{begin, 0}, added{begin, 0};
  take(begin);
  for (int64_t step = 0; step < steps + 2; ++step) {
    const int which = step % 2;
    if (step < steps) start(which, started), started.next(x.count);
    if (step >= 1 && step <= steps) store_sums(1 - which, sums[1 - which]);
    if (step >= 2) add(which, added), added.next(x.count);
  }
}

#else

inline void multiply(const uint8_t*, const uint16_t*, int64_t, int64_t, const TileActivations&, int64_t, float*) {}

#endif

}  // namespace k26
