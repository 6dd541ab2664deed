// Preloaded into a process: makes one chosen operator new of the calling code fail. Only calls that
// come from the library named by fastl2o_arm are counted.
#include <dlfcn.h>

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {
std::atomic<long> countdown{-1};
std::atomic<long> seen{0};
char library[256];

bool from_library(void* caller) {
  Dl_info info;
  return dladdr(caller, &info) != 0 && info.dli_fname != nullptr &&
         std::strstr(info.dli_fname, library) != nullptr;
}

void* allocate(std::size_t size, std::size_t alignment, void* caller) {
  if (countdown.load(std::memory_order_relaxed) >= 0 && from_library(caller)) {
    seen.fetch_add(1);
    if (countdown.fetch_sub(1) == 0) throw std::bad_alloc();
  }
  void* memory = alignment <= alignof(std::max_align_t)
                     ? std::malloc(size == 0 ? 1 : size)
                     : std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
}  // namespace

// The allocation that fails is the one after `skip` others; -1: none.
extern "C" void fastl2o_arm(const char* name, long skip) {
  std::strncpy(library, name, sizeof(library) - 1);
  seen = 0;
  countdown = skip;
}
extern "C" long fastl2o_seen() { return seen; }

void* operator new(std::size_t size) { return allocate(size, 0, __builtin_return_address(0)); }
void* operator new[](std::size_t size) { return allocate(size, 0, __builtin_return_address(0)); }
void* operator new(std::size_t size, std::align_val_t at) {
  return allocate(size, std::size_t(at), __builtin_return_address(0));
}
void* operator new[](std::size_t size, std::align_val_t at) {
  return allocate(size, std::size_t(at), __builtin_return_address(0));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
