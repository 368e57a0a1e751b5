// Places the pages of a layer's weights in memory, and repacks the weights in place.

#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "layer.hpp"
#include "repack.hpp"

namespace k26 {
namespace {

// Returns the tiles [first, second), of `tiles`, that a thread repacks and whose memory it places. `unit` tiles stay
// together as in `layer.hpp`, so that threads of the same NUMA node read them.
std::pair<int64_t, int64_t> whole_tiles(const Worker& me, int64_t tiles, int64_t unit) {
  return {tiles / unit * me.index / me.count * unit, tiles / unit * (me.index + 1) / me.count * unit};
}

// Tiles of a projection that a thread takes together: two of gate and two of up, or one of down.
constexpr int64_t kGatedTiles = 4, kDownTiles = 1;

// Repacks a projection `[rows, K]` of an expert in place; source(t) is the checkpoint's tile that becomes tile t.
template <class Source>
void repack_projection(const Worker& me, const State& state, void* packed, uint16_t* scales, int64_t rows, int64_t inputs,
                       int64_t unit, Source source) {
  const int64_t tiles = rows / kRows;
  const int64_t words = kRows * inputs / kLineInputs, groups = kRows * inputs / kGroup;  // in a tile
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

// Gives Linux advice on the huge pages that lie wholly in a tensor. Each thread does so for its part of them in one
// call, because each call waits for every CPU of the machine.
void advise_huge_pages(const Worker& me, const void* tensor, int64_t bytes, int advice) {
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(tensor) + kHuge - 1) / kHuge;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(tensor) + bytes) / kHuge;
  const uintptr_t pages = last > first ? last - first : 0;
  const uintptr_t begin = first + pages * me.index / me.count, end = first + pages * (me.index + 1) / me.count;
  if (begin < end) madvise(reinterpret_cast<void*>(begin * kHuge), (end - begin) * kHuge, advice);
}

// Asks Linux for huge pages under a layer's weights, for memory that is written from then on. One token takes 4.2 ms
// with huge pages and 5.5 ms without.
void use_huge_pages(const Worker& me, const Layer& layer, int advice = MADV_HUGEPAGE) {
  const int64_t projection = layer.hidden * layer.intermediate;
  advise_huge_pages(me, layer.w13, layer.experts * projection, advice);
  advise_huge_pages(me, layer.w2, layer.experts * projection / 2, advice);
}

void repack(const Worker& me, void* argument) {
  const State& state = *static_cast<State*>(argument);
  const Layer& layer = state.layer;
  const int64_t projection = layer.hidden * layer.intermediate;  // weights in one of the three projections
  for (int64_t expert = 0; expert < layer.experts; ++expert) {
    repack_projection(me, state, layer.w13 + expert * projection, layer.w13_scale + expert * 2 * projection / kGroup,
                      2 * layer.intermediate, layer.hidden, kGatedTiles, [&](int64_t tile) {
                        const int64_t up = tile % 4 / 2;
                        return tile / 4 * 2 + tile % 2 + up * (layer.intermediate / kRows);
                      });
    repack_projection(me, state, layer.w2 + expert * projection / 2, layer.w2_scale + expert * projection / kGroup,
                      layer.hidden, layer.intermediate, kDownTiles, [](int64_t tile) { return tile; });
  }
  // If the memory has huge pages already, there is nothing left to do. Linux before 6.1 takes the first advice only,
  // and follows it later.
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack
  use_huge_pages(me, layer);
  use_huge_pages(me, layer, kCollapse);
}

// Puts each page of a layer's new memory on the NUMA node whose threads will read it, since a page lies on the node
// of the thread that first writes it. If tiles of two nodes meet in a huge page, one of the nodes has the whole page.
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
  const int64_t rows = 2 * layer.intermediate / kRows;
  touch(layer.w13, rows, layer.hidden / kLineInputs * kLine, kGatedTiles);
  touch(layer.w13_scale, rows, layer.hidden / kGroup * kRows * sizeof(uint16_t), kGatedTiles);
  touch(layer.w2, layer.hidden / kRows, layer.intermediate / kLineInputs * kLine, kDownTiles);
  touch(layer.w2_scale, layer.hidden / kRows, layer.intermediate / kGroup * kRows * sizeof(uint16_t), kDownTiles);
}

}  // namespace
}  // namespace k26
