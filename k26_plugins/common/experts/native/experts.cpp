// Computes the routed INT4 experts of a layer on a CPU. `build.py` compiles this file and `threads.py` calls it.
// `layer.hpp` has the work on a batch, `weights.hpp` the work on the weights in memory.

#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>

#include "layer.hpp"
#include "weights.hpp"

namespace k26 {

// The state that a process has once. Jobs run one after another, whoever submits them, because they share the scratch
// memory.
struct Process {
  std::mutex submitting;
  State state;
  Team team;
  Pool* pool = nullptr;

  std::unique_lock<std::mutex> turn() {
    std::unique_lock<std::mutex> lock(submitting);
    if (pool) pool->wait_for_all();
    return lock;
  }

  // Returns how many threads at most do a task: `threads` of the OpenMP runtime, or for 0 all threads of the pool.
  int64_t count(int64_t threads) const { return threads > 0 ? threads : pool->threads(); }

  // Runs a task and returns once it is done. On the pool, the turn ends as soon as the pool has the task, since whoever
  // takes the next turn waits for the task's end anyway. So a job in a stream, which waits for a limited time only,
  // never waits for a lock that a hanging job holds.
  void run_on(int64_t threads, Task task, std::unique_lock<std::mutex> turn) {
    if (threads > 0) {
      team.run(task, &state, static_cast<int>(threads));
      return;
    }
    const uint32_t job = pool->start(task, &state);
    turn.unlock();
    pool->wait(job);
  }

  // Whether a job in a device's stream took too long. The functions that the stream calls set this, because they can
  // return no error. It is never reset.
  std::atomic<bool> late{false};
};

// A layer's work on a batch in a device's stream: the argument of the two functions that the stream calls.
struct StreamCall {
  Process* process;
  Layer layer;
  Call call;
  int64_t patience;  // nanoseconds that a job may take
  uint32_t job;
  bool started;

  int64_t out_bytes() const {
    return call.tokens * layer.hidden * static_cast<int64_t>(call.out_is_float ? sizeof(float) : sizeof(uint16_t));
  }

  void count() const {
    if (!call.counts) return;
    for (int64_t pair = 0; pair < call.tokens * call.top_k; ++pair) {
      const int32_t id = call.ids[pair];
      if (id >= 0 && id < call.map_size) ++call.counts[id];
    }
  }
};

}  // namespace k26

extern "C" {

// The functions below that return a number return this if there is no memory; their other results are not negative.
enum { kNoMemory = -1 };

const char* k26_instruction_set() { return k26::kInstructionSet; }

// Returns 0 if the system lets this process use the instruction set, else errno; then no other function may be called.
int64_t k26_refusal() { return k26::refusal(); }

// Creates a process' state, or returns null without memory. A forked child creates its own, because it has none of its
// parent's threads.
k26::Process* k26_create() { return new (std::nothrow) k26::Process; }

// Returns whether the process has an OpenMP runtime for `k26_repack` and `k26_run`.
int64_t k26_has_team(const k26::Process* process) { return process->team.found(); }

// Starts the pool for `k26_submit`, with a thread for each CPU; it may be called once. nodes[i] is the NUMA node of
// cpus[i], and equal nodes are side by side. Returns false if the system gives no more threads.
int64_t k26_start(k26::Process* process, const int32_t* cpus, const int32_t* nodes, int64_t count) try {
  auto* pool = new k26::Pool({cpus, cpus + count}, {nodes, nodes + count});
  if (pool->failed()) return false;
  process->pool = pool;
  return true;
} catch (const std::bad_alloc&) {
  return kNoMemory;
}

// Repacks a layer's weights in place, from the checkpoint's layout to the kernel's, on at most `threads` threads of the
// OpenMP runtime, or for 0 on the pool.
int64_t k26_repack(k26::Process* process, const k26::Layer* layer, int64_t threads) try {
  using namespace k26;
  auto turn = process->turn();
  State& state = process->state;
  state.layer = *layer;
  state.packed.reserve(layer->hidden * layer->intermediate);
  state.scales.reserve(2 * layer->hidden * layer->intermediate / kGroup * sizeof(uint16_t));
  process->run_on(threads, repack, std::move(turn));
  return 0;
} catch (const std::bad_alloc&) {
  return kNoMemory;
}

// Gives a layer's memory, which is new and not yet written, huge pages, each on the NUMA node of a thread that will
// read it. What the memory held is lost. threads: as for `k26_repack`.
void k26_place(k26::Process* process, const k26::Layer* layer, int64_t threads) {
  auto turn = process->turn();
  process->state.layer = *layer;
  process->run_on(threads, k26::place, std::move(turn));
}

// Does a layer's work on a batch and returns once it is done. threads: as for `k26_repack`.
int64_t k26_run(k26::Process* process, const k26::Layer* layer, const k26::Call* call, int64_t threads) try {
  auto turn = process->turn();
  k26::prepare(process->state, *layer, *call, process->count(threads));
  process->run_on(threads, k26::run, std::move(turn));
  return 0;
} catch (const std::bad_alloc&) {
  return kNoMemory;
}

// Starts a layer's work on the pool and returns the job's number. The tensors must live until `k26_wait` has returned
// for it.
int64_t k26_submit(k26::Process* process, const k26::Layer* layer, const k26::Call* call) try {
  const auto turn = process->turn();
  k26::prepare(process->state, *layer, *call, process->pool->threads());
  return process->pool->start(k26::run, &process->state);
} catch (const std::bad_alloc&) {
  return kNoMemory;
}

void k26_wait(k26::Process* process, int64_t job) { process->pool->wait(static_cast<uint32_t>(job)); }

// Returns the argument of `k26_stream_submit` and `k26_stream_wait`, or null without memory. It is never freed, because
// a CUDA graph may hold its address until the process ends. The tensors of `layer` and `call` must live as long as
// these functions are called with it.
k26::StreamCall* k26_stream_call(k26::Process* process, const k26::Layer* layer, const k26::Call* call, int64_t patience) try {
  const auto turn = process->turn();
  k26::prepare(process->state, *layer, *call, process->pool->threads());
  return new k26::StreamCall{process, *layer, *call, patience, 0, false};
} catch (const std::bad_alloc&) {
  return nullptr;
}

// The next two functions have the type that `cudaLaunchHostFunc` takes. They neither allocate memory nor call Python or
// the device's runtime. The kernels between them in the stream run while the CPU works.

// Starts the work.
void k26_stream_submit(void* argument) {
  auto& it = *static_cast<k26::StreamCall*>(argument);
  k26::Process& process = *it.process;
  const std::lock_guard<std::mutex> lock(process.submitting);
  it.started = !process.late && process.pool->wait_for_all(it.patience);
  if (!it.started) process.late = true;
  // These bytes are NaN both in bfloat16 and in float32, so that a result that was not computed does not look like an
  // answer.
  std::memset(it.call.out, 0xFF, it.out_bytes());
  if (!it.started) return;
  it.count();
  k26::prepare(process.state, it.layer, it.call, process.pool->threads());  // at most as large as in `k26_stream_call`
  it.job = process.pool->start(k26::run, &process.state);
}

// Waits for the work. If a job takes longer than it may, no more work in streams is started: see `k26_stream_late`.
void k26_stream_wait(void* argument) {
  auto& it = *static_cast<k26::StreamCall*>(argument);
  if (it.started && !it.process->pool->wait(it.job, it.patience)) it.process->late = true;
}

// Returns whether a job in a stream took too long. Its result is NaN where it was not computed in time, and the results
// of all later jobs in streams are NaN.
int64_t k26_stream_late(const k26::Process* process) { return process->late; }

}  // extern "C"
