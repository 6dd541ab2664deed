// pybind11 bindings of the torch-free core, for the tests of each instruction set and the
// microbenchmarks. NumPy arrays in, NumPy arrays out; never part of a wheel.
#include <algorithm>
#include <thread>

#include "bindings.h"

using fastl2o::Family;
using fastl2o::MetaLayout;
using fastl2o::RuleConfig;
using fastl2o::cpu::TileKernels;

const TileKernels& kernels_named(const std::string& name) {
  const TileKernels* kernels = fastl2o::cpu::find_kernels(name.c_str());
  if (kernels == nullptr) throw py::value_error("this processor has no " + name);
  return *kernels;
}

// Deals ranges to plain threads, so that thread counts can be varied without torch.
fastl2o::cpu::ParallelFor threads_of(int count) {
  return [count](int64_t work, const fastl2o::cpu::RangeBody& body) {
    std::vector<std::thread> others;
    for (int k = 1; k < count; ++k)
      if (work * k / count < work * (k + 1) / count)
        others.emplace_back(body, work * k / count, work * (k + 1) / count);
    if (work / count > 0 || count == 1) body(0, work / count);
    for (std::thread& other : others) other.join();
  };
}

namespace {

RuleConfig config_from(const py::dict& fields) {
  RuleConfig config;
  config.family =
      fields["family"].cast<std::string>() == "rnnprop" ? Family::rnnprop : Family::lstm;
  auto number = [&](const char* name, auto& field) {
    if (fields.contains(name)) field = fields[name].cast<std::decay_t<decltype(field)>>();
  };
  number("hidden_size", config.hidden_size);
  number("num_layers", config.num_layers);
  number("log_sign", config.log_sign);
  number("p", config.p);
  number("eps", config.eps);
  number("output_scale", config.output_scale);
  if (config.hidden_size < 1 || config.hidden_size > fastl2o::kMaxHidden || config.num_layers < 0 ||
      config.num_layers > fastl2o::kMaxLayers)
    throw py::value_error("hidden_size or num_layers is out of range");
  number("beta1", config.beta1);
  number("beta2", config.beta2);
  number("step_size", config.step_size);
  return config;
}

// grad (N,), state (S, N) -> update (N,), new state (S, N).
py::tuple step(const std::string& isa, const py::dict& fields, const FloatArray& meta,
               const FloatArray& grad, const FloatArray& state, double first_step, int threads) {
  const RuleConfig config = config_from(fields);
  const int64_t numel = grad.size();
  if (meta.size() != MetaLayout(config).total || state.size() != config.state_planes() * numel)
    throw py::value_error("meta or state does not have the rule's size");
  FloatArray update(numel), new_state({int64_t(config.state_planes()), numel});
  fastl2o::cpu::functional_step(kernels_named(isa), config, meta.data(), numel, first_step,
                                grad.data(), state.data(), update.mutable_data(),
                                new_state.mutable_data(), threads_of(threads));
  return py::make_tuple(update, new_state);
}

// meta (R, M), grads (R, N), states (R, S, N) -> updates (R, N), new states (R, S, N).
py::tuple step_runs(const std::string& isa, const py::dict& fields, const FloatArray& meta,
                    const FloatArray& grads, const FloatArray& states, double first_step,
                    int threads) {
  const RuleConfig config = config_from(fields);
  const int64_t runs = grads.shape(0), dim = grads.shape(1);
  if (meta.size() != runs * MetaLayout(config).total ||
      states.size() != config.state_planes() * runs * dim)
    throw py::value_error("meta or states does not have the rule's size");
  FloatArray updates({runs, dim}), new_states({runs, int64_t(config.state_planes()), dim});
  std::fill_n(updates.mutable_data(), updates.size(), 0.0f);
  std::copy_n(states.data(), states.size(), new_states.mutable_data());
  fastl2o::cpu::step_runs(
      kernels_named(isa), config, meta.data(),
      {runs, dim, first_step, updates.mutable_data(), grads.data(), new_states.mutable_data()}, 1.0,
      0.0, threads_of(threads));
  return py::make_tuple(updates, new_states);
}

// grads (K, R, D), state (S, R, D), loss_weights (K, R) -> d_meta (M,), d_state (S, R, D).
py::tuple unroll_backward(const std::string& isa, const py::dict& fields, const FloatArray& meta,
                          const FloatArray& grads, const FloatArray& state,
                          const FloatArray& loss_weights, int64_t steps, double first_step,
                          double lr, double weight_decay, int threads) {
  const RuleConfig config = config_from(fields);
  fastl2o::UnrollArgs args;
  args.steps = steps;
  args.rows = grads.shape(0);
  args.runs = grads.shape(1);
  args.dim = grads.shape(2);
  args.first_step = first_step;
  args.lr = lr;
  args.weight_decay = weight_decay;
  const int64_t numel = args.runs * args.dim;
  if (meta.size() != MetaLayout(config).total || state.size() != config.state_planes() * numel ||
      loss_weights.size() != args.rows * args.runs ||
      (args.rows != steps && args.rows != steps + 1))
    throw py::value_error("meta, state, grads or loss_weights does not have the rule's size");
  FloatArray d_meta(meta.size()), d_state({int64_t(config.state_planes()), args.runs, args.dim});
  args.grads = grads.data();
  args.state = state.data();
  args.loss_weights = loss_weights.data();
  args.d_meta = d_meta.mutable_data();
  args.d_state = d_state.mutable_data();
  fastl2o::cpu::unroll_backward(kernels_named(isa), config, meta.data(), args, threads_of(threads));
  return py::make_tuple(d_meta, d_state);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const char* name : {"baseline", "avx2", "avx512"})
    if (fastl2o::cpu::find_kernels(name) != nullptr) names.emplace_back(name);
  return names;
}

}  // namespace

PYBIND11_MODULE(fastl2o_core, m) {
  m.doc() =
      "The torch-free core of fastl2o, one function per kernel and instruction set (tests only).";
  m.def("instruction_sets", &instruction_sets, "Names usable as `isa` on this processor.");
  m.def("step", &step, py::arg("isa"), py::arg("config"), py::arg("meta"), py::arg("grad"),
        py::arg("state"), py::arg("first_step") = 0.0, py::arg("threads") = 1);
  m.def("step_runs", &step_runs, py::arg("isa"), py::arg("config"), py::arg("meta"),
        py::arg("grads"), py::arg("states"), py::arg("first_step") = 0.0, py::arg("threads") = 1);
  m.def("unroll_backward", &unroll_backward, py::arg("isa"), py::arg("config"), py::arg("meta"),
        py::arg("grads"), py::arg("state"), py::arg("loss_weights"), py::arg("steps"),
        py::arg("first_step") = 0.0, py::arg("lr") = 1.0, py::arg("weight_decay") = 0.0,
        py::arg("threads") = 1);
  bind_hierarchical(m);
}
