// A stand-in for the CUDA runtime, so that what is put into a device's streams and graphs runs where there is no device.
//
// The host's memory poses as the device's. A stream is a thread that works off what it was given; a graph keeps it, in the
// order in which it was given, and is launched into a stream. What the CUDA manual forbids is noted and said by the next
// synchronization: a host function that calls the runtime, or takes Python's lock; a copy to or from the host that is not of
// pinned memory; pinned memory allocated, or a wait for a stream, while a capture is under way.

#include <dlfcn.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace {

using Work = std::function<void()>;
using HostFunction = void (*)(void*);

enum Error { kSuccess = 0, kInvalidValue = 1, kNotPermitted = 800, kUnsupportedInCapture = 900 };
enum CaptureMode { kGlobal = 0, kThreadLocal = 1, kRelaxed = 2 };

struct Graph {
  std::vector<Work> nodes;
};

struct Stream {
  Stream() : thread([this] { serve(); }) { thread.detach(); }

  void give(Work work) {
    const std::lock_guard<std::mutex> lock(mutex);
    waiting.push_back(std::move(work));
    ++given;
    changed.notify_all();
  }

  void synchronize() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [this] { return done == given; });
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
      changed.wait(lock, [this] { return !waiting.empty(); });
      const Work work = std::move(waiting.front());
      waiting.pop_front();
      lock.unlock();
      work();
      lock.lock();
      ++done;
      changed.notify_all();
    }
  }

  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Work> waiting;
  int64_t given = 0, done = 0;
  Graph* capturing = nullptr;
  std::thread thread;
};

struct Event {
  std::mutex mutex;
  std::condition_variable changed;
  int64_t recorded = 0, reached = 0;
  Graph* capturing = nullptr;
};

// What all threads share.
std::mutex state;
std::map<const char*, size_t> pinned;
std::vector<Stream*> streams;
std::string violation;
int captures = 0;

thread_local bool in_host_function = false;
thread_local int capture_mode = kGlobal;

void note(const std::string& what) {
  const std::lock_guard<std::mutex> lock(state);
  if (violation.empty()) violation = what;
}

// Every entry point begins with it.
bool permitted(const char* name) {
  if (in_host_function) note(std::string("a host function calls ") + name);
  return !in_host_function;
}

bool is_pinned(const void* memory, size_t bytes) {
  const std::lock_guard<std::mutex> lock(state);
  const auto* begin = static_cast<const char*>(memory);
  auto after = pinned.upper_bound(begin);
  return after != pinned.begin() && begin + bytes <= std::prev(after)->first + std::prev(after)->second;
}

// Holds Python's lock, where there is Python, while a host function runs on another thread.
class Jailer {
 public:
  Jailer()
      : take(reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Ensure"))),
        give_back(reinterpret_cast<void (*)(int)>(dlsym(RTLD_DEFAULT, "PyGILState_Release"))) {}

  void run(HostFunction function, void* argument) {
    if (!take) return call(function, argument);
    bool held = false, done = false, in_time = true;
    std::mutex mutex;
    std::condition_variable changed;
    std::thread holder([&] {
      const int before = take();
      std::unique_lock<std::mutex> lock(mutex);
      held = true;
      changed.notify_all();
      in_time = changed.wait_for(lock, std::chrono::seconds(5), [&] { return done; });
      lock.unlock();
      give_back(before);
    });
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return held; });
    lock.unlock();
    call(function, argument);
    lock.lock();
    done = true;
    changed.notify_all();
    lock.unlock();
    holder.join();
    if (!in_time) note("a host function takes Python's lock");
  }

 private:
  static void call(HostFunction function, void* argument) {
    in_host_function = true;
    function(argument);
    in_host_function = false;
  }

  int (*take)();
  void (*give_back)(int);
};

// Into the graph that is captured, or to be done now.
int put(Stream* stream, Work work) {
  if (stream->capturing)
    stream->capturing->nodes.push_back(std::move(work));
  else
    stream->give(std::move(work));
  return kSuccess;
}

int put_host_function(Stream* stream, HostFunction function, void* argument) {
  return put(stream, [=] { Jailer().run(function, argument); });
}

int allocate(void** memory, size_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(state);
    if (!captures || capture_mode == kRelaxed) {
      *memory = std::malloc(bytes);
      pinned[static_cast<char*>(*memory)] = bytes;
      return kSuccess;
    }
  }
  note("pinned memory is allocated while a graph is captured");
  return kUnsupportedInCapture;
}

int copy(void* target, const void* source, size_t bytes, Stream* stream) {
  if (!is_pinned(target, bytes) && !is_pinned(source, bytes)) {
    note("a copy is of memory that is not pinned");
    return kInvalidValue;
  }
  return put(stream, [=] { std::memcpy(target, source, bytes); });
}

}  // namespace

extern "C" {

// What no CUDA runtime has: a kernel, which is a function here, and what was done that may not be.

int standinKernel(HostFunction kernel, void* argument, Stream* stream) {
  return put(stream, [=] { kernel(argument); });
}

const char* standinViolation() {
  const std::lock_guard<std::mutex> lock(state);
  return violation.c_str();
}

bool standinInHostFunction() { return in_host_function; }

// As the CUDA runtime has them.

int cudaStreamCreate(Stream** stream) {
  if (!permitted(__func__)) return kNotPermitted;
  *stream = new Stream;
  const std::lock_guard<std::mutex> lock(state);
  streams.push_back(*stream);
  return kSuccess;
}

int cudaStreamSynchronize(Stream* stream) {
  if (!permitted(__func__)) return kNotPermitted;
  if (stream->capturing) {
    note("the host waits for a stream that is captured");
    return kUnsupportedInCapture;
  }
  stream->synchronize();
  return *standinViolation() ? kNotPermitted : kSuccess;
}

int cudaStreamIsCapturing(Stream* stream, int* status) {
  if (!permitted(__func__)) return kNotPermitted;
  *status = stream->capturing != nullptr;
  return kSuccess;
}

int cudaThreadExchangeStreamCaptureMode(int* mode) {
  if (!permitted(__func__)) return kNotPermitted;
  std::swap(*mode, capture_mode);
  return kSuccess;
}

int cudaStreamBeginCapture(Stream* stream, int mode) {
  if (!permitted(__func__)) return kNotPermitted;
  stream->capturing = new Graph;
  capture_mode = mode;
  const std::lock_guard<std::mutex> lock(state);
  ++captures;
  return kSuccess;
}

int cudaStreamEndCapture(Stream* stream, Graph** graph) {
  if (!permitted(__func__)) return kNotPermitted;
  *graph = stream->capturing;
  const std::lock_guard<std::mutex> lock(state);
  for (Stream* one : streams)
    if (one->capturing == *graph) one->capturing = nullptr;
  --captures;
  return violation.empty() ? kSuccess : kNotPermitted;
}

int cudaGraphInstantiate(Graph** executable, Graph* graph, unsigned long long) {
  if (!permitted(__func__)) return kNotPermitted;
  *executable = new Graph(*graph);
  return kSuccess;
}

int cudaGraphLaunch(Graph* executable, Stream* stream) {
  if (!permitted(__func__)) return kNotPermitted;
  return put(stream, [=] {
    for (const Work& node : executable->nodes) node();
  });
}

int cudaEventCreateWithFlags(Event** event, unsigned) {
  if (!permitted(__func__)) return kNotPermitted;
  *event = new Event;
  return kSuccess;
}

int cudaEventRecord(Event* event, Stream* stream) {
  if (!permitted(__func__)) return kNotPermitted;
  event->capturing = stream->capturing;
  if (stream->capturing) return kSuccess;
  const std::lock_guard<std::mutex> lock(event->mutex);
  return put(stream, [event, number = ++event->recorded] {
    const std::lock_guard<std::mutex> lock(event->mutex);
    event->reached = number;
    event->changed.notify_all();
  });
}

// A stream that waits for one that is captured becomes a part of the capture: what it gets comes later in the graph.
int cudaStreamWaitEvent(Stream* stream, Event* event, unsigned) {
  if (!permitted(__func__)) return kNotPermitted;
  if (event->capturing) {
    stream->capturing = event->capturing;
    return kSuccess;
  }
  std::unique_lock<std::mutex> lock(event->mutex);
  return put(stream, [event, number = event->recorded] {
    std::unique_lock<std::mutex> lock(event->mutex);
    event->changed.wait(lock, [=] { return event->reached >= number; });
  });
}

const char* cudaGetErrorString(int error) {
  return error == kSuccess ? "no error" : *standinViolation() ? standinViolation() : "invalid value";
}

int cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  return permitted(__func__) ? allocate(memory, bytes) : kNotPermitted;
}

int cudaMemcpyAsync(void* target, const void* source, size_t bytes, int, Stream* stream) {
  return permitted(__func__) ? copy(target, source, bytes, stream) : kNotPermitted;
}

int cudaLaunchHostFunc(Stream* stream, HostFunction function, void* argument) {
  return permitted(__func__) ? put_host_function(stream, function, argument) : kNotPermitted;
}

// The same functions under the names of AMD's runtime.

const char* hipGetErrorString(int error) { return cudaGetErrorString(error); }

int hipStreamIsCapturing(Stream* stream, int* status) { return cudaStreamIsCapturing(stream, status); }

int hipThreadExchangeStreamCaptureMode(int* mode) { return cudaThreadExchangeStreamCaptureMode(mode); }

int hipHostMalloc(void** memory, size_t bytes, unsigned flags) { return cudaHostAlloc(memory, bytes, flags); }

int hipMemcpyAsync(void* target, const void* source, size_t bytes, int kind, Stream* stream) {
  return cudaMemcpyAsync(target, source, bytes, kind, stream);
}

int hipLaunchHostFunc(Stream* stream, HostFunction function, void* argument) {
  return cudaLaunchHostFunc(stream, function, argument);
}

}  // extern "C"
