// The Python module. Private: addresses go in unchecked; ssm_fast.ops and ssm_fast.native call it.
#include <omp.h>

#include <stdexcept>

#include "../launch.h"
#include "bindings.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  using namespace ssm_fast;
  m.doc() = "CPU kernels of ssm_fast. Private: addresses go in unchecked; call ssm_fast.ops.";
  try {
    choose_isa();
  } catch (const std::invalid_argument& error) {
    throw py::import_error(error.what());
  }
  m.def("isa", [] { return name(chosen_isa()); });
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const Isa isa : available_isas()) names.push_back(name(isa));
    return names;
  });
  m.def("num_threads", [] { return omp_get_max_threads(); });
  m.def("on_new_thread", [](py::function function) {
    static PyObject* called;  // for good: threads outlive the module
    called = function.release().ptr();
    on_new_thread = [] {
      const py::gil_scoped_acquire acquire;
      const py::handle function(called);
      function();
    };
  });
  bind_ops(m);
  bind_network(m);
}
