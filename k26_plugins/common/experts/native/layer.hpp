// A layer's work on a CPU, and the repacking of its weights, in phases over all threads of a job.
//
// Inputs are rounded to 16 bits. Gate and up: a thread takes the same rows of every expert and writes silu(gate) · up. Then
// down: a thread owns tiles of output rows and adds up the experts of each token in their order, so a result has the same
// bits with any number of threads and in any batch.

#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kernel.hpp"
#include "math.hpp"
#include "pool.hpp"
#include "repack.hpp"
#include "scratch.hpp"
#include "tiles.hpp"

namespace k26 {
namespace {

// Tokens computed at a time: bounds the scratch, 90 MB at Kimi-K2.6's sizes and 160 with tiles.
constexpr int64_t kChunkTokens = 1024;
// Tokens of an expert that pass over a tile at once: their activations stay in a second-level cache. 32 and 128 measured
// the same on a CPU whose third-level cache keeps up.
constexpr int kBlockTokens = 64;
// Groups of inputs over which several tokens pass at once, for all four tiles of gate and up: 9 KB of activations, which the
// first-level cache keeps from tile to tile beside the tiles' totals. 512 tokens on two cores of a Zen 4: 274 GFLOP/s with
// 2 and 265 with 16 (AVX2), 372 and 365 (AVX512 with VNNI). On a Zen 3, whose second-level cache has 512 KB: 193 with 16, 161
// to 175 with all groups at once.
constexpr int64_t kChunkGroups = 2;

// Groups of one token each over which all of a thread's rows pass in tiles: 270 KB, for the second-level cache.
constexpr int64_t kTileInputs = 2048;

// As `threads.py` has them.
struct Layer {
  uint8_t* w13;         // [E, I / 32, 4, H / 8] lines of 64 bytes: two tiles of gate, then the two of up
  uint16_t* w13_scale;  // bfloat16 [E, I / 32, 4, H / 32, 16]
  uint8_t* w2;          // [E, H / 16, I / 8] lines
  uint16_t* w2_scale;   // bfloat16 [E, H / 16, I / 32, 16]
  int64_t experts;
  int64_t hidden;
  int64_t inner;
};

struct Call {
  const uint16_t* x;      // bfloat16 [tokens, H]
  const int32_t* ids;     // [tokens, top_k], −1 or anything that is no expert's for none
  const float* weights;   // [tokens, top_k]
  const int32_t* map;     // [map_size] global to local, or null
  int64_t map_size;
  int64_t tokens;
  int64_t top_k;
  void* out;              // [tokens, H], bfloat16 or float32
  int64_t out_is_float;
  int64_t* counts = nullptr;  // [map_size] how often each global id was chosen, or null; of calls in a stream
};

// Rows of tiles [begin, end) and, where they do not divide evenly among the threads, sometimes one more.
struct Share {
  int64_t begin, end, extra;

  template <class Visit>
  void each(Visit visit) const {
    for (int64_t tile = begin; tile < end; ++tile) visit(tile);
    if (extra >= 0) visit(extra);
  }
};

// The threads of a NUMA node take the same tiles of every expert; the odd ones among them change hands with each `turn`.
Share share(const Worker& me, int64_t tiles, int64_t turn) {
  const int64_t node_begin = tiles * me.node_begin / me.count;
  const int64_t node_tiles = tiles * me.node_end / me.count - node_begin;
  const int64_t threads = me.node_end - me.node_begin;
  const int64_t index = me.index - me.node_begin;
  const int64_t each = node_tiles / threads;
  const int64_t odd = node_tiles % threads;
  const int64_t place = (index + turn * odd) % threads;
  const int64_t begin = node_begin + index * each;
  return {begin, begin + each, place < odd ? node_begin + threads * each + place : -1};
}

// Which slots (token, expert) of a chunk each expert has, in order of expert and then token.
struct Routing {
  std::vector<int32_t> first;   // [E + 2] where an expert's slots begin, and the last one's end
  std::vector<int32_t> tokens;  // [slots] token of the chunk
  std::vector<float> weights;   // [slots]

  void resize(int64_t experts, int64_t slots) {
    first.resize(experts + 2);
    tokens.resize(slots);
    weights.resize(slots);
  }

  void fill(const Layer& layer, const Call& call, int64_t begin, int64_t end) {
    const auto local = [&](int64_t slot) {
      int32_t id = call.ids[slot];
      if (call.map) id = id >= 0 && id < call.map_size ? call.map[id] : -1;
      return id < layer.experts ? id : -1;
    };
    std::fill(first.begin(), first.end(), 0);
    // Counted two places on, so that filling in moves each beginning to its place.
    for (int64_t slot = begin * call.top_k; slot < end * call.top_k; ++slot)
      if (const int32_t expert = local(slot); expert >= 0) ++first[expert + 2];
    for (int64_t expert = 0; expert < layer.experts; ++expert) first[expert + 2] += first[expert + 1];
    for (int64_t slot = begin * call.top_k; slot < end * call.top_k; ++slot) {
      const int32_t expert = local(slot);
      if (expert < 0) continue;
      const int32_t place = first[expert + 1]++;
      tokens[place] = static_cast<int32_t>(slot / call.top_k - begin);
      weights[place] = call.weights[slot];
    }
  }
};

struct State {
  Layer layer;
  Call call;
  Routing routing;
  Scratch x;            // Quantized [H / 32, tokens]
  Scratch x_terms;      // Terms, likewise
  Scratch expanded;     // Expanded [threads], where there are tiles
  Scratch products;     // Products [I / 32 + threads], likewise
  Scratch inner;        // Quantized [I / 32, slots]: silu(gate) · up
  Scratch inner_tiles;  // TileInput, likewise, of the experts that are computed in tiles
  Scratch inner_terms;  // Terms, likewise
  Scratch total;        // float32 [H / 16, tokens, 16]: of a tile the tokens side by side, which the caches take better
  Scratch packed;       // one projection of an expert as the checkpoint has it
  Scratch scales;
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

// Gate and up of some tokens: two tiles of each.
struct Products {
  alignas(64) float tiles[4][kBlockTokens * kRows];
};

// Some groups of an expert's tokens, side by side.
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

// A thread takes 32 rows of gate and of up at a time: their result is a group of `down`'s inputs.
void gate_and_up(const Worker& me, const State& state, int64_t tokens) {
  const Layer& layer = state.layer;
  const Routing& routing = state.routing;
  const int64_t groups = layer.inner / kGroup, inputs = layer.hidden / kGroup;
  const int64_t slots = routing.first[layer.experts];
  const int64_t tile_bytes = layer.hidden / kLineInputs * kLine;
  const int64_t tile_scales = layer.hidden / kGroup * kRows;
  Products single;
  int64_t turn = 0;
  for (int64_t expert = 0; expert < layer.experts; ++expert) {
    const int32_t end = routing.first[expert + 1];
    if (routing.first[expert] == end) continue;
    const Share mine = share(me, groups, turn++);
    for (int32_t slot = routing.first[expert]; slot < end; slot += kBlockTokens) {
      const int count = std::min(kBlockTokens, end - slot);
      const Activations x{state.x.as<Quantized>(), state.x_terms.as<Terms>(), tokens, routing.tokens.data() + slot, count};
      // Two tiles of gate and two of up, over some of the inputs.
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
          const int64_t to = group * slots + slot + i;
          Quantized& inner = state.inner.as<Quantized>()[to];
          quantize(half(0), half(1), inner, state.inner_terms.as<Terms>()[to]);
          if (count >= kFewestInTiles) expand(inner, state.inner_tiles.as<TileInput>()[to]);
        }
      };
      if (count >= kFewestInTiles) {
        // A thread's own, the one that changes hands among them.
        const auto products = [&](int64_t group) -> Products& {
          return state.products.as<Products>()[(group == mine.extra ? mine.end : group) + me.index];
        };
        const int64_t step = Expanded::kSize / count;
        for (int64_t first = 0; first < inputs; first += step) {
          const int64_t last = std::min(first + step, inputs);
          const TileActivations part = state.expanded.as<Expanded>()[me.index].of(x, first, last);
          const int64_t ahead = step < inputs ? tile_bytes : kIntelAhead;
          mine.each([&](int64_t group) { multiply_four(products(group), group, first, last, part, ahead); });
        }
        mine.each([&](int64_t group) { finish(products(group), group); });
        continue;
      }
      const int64_t step = count == 1 ? inputs : kChunkGroups;  // a tile's stream is not broken for a single token
      mine.each([&](int64_t group) {
        for (int64_t first = 0; first < inputs; first += step)
          multiply_four(single, group, first, std::min(first + step, inputs), x);
        finish(single, group);
      });
    }
  }
}

void down(const Worker& me, const State& state, int64_t begin, int64_t tokens) {
  const Layer& layer = state.layer;
  const Routing& routing = state.routing;
  const int64_t tiles = layer.hidden / kRows;
  const int64_t slots = routing.first[layer.experts];
  const int64_t tile_bytes = layer.inner / kLineInputs * kLine;
  const int64_t tile_scales = layer.inner / kGroup * kRows;
  alignas(64) float product[kBlockTokens * kRows];
  float* total = state.total.as<float>();
  const Share mine = share(me, tiles, 0);
  mine.each([&](int64_t tile) {
    for (int64_t token = 0; token < tokens; ++token)
      store(total + (tile * tokens + token) * kRows, all(0));
  });
  for (int64_t expert = 0; expert < layer.experts; ++expert) {
    const int32_t end = routing.first[expert + 1];
    for (int32_t slot = routing.first[expert]; slot < end; slot += kBlockTokens) {
      const int count = std::min(kBlockTokens, end - slot);
      const Terms* terms = state.inner_terms.as<Terms>() + slot;
      const Activations x{state.inner.as<Quantized>() + slot, terms, slots, nullptr, count};
      const TileActivations in_tiles{state.inner_tiles.as<TileInput>() + slot, terms, slots, count, 0};
      mine.each([&](int64_t tile) {
        const uint8_t* weights = layer.w2 + (expert * tiles + tile) * tile_bytes;
        const uint16_t* scales = layer.w2_scale + (expert * tiles + tile) * tile_scales;
        if (count >= kFewestInTiles)
          multiply(weights, scales, 0, layer.inner / kGroup, in_tiles, kIntelAhead, product);
        else
          multiply(weights, scales, 0, layer.inner / kGroup, x, product);
        for (int i = 0; i < count; ++i) {
          float* to = total + (tile * tokens + routing.tokens[slot + i]) * kRows;
          store(to, fma(load(product + i * kRows), all(routing.weights[slot + i]), load(to)));
        }
      });
    }
  }
  mine.each([&](int64_t tile) {
    for (int64_t token = 0; token < tokens; ++token) {
      const Floats sum = load(total + (tile * tokens + token) * kRows);
      const int64_t to = (begin + token) * layer.hidden + tile * kRows;
      if (state.call.out_is_float)
        store_unaligned(static_cast<float*>(state.call.out) + to, sum);
      else
        store_bfloat16(static_cast<uint16_t*>(state.call.out) + to, sum);
    }
  });
}

void run(const Worker& me, void* argument) {
  State& state = *static_cast<State*>(argument);
  const ThreadState mine;
  for (int64_t begin = 0; begin < state.call.tokens; begin += kChunkTokens) {
    const int64_t tokens = std::min(kChunkTokens, state.call.tokens - begin);
    if (begin > 0) me.meet();
    if (me.index == 0) state.routing.fill(state.layer, state.call, begin, begin + tokens);
    quantize_inputs(me, state, begin, tokens);
    me.meet();
    gate_and_up(me, state, tokens);
    me.meet();
    down(me, state, begin, tokens);
  }
}

// The tiles [first, second) of so many that a thread repacks, and whose memory it places: `unit` of them stay together as in
// `share`, so that they are read by threads of the same NUMA node.
std::pair<int64_t, int64_t> whole_tiles(const Worker& me, int64_t tiles, int64_t unit) {
  return {tiles / unit * me.index / me.count * unit, tiles / unit * (me.index + 1) / me.count * unit};
}

// Tiles of a projection that follow one another in `share`: two of gate and two of up, or one of down.
constexpr int64_t kGatedTiles = 4, kDownTiles = 1;

// Repacks a projection `[rows, K]` of an expert in place; source(t) is the checkpoint's tile that becomes tile t.
template <class Source>
void repack_projection(const Worker& me, const State& state, void* packed, uint16_t* scales, int64_t rows, int64_t inputs,
                       int64_t unit, Source source) {
  const int64_t tiles = rows / kRows;
  const int64_t words = kRows * inputs / kLineInputs, groups = kRows * inputs / kGroup;  // of a tile
  auto* weight = static_cast<uint32_t*>(packed);
  auto* from = state.packed.as<uint32_t>();
  auto* from_scales = state.scales.as<uint16_t>();
  const auto [begin, end] = whole_tiles(me, tiles, unit);
  std::memcpy(from + begin * words, weight + begin * words, (end - begin) * words * sizeof(uint32_t));
  std::memcpy(from_scales + begin * groups, scales + begin * groups, (end - begin) * groups * sizeof(uint16_t));
  me.meet();
  for (int64_t tile = begin; tile < end; ++tile)
    repack_tile(from + source(tile) * words, from_scales + source(tile) * groups, inputs, weight + tile * words,
                scales + tile * groups);
  me.meet();
}

// Advises on the huge pages that lie wholly in a tensor: a thread on its part of them, in one call, because each call waits
// for every CPU of the machine.
void advise_huge_pages(const Worker& me, const void* tensor, int64_t bytes, int advice) {
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(tensor) + kHuge - 1) / kHuge;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(tensor) + bytes) / kHuge;
  const uintptr_t pages = last > first ? last - first : 0;
  const uintptr_t begin = first + pages * me.index / me.count, end = first + pages * (me.index + 1) / me.count;
  if (begin < end) madvise(reinterpret_cast<void*>(begin * kHuge), (end - begin) * kHuge, advice);
}

// Asks for huge pages under a layer's weights, for what is written from then on: one token takes 4.2 ms with them and 5.5 ms
// without.
void use_huge_pages(const Worker& me, const Layer& layer, int advice = MADV_HUGEPAGE) {
  const int64_t projection = layer.hidden * layer.inner;
  advise_huge_pages(me, layer.w13, layer.experts * projection, advice);
  advise_huge_pages(me, layer.w2, layer.experts * projection / 2, advice);
}

void repack(const Worker& me, void* argument) {
  const State& state = *static_cast<State*>(argument);
  const Layer& layer = state.layer;
  const int64_t projection = layer.hidden * layer.inner;  // weights of one of the three
  for (int64_t expert = 0; expert < layer.experts; ++expert) {
    repack_projection(me, state, layer.w13 + expert * projection, layer.w13_scale + expert * 2 * projection / kGroup,
                      2 * layer.inner, layer.hidden, kGatedTiles, [&](int64_t tile) {
                        const int64_t up = tile % 4 / 2;
                        return tile / 4 * 2 + tile % 2 + up * (layer.inner / kRows);
                      });
    repack_projection(me, state, layer.w2 + expert * projection / 2, layer.w2_scale + expert * projection / kGroup,
                      layer.hidden, layer.inner, kDownTiles, [](int64_t tile) { return tile; });
  }
  // Nothing is left to do where the memory was made of them. Linux before 6.1 takes the first advice only, for later.
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack
  use_huge_pages(me, layer);
  use_huge_pages(me, layer, kCollapse);
}

// Puts each page of a layer's new memory on the NUMA node whose threads will read it: a page lies where it is first written. Of a
// huge page in which tiles of two nodes meet one of them has the whole.
void place(const Worker& me, void* argument) {
  const Layer& layer = static_cast<State*>(argument)->layer;
  use_huge_pages(me, layer);
  me.meet();
  const int64_t page = sysconf(_SC_PAGESIZE);
  const auto touch = [&](void* tensor, int64_t tiles, int64_t tile_bytes, int64_t unit) {
    const auto [begin, end] = whole_tiles(me, tiles, unit);
    for (int64_t expert = 0; expert < layer.experts; ++expert) {
      const auto first = reinterpret_cast<uintptr_t>(tensor) + (expert * tiles + begin) * tile_bytes;
      const auto last = reinterpret_cast<uintptr_t>(tensor) + (expert * tiles + end) * tile_bytes;
      for (uintptr_t at = (first + page - 1) / page * page; at < last; at += page) *reinterpret_cast<volatile char*>(at) = 0;
    }
  };
  const int64_t rows = 2 * layer.inner / kRows;
  touch(layer.w13, rows, layer.hidden / kLineInputs * kLine, kGatedTiles);
  touch(layer.w13_scale, rows, layer.hidden / kGroup * kRows * sizeof(uint16_t), kGatedTiles);
  touch(layer.w2, layer.hidden / kRows, layer.inner / kLineInputs * kLine, kDownTiles);
  touch(layer.w2_scale, layer.hidden / kRows, layer.inner / kGroup * kRows * sizeof(uint16_t), kDownTiles);
}

// Prepares the state for a call on at most so many threads.
void prepare(State& state, const Layer& layer, const Call& call, int64_t threads) {
  const int64_t tokens = std::min(kChunkTokens, call.tokens);
  const int64_t slots = tokens * call.top_k;
  state.layer = layer;
  state.call = call;
  state.routing.resize(layer.experts, slots);
  state.x.reserve(tokens * layer.hidden / kGroup * sizeof(Quantized));
  state.x_terms.reserve(tokens * layer.hidden / kGroup * sizeof(Terms));
  state.inner.reserve(slots * layer.inner / kGroup * sizeof(Quantized));
  if (kFewestInTiles <= kBlockTokens) {
    state.expanded.reserve(threads * sizeof(Expanded));
    state.products.reserve((layer.inner / kGroup + threads) * sizeof(Products));
    state.inner_tiles.reserve((slots * layer.inner / kGroup + kBlockTokens) * sizeof(TileInput));
  }
  state.inner_terms.reserve(slots * layer.inner / kGroup * sizeof(Terms));
  state.total.reserve(tokens * layer.hidden * sizeof(float));
}

}  // namespace
}  // namespace k26
