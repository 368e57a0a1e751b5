// How threads share a phase's work while one of them is late:
//
//     late COUNT NODE... : how many things there are, then the node of each thread
//
// The first thread sleeps in its first part, and the others begin then. Prints which thread took each thing; ends with 1 if one was taken twice.

#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "queue.hpp"

using namespace k26;

namespace {

constexpr int kNobody = -1;

struct {
  std::vector<Queues> queues;
  std::vector<std::atomic<int>> taken_by;
  std::atomic<bool> begun{false}, twice{false};
} job;

void share(const Worker& me, void*) {
  const auto [first, last] = of_node(me, job.taken_by.size());
  const int64_t offset = first;
  while (me.index > 0 && !job.begun) usleep(100);
  job.queues[me.node_begin].down.drain(me, last - first, [&](int64_t begin, int64_t end) {
    for (int64_t i = offset + begin; i < offset + end; ++i)
      if (job.taken_by[i].exchange(me.index) != kNobody) job.twice = true;
    if (me.index == 0 && !job.begun.exchange(true)) usleep(300'000);
  });
}

}  // namespace

int main(int count, char** arguments) {
  job.taken_by = std::vector<std::atomic<int>>(std::atoi(arguments[1]));
  for (auto& by : job.taken_by) by = kNobody;
  std::vector<int> nodes, cpus;
  for (int i = 2; i < count; ++i) {
    nodes.push_back(std::atoi(arguments[i]));
    cpus.push_back(static_cast<int>((i - 2) % sysconf(_SC_NPROCESSORS_ONLN)));
  }
  job.queues = std::vector<Queues>(nodes.size());
  static Pool pool(cpus, nodes);
  if (pool.failed()) return 2;
  pool.wait(pool.start(share, nullptr));
  for (const auto& by : job.taken_by) printf("%d ", by.load());
  return job.twice;
}
