// One function per schema of fastl2o/ops.py, in the argument order of the schema.

void lstm_step_(const TensorList& params, const TensorList& grads, const TensorList& states,
                Tensor meta, int64_t hidden_size, int64_t num_layers, bool log_sign, double p,
                double eps, double output_scale, double lr, double weight_decay, bool maximize,
                int64_t nonfinite, std::optional<Tensor> grad_scale,
                std::optional<Tensor> found_inf, std::optional<int64_t> rounding_seed) {
  run_step(lstm_config(hidden_size, num_layers, log_sign, p, eps, output_scale),
           {params, grads, states, nullptr}, meta, lr, weight_decay, maximize, nonfinite,
           grad_scale, found_inf, rounding_seed);
}

void rnnprop_step_(const TensorList& params, const TensorList& grads, const TensorList& states,
                   const TensorList& steps, Tensor meta, int64_t hidden_size, int64_t num_layers,
                   double beta1, double beta2, double step_size, double lr, double weight_decay,
                   bool maximize, int64_t nonfinite, std::optional<Tensor> grad_scale,
                   std::optional<Tensor> found_inf, std::optional<int64_t> rounding_seed) {
  run_step(rnnprop_config(hidden_size, num_layers, beta1, beta2, step_size),
           {params, grads, states, &steps}, meta, lr, weight_decay, maximize, nonfinite, grad_scale,
           found_inf, rounding_seed);
}

void lstm_runs_step_(Tensor params, Tensor grads, Tensor states, Tensor meta, int64_t hidden_size,
                     int64_t num_layers, bool log_sign, double p, double eps, double output_scale,
                     double lr, double weight_decay) {
  run_runs_step(lstm_config(hidden_size, num_layers, log_sign, p, eps, output_scale), params, grads,
                states, 0.0, meta, lr, weight_decay);
}

void rnnprop_runs_step_(Tensor params, Tensor grads, Tensor states, int64_t step, Tensor meta,
                        int64_t hidden_size, int64_t num_layers, double beta1, double beta2,
                        double step_size, double lr, double weight_decay) {
  run_runs_step(rnnprop_config(hidden_size, num_layers, beta1, beta2, step_size), params, grads,
                states, double(step), meta, lr, weight_decay);
}

std::tuple<Tensor, Tensor> lstm_step(Tensor grad, Tensor state, Tensor meta, int64_t hidden_size,
                                     int64_t num_layers, bool log_sign, double p, double eps,
                                     double output_scale) {
  return run_functional(lstm_config(hidden_size, num_layers, log_sign, p, eps, output_scale), grad,
                        state, 0.0, meta);
}

std::tuple<Tensor, Tensor> rnnprop_step(Tensor grad, Tensor state, int64_t step, Tensor meta,
                                        int64_t hidden_size, int64_t num_layers, double beta1,
                                        double beta2, double step_size) {
  return run_functional(rnnprop_config(hidden_size, num_layers, beta1, beta2, step_size), grad,
                        state, double(step), meta);
}

std::tuple<Tensor, Tensor, Tensor> lstm_step_backward(Tensor d_update, Tensor d_new_state,
                                                      Tensor grad, Tensor state, Tensor meta,
                                                      int64_t hidden_size, int64_t num_layers,
                                                      bool log_sign, double p, double eps,
                                                      double output_scale) {
  return run_functional_backward(
      lstm_config(hidden_size, num_layers, log_sign, p, eps, output_scale), d_update, d_new_state,
      grad, state, 0.0, meta);
}

std::tuple<Tensor, Tensor, Tensor> rnnprop_step_backward(Tensor d_update, Tensor d_new_state,
                                                         Tensor grad, Tensor state, int64_t step,
                                                         Tensor meta, int64_t hidden_size,
                                                         int64_t num_layers, double beta1,
                                                         double beta2, double step_size) {
  return run_functional_backward(rnnprop_config(hidden_size, num_layers, beta1, beta2, step_size),
                                 d_update, d_new_state, grad, state, double(step), meta);
}

std::tuple<Tensor, Tensor> lstm_unroll_backward(Tensor grads, Tensor state, Tensor meta,
                                                Tensor loss_weights, int64_t steps,
                                                int64_t hidden_size, int64_t num_layers,
                                                bool log_sign, double p, double eps,
                                                double output_scale, double lr, double weight_decay,
                                                std::optional<Tensor> d_updates,
                                                std::optional<Tensor> d_last_state) {
  return run_unroll_backward(lstm_config(hidden_size, num_layers, log_sign, p, eps, output_scale),
                             grads, state, 0.0, meta, loss_weights, steps, lr, weight_decay,
                             d_updates, d_last_state);
}

std::tuple<Tensor, Tensor> rnnprop_unroll_backward(Tensor grads, Tensor state, int64_t step,
                                                   Tensor meta, Tensor loss_weights, int64_t steps,
                                                   int64_t hidden_size, int64_t num_layers,
                                                   double beta1, double beta2, double step_size,
                                                   double lr, double weight_decay,
                                                   std::optional<Tensor> d_updates,
                                                   std::optional<Tensor> d_last_state) {
  return run_unroll_backward(rnnprop_config(hidden_size, num_layers, beta1, beta2, step_size),
                             grads, state, double(step), meta, loss_weights, steps, lr,
                             weight_decay, d_updates, d_last_state);
}
