// Does a layer's work on a CPU, in phases in which all threads of a job take part.
//
// First the inputs are rounded to 16 bits. In the phase gate and up, a thread takes rows of an expert and writes
// silu(gate) · up. In the phase down, a thread takes tiles of output rows and adds up each token's experts in the order
// of the experts. A thread computes each tile that it takes alone, so a result has the same bits with any number of
// threads and in any batch.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kernel.hpp"
#include "math.hpp"
#include "pool.hpp"
#include "queue.hpp"
#include "scratch.hpp"
#include "tiles.hpp"

namespace k26 {
namespace {

// Tokens that are computed at a time. This bounds the scratch memory: 90 MB at Kimi-K2.6's sizes, and 160 MB with tiles
// (AMX).
constexpr int64_t kChunkTokens = 1024;
// Tokens of an expert that are multiplied by one tile before the next: their activations stay in a second-level cache.
// 32 and 128 tokens measured the same on a CPU whose third-level cache keeps up.
constexpr int kBlockTokens = 64;
// Groups of inputs that several tokens are multiplied by at once, in all four tiles of gate and up. Their activations
// are 9 KB, which the first-level cache keeps from tile to tile beside the tiles' totals. 512 tokens on two cores of a
// Zen 4 ran at 274 GFLOP/s with 2 groups and at 265 with 16 (AVX2), at 372 and 365 (AVX512 with VNNI). On a Zen 3,
// whose second-level cache has 512 KB, they ran at 193 GFLOP/s with 16 groups and at 161 to 175 with all groups at
// once.
constexpr int64_t kChunkGroups = 2;

// Groups of activations, counted for each token, that are expanded for tile registers at a time: 270 KB, which fit the
// second-level cache.
constexpr int64_t kTileInputs = 2048;
// Groups of rows that are multiplied by the activations that are expanded at a time: their products are 256 KB.
constexpr int64_t kTileGroups = 16;

// `Layer` and `Call` have the same fields in `threads.py`.
struct Layer {
  uint8_t* w13;         // [E, I / 32, 4, H / 8] lines of 64 bytes: two tiles of gate, then the two of up
  uint16_t* w13_scale;  // bfloat16 [E, I / 32, 4, H / 32, 16]
  uint8_t* w2;          // [E, H / 16, I / 8] lines
  uint16_t* w2_scale;   // bfloat16 [E, H / 16, I / 32, 16]
  int64_t experts;
  int64_t hidden;
  int64_t intermediate;
};

struct Call {
  const uint16_t* x;      // bfloat16 [tokens, H]
  const int32_t* ids;     // [tokens, top_k], −1 or any other number that names no expert for none
  const float* weights;   // [tokens, top_k]
  const int32_t* map;     // [map_size] the local index of each global id, or null
  int64_t map_size;
  int64_t tokens;
  int64_t top_k;
  void* out;              // [tokens, H], bfloat16 or float32
  int64_t out_is_float;
  int64_t* counts = nullptr;  // [map_size] uses of each global id, to which calls in a stream add theirs, or null
};

// The token–expert pairs of a chunk of tokens, in order of expert and then token.
struct Routing {
  std::vector<int32_t> first;   // [E + 2] where each expert's pairs begin, and where the last expert's end
  std::vector<int32_t> tokens;  // [pairs] index of the token in the chunk
  std::vector<float> weights;   // [pairs]
  std::vector<int32_t> chosen;  // the experts that have pairs

  void resize(int64_t experts, int64_t pairs) {
    first.resize(experts + 2);
    tokens.resize(pairs);
    weights.resize(pairs);
    chosen.reserve(experts);
  }

  void fill(const Layer& layer, const Call& call, int64_t begin, int64_t end) {
    const auto local = [&](int64_t pair) {
      int32_t id = call.ids[pair];
      if (call.map) id = id >= 0 && id < call.map_size ? call.map[id] : -1;
      return id < layer.experts ? id : -1;
    };
    std::fill(first.begin(), first.end(), 0);
    // Pairs are counted two entries further on, so that filling in the pairs moves each beginning to its own entry.
    for (int64_t pair = begin * call.top_k; pair < end * call.top_k; ++pair)
      if (const int32_t expert = local(pair); expert >= 0) ++first[expert + 2];
    for (int64_t expert = 0; expert < layer.experts; ++expert) first[expert + 2] += first[expert + 1];
    for (int64_t pair = begin * call.top_k; pair < end * call.top_k; ++pair) {
      const int32_t expert = local(pair);
      if (expert < 0) continue;
      const int32_t place = first[expert + 1]++;
      tokens[place] = static_cast<int32_t>(pair / call.top_k - begin);
      weights[place] = call.weights[pair];
    }
    chosen.clear();
    for (int32_t expert = 0; expert < layer.experts; ++expert)
      if (first[expert] < first[expert + 1]) chosen.push_back(expert);
  }
};

struct State {
  Layer layer;
  Call call;
  Routing routing;
  Scratch queues;              // Queues [threads], those of a NUMA node at the index of its first thread
  Scratch x;                   // Quantized [H / 32, tokens]
  Scratch x_terms;             // Terms [H / 32, tokens]
  Scratch expanded;            // Expanded [threads], if the instruction set has tiles
  Scratch products;            // Products [threads, kTileGroups], if the instruction set has tiles
  Scratch intermediate;        // Quantized [I / 32, pairs]: silu(gate) · up
  Scratch intermediate_tiles;  // TileInput [I / 32, pairs], for the experts that are computed in tiles
  Scratch intermediate_terms;  // Terms [I / 32, pairs]
  Scratch total;               // float32 [H / 16, tokens, 16]: a tile's tokens lie side by side, which suits the caches
  Scratch packed;              // one projection of an expert as the checkpoint has it
  Scratch scales;              // the scales of that projection

  Queues& queues_of(const Worker& me) const { return queues.as<Queues>()[me.node_begin]; }
};

void quantize_inputs(const Worker& me, const State& state, int64_t begin, int64_t tokens) {
  const int64_t groups = state.layer.hidden / kGroup;
  for (int64_t group = groups * me.index / me.count; group < groups * (me.index + 1) / me.count; ++group)
    for (int64_t token = 0; token < tokens; ++token) {
      const uint16_t* from = state.call.x + (begin + token) * state.layer.hidden + group * kGroup;
      const int64_t to = group * tokens + token;
      quantize(widen(from), widen(from + kRows), state.x.as<Quantized>()[to], state.x_terms.as<Terms>()[to]);
    }
}

// The products of some tokens with two tiles of gate and two of up.
struct Products {
  alignas(64) float tiles[4][kBlockTokens * kRows];
};

// Some groups of the activations of an expert's tokens, expanded for tile registers and side by side.
struct Expanded {
  static constexpr int64_t kSize = kTileInputs;
  alignas(64) TileInput groups[kSize + kBlockTokens];
  Terms terms[kSize];

  TileActivations of(const Activations& x, int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group)
      for (int i = 0; i < x.count; ++i) {
        const int64_t from = x.index(group, i), to = (group - begin) * x.count + i;
        expand(x.groups[from], groups[to]);
        terms[to] = x.terms[from];
      }
    return {groups, terms, x.count, x.count, begin};
  }
};

// Computes gate and up of an expert's tokens for the groups [begin, end) of `down`'s inputs. A group is 32 rows of gate
// and 32 rows of up.
void gate_and_up(const Worker& me, const State& state, int64_t tokens, int32_t expert, int64_t begin, int64_t end) {
  const Layer& layer = state.layer;
  const Routing& routing = state.routing;
  const int64_t groups = layer.intermediate / kGroup, inputs = layer.hidden / kGroup;
  const int64_t pairs = routing.first[layer.experts];
  const int64_t tile_bytes = layer.hidden / kLineInputs * kLine;
  const int64_t tile_scales = layer.hidden / kGroup * kRows;
  const int32_t last_pair = routing.first[expert + 1];
  Products single;
  for (int32_t pair = routing.first[expert]; pair < last_pair; pair += kBlockTokens) {
    const int count = std::min(kBlockTokens, last_pair - pair);
    const Activations x{state.x.as<Quantized>(), state.x_terms.as<Terms>(), tokens, routing.tokens.data() + pair, count};
    // Multiplies two tiles of gate and two of up over some of the inputs.
    const auto multiply_four = [&](Products& products, int64_t group, int64_t first, int64_t last, const auto&... x) {
      for (int part = 0; part < 4; ++part) {
        const int64_t tile = (expert * groups + group) * 4 + part;
        multiply(layer.w13 + tile * tile_bytes, layer.w13_scale + tile * tile_scales, first, last, x...,
                 products.tiles[part]);
      }
    };
    const auto finish = [&](const Products& products, int64_t group) {
      for (int i = 0; i < count; ++i) {
        const auto half = [&](int tile) {
          return swiglu(load(products.tiles[tile] + i * kRows), load(products.tiles[2 + tile] + i * kRows));
        };
        const int64_t to = group * pairs + pair + i;
        Quantized& intermediate = state.intermediate.as<Quantized>()[to];
        quantize(half(0), half(1), intermediate, state.intermediate_terms.as<Terms>()[to]);
        if (count >= kFewestInTiles) expand(intermediate, state.intermediate_tiles.as<TileInput>()[to]);
      }
    };
    if (count < kFewestInTiles) {
      const int64_t step = count == 1 ? inputs : kChunkGroups;  // for a single token a tile is read in one stream
      for (int64_t group = begin; group < end; ++group) {
        for (int64_t first = 0; first < inputs; first += step)
          multiply_four(single, group, first, std::min(first + step, inputs), x);
        finish(single, group);
      }
      continue;
    }
    Products* const products = state.products.as<Products>() + me.index * kTileGroups;
    const int64_t step = Expanded::kSize / count;
    const int64_t ahead = step < inputs ? tile_bytes : kIntelAhead;
    for (int64_t some = begin; some < end; some += kTileGroups) {
      const int64_t some_end = std::min(some + kTileGroups, end);
      for (int64_t first = 0; first < inputs; first += step) {
        const int64_t last = std::min(first + step, inputs);
        const TileActivations part = state.expanded.as<Expanded>()[me.index].of(x, first, last);
        for (int64_t group = some; group < some_end; ++group)
          multiply_four(products[group - some], group, first, last, part, ahead);
      }
      for (int64_t group = some; group < some_end; ++group) finish(products[group - some], group);
    }
  }
}

// Computes gate and up of all experts, one after the other.
void gate_and_up(const Worker& me, const State& state, int64_t tokens) {
  const auto [first, last] = of_node(me, state.layer.intermediate / kGroup);
  const int64_t each = last - first;
  state.queues_of(me).gate_and_up.drain(me, state.routing.chosen.size() * each, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t group = begin % each, groups = std::min(each - group, end - begin);
      gate_and_up(me, state, tokens, state.routing.chosen[begin / each], first + group, first + group + groups);
      begin += groups;
    }
  });
}

// Computes down for the tiles [first, last) of the output's rows, and adds up each token's experts in the experts'
// order.
void down(const Worker& me, const State& state, int64_t begin, int64_t tokens, int64_t first, int64_t last) {
  const Layer& layer = state.layer;
  const Routing& routing = state.routing;
  const int64_t tiles = layer.hidden / kRows;
  const int64_t pairs = routing.first[layer.experts];
  const int64_t tile_bytes = layer.intermediate / kLineInputs * kLine;
  const int64_t tile_scales = layer.intermediate / kGroup * kRows;
  alignas(64) float product[kBlockTokens * kRows];
  float* total = state.total.as<float>();
  for (int64_t row = first * tokens; row < last * tokens; ++row) store(total + row * kRows, all(0));
  for (size_t place = 0; place < routing.chosen.size(); ++place) {
    const int32_t expert = routing.chosen[place];
    const int32_t end = routing.first[expert + 1];
    // After the last of these tiles the thread reads the first of these tiles of the next expert.
    const int64_t next = place + 1 < routing.chosen.size() ? routing.chosen[place + 1] : -1;
    const int64_t skipped = next < 0 ? 0 : (next - expert) * tiles + first - last;
    for (int32_t pair = routing.first[expert]; pair < end; pair += kBlockTokens) {
      const int count = std::min(kBlockTokens, end - pair);
      const Terms* terms = state.intermediate_terms.as<Terms>() + pair;
      const Activations x{state.intermediate.as<Quantized>() + pair, terms, pairs, nullptr, count};
      const TileActivations in_tiles{state.intermediate_tiles.as<TileInput>() + pair, terms, pairs, count, 0};
      for (int64_t tile = first; tile < last; ++tile) {
        const uint8_t* weights = layer.w2 + (expert * tiles + tile) * tile_bytes;
        const uint16_t* scales = layer.w2_scale + (expert * tiles + tile) * tile_scales;
        if (count >= kFewestInTiles)
          multiply(weights, scales, 0, layer.intermediate / kGroup, in_tiles, kIntelAhead, product);
        else
          multiply(weights, scales, 0, layer.intermediate / kGroup, x, product,
                   tile + 1 < last ? Jump{} : Jump{skipped * tile_bytes, skipped * tile_scales});
        for (int i = 0; i < count; ++i) {
          float* to = total + (tile * tokens + routing.tokens[pair + i]) * kRows;
          store(to, fma(load(product + i * kRows), all(routing.weights[pair + i]), load(to)));
        }
      }
    }
  }
  for (int64_t tile = first; tile < last; ++tile)
    for (int64_t token = 0; token < tokens; ++token) {
      const Floats sum = load(total + (tile * tokens + token) * kRows);
      const int64_t to = (begin + token) * layer.hidden + tile * kRows;
      if (state.call.out_is_float)
        store_unaligned(static_cast<float*>(state.call.out) + to, sum);
      else
        store_bfloat16(static_cast<uint16_t*>(state.call.out) + to, sum);
    }
}

void down(const Worker& me, const State& state, int64_t begin, int64_t tokens) {
  const auto [first, last] = of_node(me, state.layer.hidden / kRows);
  state.queues_of(me).down.drain(
      me, last - first, [&](int64_t from, int64_t to) { down(me, state, begin, tokens, first + from, first + to); });
}

void run(const Worker& me, void* argument) {
  State& state = *static_cast<State*>(argument);
  const ThreadState mine;
  for (int64_t begin = 0; begin < state.call.tokens; begin += kChunkTokens) {
    const int64_t tokens = std::min(kChunkTokens, state.call.tokens - begin);
    if (begin > 0) me.meet();
    if (me.index == 0) state.routing.fill(state.layer, state.call, begin, begin + tokens);
    if (me.index == me.node_begin) state.queues_of(me).reset();
    quantize_inputs(me, state, begin, tokens);
    me.meet();
    gate_and_up(me, state, tokens);
    me.meet();
    down(me, state, begin, tokens);
  }
}

// Prepares the state for a call on at most `threads` threads.
void prepare(State& state, const Layer& layer, const Call& call, int64_t threads) {
  const int64_t tokens = std::min(kChunkTokens, call.tokens);
  const int64_t pairs = tokens * call.top_k;
  state.layer = layer;
  state.call = call;
  state.routing.resize(layer.experts, pairs);
  state.x.reserve(tokens * layer.hidden / kGroup * sizeof(Quantized));
  state.x_terms.reserve(tokens * layer.hidden / kGroup * sizeof(Terms));
  state.intermediate.reserve(pairs * layer.intermediate / kGroup * sizeof(Quantized));
  if (kFewestInTiles <= kBlockTokens) {
    state.expanded.reserve(threads * sizeof(Expanded));
    state.products.reserve(threads * kTileGroups * sizeof(Products));
    state.intermediate_tiles.reserve((pairs * layer.intermediate / kGroup + kBlockTokens) * sizeof(TileInput));
  }
  state.intermediate_terms.reserve(pairs * layer.intermediate / kGroup * sizeof(Terms));
  state.total.reserve(tokens * layer.hidden * sizeof(float));
  state.queues.reserve(threads * sizeof(Queues));
}

}  // namespace
}  // namespace k26
