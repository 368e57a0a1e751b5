// Scratch memory that grows and is kept from call to call.

#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

namespace k26 {

class Scratch {
 public:
  // Reserves at least `bytes`, aligned to a page. When the memory grows, what it held is lost. Throws std::bad_alloc.
  void reserve(size_t bytes) {
    if (bytes <= size_) return;
    if (data_) munmap(data_, size_);
    data_ = nullptr;
    size_ = 0;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    madvise(memory, bytes, MADV_HUGEPAGE);
    data_ = memory;
    size_ = bytes;
  }

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace k26
