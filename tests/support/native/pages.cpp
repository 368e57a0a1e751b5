// On which NUMA node's threads the pages of new weights are first written, and which read them at a layer's work:
//
//     pages SIZES... : experts hidden intermediate, then the node of each thread
//
// The nodes are pretended, the threads and the pages real: all pages are closed, so that the first thread that touches one is
// noted; and again before each thread reads, one after the other. Prints three counts of pages: of the weights; read by a thread
// of the node whose thread wrote them first; read by one of another node.

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr int kNobody = -1;
uintptr_t page_size, area, area_end;
std::atomic<int>* touched;  // of each page of the area: the node that touched it first
thread_local int my_node = kNobody;

size_t page_of(uintptr_t address) { return (address - area) / page_size; }

void on_touch(int, siginfo_t* info, void*) {
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  if (address < area || address >= area_end) _exit(11);  // a fault of the program's own
  int nobody = kNobody;
  touched[page_of(address)].compare_exchange_strong(nobody, my_node);
  mprotect(reinterpret_cast<void*>(address / page_size * page_size), page_size, PROT_READ | PROT_WRITE);
}

}  // namespace

// No huge pages: each page has its own first touch.
extern "C" int madvise(void*, size_t, int) noexcept { return 0; }

#include "experts.cpp"

using namespace k26;

namespace {

struct {
  std::vector<int32_t> of_thread;
  std::vector<Worker> workers;
  State state;
} job;

void place_and_note(const Worker& me, void*) {
  my_node = job.of_thread[me.index];
  job.workers[me.index] = me;
  sigset_t fault;
  sigemptyset(&fault);
  sigaddset(&fault, SIGSEGV);
  pthread_sigmask(SIG_UNBLOCK, &fault, nullptr);  // the pool leaves signals to others
  place(me, &job.state);
}

}  // namespace

int main(int count, char** arguments) {
  const int64_t experts = std::atoll(arguments[1]), hidden = std::atoll(arguments[2]), intermediate = std::atoll(arguments[3]);
  for (int i = 4; i < count; ++i) job.of_thread.push_back(std::atoi(arguments[i]));
  const int threads = static_cast<int>(job.of_thread.size());
  page_size = sysconf(_SC_PAGESIZE);
  const int64_t w13 = experts * hidden * intermediate, w2 = w13 / 2, offset = 64;  // no tensor begins at a page
  const int64_t s13 = w13 / kGroup * 4, s2 = w2 / kGroup * 4;               // bytes of the scales
  const int64_t pages = (w13 + w2 + s13 + s2 + offset) / page_size + 1;
  void* memory = mmap(nullptr, pages * page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  area = reinterpret_cast<uintptr_t>(memory);
  area_end = area + pages * page_size;
  touched = new std::atomic<int>[pages];
  for (int64_t page = 0; page < pages; ++page) touched[page] = kNobody;
  struct sigaction action {};
  action.sa_sigaction = on_touch;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, nullptr);

  auto* w = static_cast<uint8_t*>(memory) + offset;
  const auto scale = [](uint8_t* at) { return reinterpret_cast<uint16_t*>(at); };
  const Layer layer{w, scale(w + w13 + w2), w + w13, scale(w + w13 + w2 + s13), experts, hidden, intermediate};
  std::vector<int32_t> cpus(threads);
  for (int i = 0; i < threads; ++i) cpus[i] = static_cast<int32_t>(i % sysconf(_SC_NPROCESSORS_ONLN));
  static Pool pool({cpus.begin(), cpus.end()}, {job.of_thread.begin(), job.of_thread.end()});
  if (pool.failed()) return 1;
  job.workers.resize(threads);
  State& state = job.state;
  state.layer = layer;
  pool.wait(pool.start(place_and_note, nullptr));
  std::vector<int> owner(touched, touched + pages);

  // One token for each expert.
  std::vector<uint16_t> x(experts * hidden, 0x3F80);
  std::vector<int32_t> ids(experts);
  std::vector<float> ones(experts, 1), out(experts * hidden);
  for (int64_t i = 0; i < experts; ++i) ids[i] = static_cast<int32_t>(i);
  const Call call{x.data(), ids.data(), ones.data(), nullptr, 0, experts, 1, out.data(), 1};
  prepare(state, layer, call, threads);
  state.routing.fill(layer, call, 0, experts);
  quantize_inputs({0, 1, 0, 1, nullptr}, state, 0, experts);
  int64_t own = 0, foreign = 0;
  for (int i = 0; i < threads; ++i) {
    my_node = job.of_thread[i];
    for (int64_t page = 0; page < pages; ++page) touched[page] = kNobody;
    mprotect(memory, pages * page_size, PROT_NONE);
    const ThreadState mine;
    gate_and_up(job.workers[i], state, experts);
    down(job.workers[i], state, 0, experts);
    for (int64_t page = 0; page < pages; ++page) {
      if (touched[page] == kNobody) continue;
      ++(owner[page] == my_node ? own : foreign);
    }
  }
  printf("%ld %ld %ld\n", static_cast<long>(pages), static_cast<long>(own), static_cast<long>(foreign));
  return 0;
}
