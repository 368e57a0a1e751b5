// Layers of the native experts in a stream and in graphs of the stand-in runtime, without Python, for the sanitizers:
//
//     stream_driver GIVEN THREADS REPLAYS [exit]
//
// GIVEN is as for `driver.cpp`. A step is two layers, the second on what the first gave. It is captured for several batch
// sizes, and replayed with new data in sizes that change; each replay must have the bits of the same step by `k26_submit`
// and `k26_wait`. Then the stream is late, which is no fault of the CPU's; a fork computes while steps run; and a worker hangs,
// and a step must end nevertheless. With `exit` the program ends while steps run. The exit status names the part that failed.

#include "device_runtime.cpp"
#include "experts.cpp"

#include <sys/mman.h>
#include <sys/wait.h>

#include <cstdio>
#include <cstdlib>
#include <new>
#include <random>

// Memory that a host function asks for, by whatever way the library has.
static void allocated() {
  if (standinInHostFunction()) {
    fprintf(stderr, "a host function allocates\n");
    std::_Exit(9);
  }
}

void* operator new(size_t bytes) {
  allocated();
  if (void* memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

extern "C" void* __real_mmap(void* at, size_t bytes, int protection, int flags, int file, off_t offset);
extern "C" void* __wrap_mmap(void* at, size_t bytes, int protection, int flags, int file, off_t offset) {
  allocated();
  return __real_mmap(at, bytes, protection, flags, file, offset);
}

using namespace k26;

constexpr int kLayers = 2;
constexpr int64_t kPatience = 20'000'000'000;

template <class T>
std::vector<T> read(FILE* file, int64_t count) {
  std::vector<T> values(count);
  if (fread(values.data(), sizeof(T), count, file) != static_cast<size_t>(count)) std::abort();
  return values;
}

template <class T>
T* pinned_array(int64_t count) {
  void* memory = nullptr;
  cudaHostAlloc(&memory, count * sizeof(T), 0);
  return static_cast<T*>(memory);
}

// What a batch is, on the device and in the pinned memory.
struct Batch {
  std::vector<uint16_t> x, out;
  std::vector<int32_t> ids;
  std::vector<float> weights;

  Batch(int64_t tokens, int64_t hidden, int64_t top_k)
      : x(tokens * hidden), out(tokens * hidden), ids(tokens * top_k), weights(tokens * top_k) {}
};

int main(int count_of_arguments, char** arguments) {
  FILE* given = fopen(arguments[1], "rb");
  const auto sizes = read<int64_t>(given, 5);
  const int64_t experts = sizes[0], hidden = sizes[1], intermediate = sizes[2], tokens = sizes[3], top_k = sizes[4];
  auto w13 = read<uint8_t>(given, experts * hidden * intermediate);
  auto w13_scale = read<uint16_t>(given, experts * 2 * intermediate * hidden / kGroup);
  auto w2 = read<uint8_t>(given, experts * hidden * intermediate / 2);
  auto w2_scale = read<uint16_t>(given, experts * hidden * intermediate / kGroup);
  const auto x = read<uint16_t>(given, tokens * hidden);
  fclose(given);

  const int64_t threads = std::atoi(arguments[2]), replays = std::atoi(arguments[3]);
  std::vector<int32_t> cpus(threads), nodes(threads, 0);
  for (int64_t i = 0; i < threads; ++i) cpus[i] = static_cast<int32_t>(i % sysconf(_SC_NPROCESSORS_ONLN));
  if (k26_refusal() != 0) return 2;
  static Process* process = k26_create();
  if (k26_start(process, cpus.data(), nodes.data(), threads) != 1) return 1;
  const Layer layer{w13.data(), w13_scale.data(), w2.data(), w2_scale.data(), experts, hidden, intermediate};
  if (k26_repack(process, &layer, 0) != 0) return 2;

  // One set of pinned memory for all layers and batches, which follow one another.
  auto* pinned_x = pinned_array<uint16_t>(tokens * hidden);
  auto* pinned_out = pinned_array<uint16_t>(tokens * hidden);
  auto* pinned_ids = pinned_array<int32_t>(tokens * top_k);
  auto* pinned_weights = pinned_array<float>(tokens * top_k);
  Batch device(tokens, hidden, top_k), expected(tokens, hidden, top_k);
  Stream* stream = nullptr;
  cudaStreamCreate(&stream);

  // The shared expert's part is a kernel on a second stream, beside all of it; here it copies the layer's input.
  Stream* beside = nullptr;
  Event *router = nullptr, *shared = nullptr;
  cudaStreamCreate(&beside);
  cudaEventCreateWithFlags(&router, 0);
  cudaEventCreateWithFlags(&shared, 0);
  std::vector<uint16_t> shared_out(tokens * hidden);
  struct Copy {
    const uint16_t* from;
    uint16_t* to;
    int64_t count;
  } copy{device.x.data(), shared_out.data(), tokens * hidden};
  const auto copy_input = [](void* argument) {
    const auto& it = *static_cast<Copy*>(argument);
    std::copy_n(it.from, it.count, it.to);
  };

  const auto put_layer = [&](StreamCall* call, int64_t count) {
    cudaEventRecord(router, stream);
    cudaStreamWaitEvent(beside, router, 0);
    standinKernel(copy_input, &copy, beside);
    cudaEventRecord(shared, beside);
    cudaMemcpyAsync(pinned_x, device.x.data(), count * hidden * sizeof(uint16_t), 2, stream);
    cudaMemcpyAsync(pinned_ids, device.ids.data(), count * top_k * sizeof(int32_t), 2, stream);
    cudaMemcpyAsync(pinned_weights, device.weights.data(), count * top_k * sizeof(float), 2, stream);
    cudaLaunchHostFunc(stream, k26_stream_submit, call);
    cudaLaunchHostFunc(stream, k26_stream_wait, call);
    cudaStreamWaitEvent(stream, shared, 0);
    cudaMemcpyAsync(device.x.data(), pinned_out, count * hidden * sizeof(uint16_t), 1, stream);
  };
  const auto in_stream = [&](int64_t count, int64_t patience) {
    const Call call{pinned_x, pinned_ids, pinned_weights, nullptr, 0, count, top_k, pinned_out, 0};
    return k26_stream_call(process, &layer, &call, patience);
  };
  const auto capture = [&](int64_t count, int64_t patience) {
    Graph *graph = nullptr, *executable = nullptr;
    cudaStreamBeginCapture(stream, kGlobal);
    for (int i = 0; i < kLayers; ++i) put_layer(in_stream(count, patience), count);
    cudaStreamEndCapture(stream, &graph);
    cudaGraphInstantiate(&executable, graph, 0);
    return executable;
  };

  // The largest first, as engines capture them.
  const int64_t counts[] = {tokens, 5, 1};
  Graph* graphs[3];
  for (int i = 0; i < 3; ++i) graphs[i] = capture(counts[i], kPatience);

  // A step of `expected` without a stream, by the threads of `threads_of`.
  const auto called = [&](Process* threads_of, int64_t count) {
    for (int i = 0; i < kLayers; ++i) {
      const Call call{expected.x.data(),   expected.ids.data(), expected.weights.data(), nullptr, 0, count, top_k,
                      expected.out.data(), 0};
      k26_wait(threads_of, k26_submit(threads_of, &layer, &call));
      std::swap(expected.x, expected.out);
    }
  };
  const auto is_as_called = [&](int64_t count) {
    called(process, count);
    const size_t bytes = count * hidden * sizeof(uint16_t);
    return std::memcmp(device.x.data(), expected.x.data(), bytes) == 0 &&
           std::memcmp(shared_out.data(), expected.out.data(), bytes) == 0;  // the second layer's input
  };

  std::mt19937 random(0);
  for (int64_t replay = 0; replay < replays; ++replay) {
    const int chosen = static_cast<int>(random() % 3);
    const int64_t count = counts[chosen];
    const int64_t from = static_cast<int64_t>(random() % (tokens - count + 1));
    std::memcpy(device.x.data(), x.data() + from * hidden, count * hidden * sizeof(uint16_t));
    for (int64_t slot = 0; slot < count * top_k; ++slot) {
      device.ids[slot] = static_cast<int32_t>(random() % (experts + 1)) - 1;
      device.weights[slot] = static_cast<float>(random() % 1000) / 1000;
    }
    expected = device;
    if (replay % 4 == 3)  // the same path outside a graph
      for (int i = 0; i < kLayers; ++i) put_layer(in_stream(count, kPatience), count);
    else
      cudaGraphLaunch(graphs[chosen], stream);
    if (cudaStreamSynchronize(stream) != 0) return 3;
    if (!is_as_called(count)) return 4;
  }
  if (k26_stream_late(process)) return 5;

  // The stream comes to the host later than the CPU may take, which the CPU is not blamed for.
  Graph* patient = capture(1, 1'000'000'000);
  expected = device;
  standinKernel([](void*) { usleep(1'200'000); }, nullptr, stream);
  cudaGraphLaunch(patient, stream);
  if (cudaStreamSynchronize(stream) != 0) return 3;
  if (k26_stream_late(process)) return 5;
  if (!is_as_called(1)) return 4;

  // Steps that run while something else happens, each from the same input.
  Copy again{x.data(), device.x.data(), tokens * hidden};
  const auto launch_many = [&] {
    for (int step = 0; step < 10; ++step) {
      standinKernel(copy_input, &again, stream);
      cudaGraphLaunch(graphs[0], stream);
    }
  };
  if (count_of_arguments > 4) {
    launch_many();
    std::exit(0);
  }

#if !defined(__SANITIZE_THREAD__)  // which ends a child that starts threads
  expected = device;
  launch_many();
  const pid_t child = fork();
  if (child == 0) {
    Process* own = k26_create();
    if (k26_start(own, cpus.data(), nodes.data(), threads) != 1) std::_Exit(1);
    const Batch before = expected;
    called(own, 1);
    const auto once = expected.x;
    expected = before;
    called(own, 1);
    std::_Exit(expected.x == once ? 0 : 2);
  }
  int status = 0;
  if (waitpid(child, &status, 0) != child || status != 0) return 6;
  if (cudaStreamSynchronize(stream) != 0) return 3;
#endif

  // A worker that does not come back: the step ends, and nothing in it is a number.
  static std::atomic<bool> hung{true};
  Graph* impatient = capture(1, 50'000'000);
  process->pool->start([](const Worker&, void*) { while (hung) usleep(1000); }, nullptr);
  for (int step = 0; step < 2; ++step) {
    cudaGraphLaunch(impatient, stream);
    if (cudaStreamSynchronize(stream) != 0) return 3;
    for (int64_t i = 0; i < hidden; ++i)
      if (device.x[i] != 0xFFFF) return 7;
  }
  if (!k26_stream_late(process)) return 8;
  hung = false;
  if (*standinViolation()) fprintf(stderr, "%s\n", standinViolation());
  printf("%s\n", k26_instruction_set());
  return 0;
}
