// The emulator's controls in Python, and the addresses of what the bindings need.
#include <pybind11/pybind11.h>

#include "machine.hpp"
#include "toys.hpp"

namespace py = pybind11;
namespace emulator = tf::emulator;

PYBIND11_MODULE(cuda_emulator_library, m) {
  py::class_<emulator::Settings>(m, "Settings")
      .def_readwrite("late", &emulator::Settings::late)
      .def_readwrite("seed", &emulator::Settings::seed)
      .def_readwrite("multiprocessors", &emulator::Settings::multiprocessors)
      .def_readwrite("compute_capability", &emulator::Settings::compute_capability);
  m.attr("settings") = py::cast(&emulator::settings, py::return_value_policy::reference);
  m.def("counters", [] {
    const auto& c = emulator::counters;
    py::dict d;
    d["launches"] = c.launches;
    d["blocks"] = c.blocks;
    d["switches"] = c.switches;
    d["mma"] = c.mma;
    d["wgmma"] = c.wgmma;
    d["tma_loads"] = c.tma_loads;
    d["cp_async"] = c.cp_async;
    d["ldmatrix"] = c.ldmatrix;
    d["ldmatrix_conflicts"] = c.ldmatrix_conflicts;
    return d;
  });
  m.def("reset_counters", [] { emulator::counters = {}; });
  tf::toys::bind_sm80(m);
  tf::toys::bind_sm90(m);
}
