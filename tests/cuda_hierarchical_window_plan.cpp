// Lets tests/cuda_hierarchical_unroll.py call the host side of the hierarchical CUDA window
// backward, compiled without CUDA: it writes down what would go to the stream.
#include <cstring>

#include "hierarchical_window.h"

using namespace fastl2o;

namespace {

// Followed by the arguments of the kernels.
struct Command {
  int64_t kind;  // copy, zero, send, replay, then WindowKernel's
  uint64_t to, from;
  int64_t count;  // of bytes, or of blocks
};
constexpr int64_t kCopy = 0, kZero = 1, kSend = 2, kReplay = 3, kLaunch = 4;
constexpr size_t kCommand = sizeof(Command) + 4096;

struct Recorder {
  const cuda::HierarchicalPlan& plan;
  char* out;
  int64_t capacity, made = 0;

  template <typename Args>
  void add(const Command& command, const Args& args) {
    if (made < capacity) {
      char* const to = out + size_t(made) * kCommand;
      std::memcpy(to, &command, sizeof command);
      std::memcpy(to + sizeof command, &args, sizeof args);
    }
    ++made;
  }
  void copy(void* to, const void* from, size_t bytes) {
    add({kCopy, reinterpret_cast<uint64_t>(to), reinterpret_cast<uint64_t>(from), int64_t(bytes)},
        0);
  }
  void zero(void* to, size_t bytes) {
    add({kZero, reinterpret_cast<uint64_t>(to), 0, int64_t(bytes)}, 0);
  }
  void list(cuda::HierarchicalArgs args) {
    for (int64_t first = 0; first < plan.entries(); first += cuda::kEntries) {
      plan.send(first, args);
      add({kSend, 0, 0, 1}, args);
    }
  }
  void replay(const cuda::HierarchicalArgs& args) { add({kReplay, 0, 0, args.problems}, args); }
  void launch(cuda::WindowKernel kernel, int64_t blocks, const cuda::HierarchicalWindowArgs& args) {
    add({kLaunch + int64_t(kernel), 0, 0, blocks}, args);
  }
};

using Limits = cuda::HierarchicalWindowLimits;

}  // namespace

extern "C" {

Limits limits() { return {}; }
int command_bytes() { return kCommand; }
int args_bytes() { return sizeof(cuda::HierarchicalArgs); }
int window_args_bytes() { return sizeof(cuda::HierarchicalWindowArgs); }

// Bytes of the workspace, segments, and whether the step's entries are listed.
void describe(const cuda::HierarchicalWindowCall* call, const Limits* limits, int64_t* out) {
  const cuda::HierarchicalWindow made(*call, nullptr, *limits);
  out[0] = made.workspace_bytes();
  out[1] = made.segments();
  out[2] = made.plan().listed();
}

// The number of commands, of which the first `capacity` are written.
int64_t run(const cuda::HierarchicalWindowCall* call, uint64_t workspace, const Limits* limits,
            char* out, int64_t capacity) {
  const cuda::HierarchicalWindow made(*call, reinterpret_cast<void*>(workspace), *limits);
  Recorder recorder{made.plan(), out, capacity};
  made.run(recorder);
  return recorder.made;
}
}
