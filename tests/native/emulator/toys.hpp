// Small kernels that test the emulator itself.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace tf::toys {
void bind(pybind11::module_& m);
}
