// Shares a phase of a layer's work among the threads of a NUMA node.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>

#include "pool.hpp"

namespace k26 {

// Work in parts, of which each thread takes the next one whenever it is free. So a thread does less if it is late,
// because something else runs on its core or its memory is slower. The first parts are long, so that a stream of
// weights is seldom broken, and the last parts are single tiles or groups, so that all threads end together.
class Queue {
 public:
  void reset() { next_.store(0, std::memory_order_relaxed); }

  // Calls take(begin, end) for parts of [0, count) until all parts are taken. All threads of a node call `drain` at the
  // same time, with the same count.
  template <class Take>
  void drain(const Worker& me, int64_t count, Take take) {
    const int64_t threads = me.node_end - me.node_begin;
    int64_t begin = next_.load(std::memory_order_relaxed);
    while (begin < count) {
      const int64_t end = begin + std::max<int64_t>(1, (count - begin) / (2 * threads));
      if (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      take(begin, end);
      begin = next_.load(std::memory_order_relaxed);
    }
  }

 private:
  alignas(64) std::atomic<int64_t> next_{0};
};

// The queues of a NUMA node, one for each phase.
struct Queues {
  Queue gate_and_up, down;

  void reset() {
    gate_and_up.reset();
    down.reset();
  }
};

// Returns the range of `count` tiles or groups that the threads of a NUMA node take. It is the same for every expert,
// and the one by which the weights were placed in memory.
inline std::pair<int64_t, int64_t> of_node(const Worker& me, int64_t count) {
  return {count * me.node_begin / me.count, count * me.node_end / me.count};
}

}  // namespace k26
