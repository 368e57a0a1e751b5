// Runs a job, in which all threads call the same function: on torch's OpenMP threads while the caller waits, or on a
// pool of the library's own threads.
//
// torch's threads spin for milliseconds after each of torch's operators. A layer on other threads of the same cores
// took 11.3 ms after a product of torch's and 4.0 ms alone (2 cores), so work that the caller waits for runs on torch's
// threads. Work that the caller does not wait for runs on the pool, which is meant for cores beside a GPU, where
// torch's threads rest.

#pragma once

#include <dlfcn.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <vector>

namespace k26 {

constexpr int64_t kNoLimit = -1;

// A counter that threads wait on. They spin for a short time, because a layer follows a layer within microseconds, and
// then sleep.
class Counter {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }

  void advance() {
    value_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0)
      syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  // Returns true once the counter is no longer `seen`, or false after `limit` nanoseconds.
  bool wait_beyond(uint32_t seen, int spins, int64_t limit = kNoLimit) {
    for (int i = 0; i < spins; ++i) {
      if (value() != seen) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#else
      asm volatile("yield");
#endif
    }
    const int64_t end = limit == kNoLimit ? 0 : now() + limit;
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    while (value() == seen) {
      const int64_t left = limit == kNoLimit ? kNoLimit : end - now();
      if (limit != kNoLimit && left <= 0) break;
      const timespec until{static_cast<time_t>(left / kSecond), static_cast<long>(left % kSecond)};
      syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, seen, limit == kNoLimit ? nullptr : &until, nullptr, 0);
    }
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    return value() != seen;
  }

 private:
  static constexpr int64_t kSecond = 1'000'000'000;

  static int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * kSecond + time.tv_nsec;
  }

  std::atomic<uint32_t> value_{0};
  std::atomic<uint32_t> sleepers_{0};
};

constexpr int kSpins = 2000;  // some 30 µs

class Barrier {
 public:
  void wait(int threads) {
    const uint32_t round = round_.value();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.advance();
    } else {
      round_.wait_beyond(round, kSpins);
    }
  }

 private:
  std::atomic<int> arrived_{0};
  Counter round_;
};

// A thread's place among the threads of a job. The threads of its NUMA node are [node_begin, node_end).
struct Worker {
  int index;
  int count;
  int node_begin;
  int node_end;
  Barrier* barrier;

  void meet() const { barrier->wait(count); }
};

using Task = void (*)(const Worker&, void*);

// torch's OpenMP runtime, whichever one the process has. It is called by GNU's entry points, which the other runtimes
// have too.
class Team {
 public:
  Team()
      : parallel_(reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"))),
        index_(reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"))),
        count_(reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"))) {}

  bool found() const { return parallel_ && index_ && count_; }

  // Runs the task on as many threads as the runtime gives, at most `threads`, including the calling thread.
  void run(Task task, void* argument, int threads) {
    struct Run {
      Team* team;
      Task task;
      void* argument;
      Barrier barrier;
    } run{this, task, argument, {}};
    parallel_(
        [](void* data) {
          Run& run = *static_cast<Run*>(data);
          const int count = run.team->count_();
          run.task({run.team->index_(), count, 0, count, &run.barrier}, run.argument);
        },
        &run, static_cast<unsigned>(threads), 0);
  }

 private:
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  using Number = int (*)();
  Parallel parallel_;
  Number index_, count_;
};

class Pool {
 public:
  // Starts one thread on each of `cpus`. nodes[i] is the NUMA node of cpus[i], and equal nodes are side by side.
  Pool(const std::vector<int>& cpus, const std::vector<int>& nodes) {
    const int count = static_cast<int>(cpus.size());
    // Signals are blocked in the pool's threads, so that they go to the process' own threads, where Python handles
    // them.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    for (int i = 0; i < count; ++i) {
      int begin = i, end = i + 1;
      while (begin > 0 && nodes[begin - 1] == nodes[i]) --begin;
      while (end < count && nodes[end] == nodes[i]) ++end;
      auto* start = new Start{this, {i, count, begin, end, &barrier_}};
      pthread_t thread;
      if (pthread_create(&thread, nullptr, &Pool::main, start) != 0) {
        delete start;
        failed_ = true;
        break;
      }
      cpu_set_t set;
      CPU_ZERO(&set);
      CPU_SET(cpus[i], &set);
      pthread_setaffinity_np(thread, sizeof(set), &set);
      pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    threads_ = count;
  }

  bool failed() const { return failed_; }
  int threads() const { return threads_; }

  // Starts a job and returns its number. The job before must be done.
  uint32_t start(Task task, void* argument) {
    task_ = task;
    argument_ = argument;
    unfinished_.store(threads_, std::memory_order_relaxed);
    submitted_.advance();
    return submitted_.value();
  }

  // Returns true once that job is done, or false after `limit` nanoseconds in which no job ended. The waiting thread
  // sleeps at once, because its core may be a worker's.
  bool wait(uint32_t job, int64_t limit = kNoLimit) {
    for (uint32_t done = done_.value(); static_cast<int32_t>(done - job) < 0; done = done_.value())
      if (!done_.wait_beyond(done, 0, limit)) return false;
    return true;
  }

  bool wait_for_all(int64_t limit = kNoLimit) { return wait(submitted_.value(), limit); }

 private:
  struct Start {
    Pool* pool;
    Worker worker;
  };

  static void* main(void* argument) {
    auto* start = static_cast<Start*>(argument);
    Pool& pool = *start->pool;
    const Worker worker = start->worker;
    delete start;
    for (uint32_t seen = 0;; ++seen) {
      pool.submitted_.wait_beyond(seen, kSpins);
      pool.task_(worker, pool.argument_);
      if (pool.unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) pool.done_.advance();
    }
    return nullptr;
  }

  Barrier barrier_;
  int threads_ = 0;
  bool failed_ = false;
  Counter submitted_;
  Counter done_;
  std::atomic<int> unfinished_{0};
  Task task_ = nullptr;
  void* argument_ = nullptr;
};

}  // namespace k26
