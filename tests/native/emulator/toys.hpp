// Small kernels that test the emulator itself.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "machine.hpp"

namespace tf::toys {
namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// An array as global memory, for this call.
template <class T>
const T* in(const Array<T>& a) {
  emulator::add_range(a.data(), size_t(a.nbytes()), false);
  return a.data();
}
template <class T>
T* out(Array<T>& a) {
  emulator::add_range(a.mutable_data(), size_t(a.nbytes()), true);
  return a.mutable_data();
}
struct Clear {
  ~Clear() { emulator::clear_ranges(); }
};

void bind_sm80(py::module_& m);
void bind_sm90(py::module_& m);

}  // namespace tf::toys
