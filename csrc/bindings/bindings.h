// What the bindings share: addresses in, nothing of torch's ABI.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <vector>

#include "../kernels/ops.h"

namespace ssm_fast {

namespace py = pybind11;

using Address = std::uintptr_t;
template <std::size_t N>
using Strides = std::array<Index, N>;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
std::vector<T*> pointers(const std::vector<Address>& addresses) {
  std::vector<T*> found;
  for (const Address address : addresses) found.push_back(at<T>(address));
  return found;
}

void bind_ops(py::module_& m);
void bind_network(py::module_& m);

}  // namespace ssm_fast
