// The hierarchical rule's part of the test-only binding.
#include "hierarchical.h"

#include "bindings.h"

using fastl2o::DType;
using fastl2o::HierarchicalConfig;
using fastl2o::HierarchicalLayout;

namespace {

using Sizes = std::vector<int>;  // param, tensor and global size, number of scales

HierarchicalConfig config_from(const Sizes& sizes, const FloatArray& meta) {
  const HierarchicalConfig config{sizes.at(0), sizes.at(1), sizes.at(2), sizes.at(3)};
  if (meta.size() != HierarchicalLayout(config).total)
    throw py::value_error("meta does not have the rule's size");
  return config;
}

// Updates params, planes, states (tensors, K + 1), steps and global_states (G, Z) in place.
void step(const std::string& isa, const Sizes& sizes, const FloatArray& meta,
          std::vector<FloatArray> params, std::vector<FloatArray> grads,
          std::vector<FloatArray> planes, FloatArray& states, FloatArray& steps,
          FloatArray& global_states, const std::vector<int64_t>& problems, double lr,
          double weight_decay, int threads) {
  const HierarchicalConfig config = config_from(sizes, meta);
  std::vector<fastl2o::cpu::HierarchicalTensor> tensors;
  for (size_t i = 0; i < params.size(); ++i)
    tensors.push_back({params[i].mutable_data(), grads[i].mutable_data(), planes[i].mutable_data(),
                       states.mutable_data(py::ssize_t(i), 0), steps.mutable_data(py::ssize_t(i)),
                       params[i].size(), params[i].size(), DType::f32, problems.at(i), lr,
                       weight_decay});
  fastl2o::cpu::HierarchicalOptions options;
  options.nonfinite = fastl2o::cpu::NonFinite::pass;
  fastl2o::cpu::hierarchical_step(kernels_named(isa), config, meta.data(), tensors,
                                  global_states.mutable_data(), global_states.shape(0), options,
                                  threads_of(threads));
}

// grads (K, R, D), state (R, W), loss_weights (K, R) -> d_meta (M,), d_state (R, W).
py::tuple unroll_backward(const std::string& isa, const Sizes& sizes, const FloatArray& meta,
                          const FloatArray& grads, const FloatArray& state, bool from_start,
                          const FloatArray& loss_weights, int64_t steps,
                          const std::vector<int64_t>& tensor_sizes, double lr, double weight_decay,
                          int threads) {
  const HierarchicalConfig config = config_from(sizes, meta);
  FloatArray d_meta(meta.size()), d_state({state.shape(0), state.shape(1)});
  fastl2o::cpu::HierarchicalUnrollArgs args;
  args.steps = steps;
  args.rows = grads.shape(0);
  args.runs = grads.shape(1);
  args.from_start = from_start;
  args.lr = lr;
  args.weight_decay = weight_decay;
  args.sizes = tensor_sizes;
  args.grads = grads.data();
  args.state = state.data();
  args.loss_weights = loss_weights.data();
  args.d_meta = d_meta.mutable_data();
  args.d_state = d_state.mutable_data();
  if (state.shape(1) != fastl2o::cpu::hierarchical_row_size(config, tensor_sizes))
    throw py::value_error("state does not have the rule's size");
  fastl2o::cpu::hierarchical_unroll_backward(kernels_named(isa), config, meta.data(), args,
                                             threads_of(threads));
  return py::make_tuple(d_meta, d_state);
}

}  // namespace

void bind_hierarchical(py::module_& m) {
  m.def("hierarchical_step", &step, py::arg("isa"), py::arg("sizes"), py::arg("meta"),
        py::arg("params"), py::arg("grads"), py::arg("planes"), py::arg("states").noconvert(),
        py::arg("steps").noconvert(), py::arg("global_states").noconvert(), py::arg("problems"),
        py::arg("lr") = 1.0, py::arg("weight_decay") = 0.0, py::arg("threads") = 1);
  m.def("hierarchical_unroll_backward", &unroll_backward, py::arg("isa"), py::arg("sizes"),
        py::arg("meta"), py::arg("grads"), py::arg("state"), py::arg("from_start"),
        py::arg("loss_weights"), py::arg("steps"), py::arg("tensor_sizes"), py::arg("lr") = 1.0,
        py::arg("weight_decay") = 0.0, py::arg("threads") = 1);
}
