// Lets tests/cuda_hierarchical.py call the host side of the hierarchical CUDA step, compiled
// without CUDA.
#include <cstring>

#include "hierarchical_plan.h"

using namespace fastl2o;

extern "C" {

int args_bytes() { return sizeof(cuda::HierarchicalArgs); }
int entry_bytes() { return sizeof(cuda::HierarchicalEntry); }
int table_size() { return cuda::kEntries; }
int64_t chunks_of(int64_t numel) { return cuda::chunk_count(numel); }
int64_t chunk_of(int64_t numel) { return cuda::chunk_size(numel); }

int64_t workspace_bytes(const cuda::HierarchicalTensor* tensors, int64_t count, int64_t problems) {
  return cuda::HierarchicalPlan(tensors, count, problems).workspace_bytes();
}

// Makes a launch work on the last chunk of the first tensor alone.
void keep_last_chunk(char* out) {
  auto* const args = reinterpret_cast<cuda::HierarchicalArgs*>(out);
  args->table[0].first_chunk = int32_t(1 - cuda::chunk_count(args->table[0].numel));
  args->chunks = 1;
}

struct Options {
  int64_t maximize, nonfinite;
  uint64_t grad_scale, found_inf, flags, seed;
};

// The arguments of all kernels into `out`, then those of each launch that fills the list; their
// number. sizes: entries, chunks, whether they are listed.
int plan(const cuda::HierarchicalTensor* tensors, int64_t count, int64_t problems, uint64_t meta,
         uint64_t global_states, const Options* options, uint64_t workspace, int capacity,
         char* out, int64_t* sizes) {
  cuda::HierarchicalOptions given;
  given.maximize = options->maximize != 0;
  given.seed = options->seed;
  given.nonfinite = int(options->nonfinite);
  given.grad_scale = reinterpret_cast<const float*>(options->grad_scale);
  given.found_inf = reinterpret_cast<const float*>(options->found_inf);
  given.nonfinite_flags = reinterpret_cast<int*>(options->flags);
  const cuda::HierarchicalPlan plan(tensors, count, problems);
  cuda::HierarchicalArgs args =
      plan.args(reinterpret_cast<const float*>(meta), reinterpret_cast<float*>(global_states),
                given, reinterpret_cast<void*>(workspace));
  sizes[0] = args.entries;
  sizes[1] = args.chunks;
  sizes[2] = plan.listed();
  std::memcpy(out, &args, sizeof args);
  int made = 1;
  for (int64_t first = 0; plan.listed() && first < plan.entries() && made < capacity;
       first += cuda::kEntries, ++made) {
    plan.send(first, args);
    std::memcpy(out + made * sizeof args, &args, sizeof args);
  }
  return made;
}
}
