// What the files of the test-only binding share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "core.h"

namespace py = pybind11;
using FloatArray = py::array_t<float, py::array::c_style>;

const fastl2o::cpu::TileKernels& kernels_named(const std::string& name);

// Deals ranges to plain threads, so that thread counts can be varied without torch.
fastl2o::cpu::ParallelFor threads_of(int count);

void bind_hierarchical(py::module_& m);
