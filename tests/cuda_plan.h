// What the C functions of cuda_step_plan.cpp and cuda_unroll_plan.cpp share.
#pragma once

#include "rule_config.h"

namespace fastl2o {

inline RuleConfig make_config(int rnnprop, int log_sign, const double* constants) {
  RuleConfig config;
  config.family = rnnprop ? Family::rnnprop : Family::lstm;
  config.log_sign = log_sign;
  config.p = constants[0];
  config.eps = float(constants[1]);
  config.output_scale = float(constants[2]);
  config.beta1 = constants[3];
  config.beta2 = constants[4];
  config.step_size = float(constants[5]);
  return config;
}

}  // namespace fastl2o
