// What the bindings share. Tensors come in as Python objects that have data_ptr() and stride(): nothing of torch's ABI.
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
using Sizes = std::array<Index, N>;

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

namespace pybind11::detail {

// A tensor whose dimensions from the N-th on are contiguous, or None. The dtype is not checked.
template <class T, std::size_t N>
struct type_caster<ssm_fast::View<T, N>> {
  using TensorView = ssm_fast::View<T, N>;
  PYBIND11_TYPE_CASTER(TensorView, const_name("Tensor | None"));

  bool load(handle tensor, bool) {
    if (tensor.is_none()) return true;
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    static PyObject* const stride = PyUnicode_InternFromString("stride");
    const auto address = reinterpret_steal<object>(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr));
    if (!address) throw error_already_set();
    value.data = static_cast<T*>(PyLong_AsVoidPtr(address.ptr()));
    const auto strides = reinterpret_steal<object>(PyObject_CallMethodNoArgs(tensor.ptr(), stride));
    if (!strides) throw error_already_set();
    if (!PyTuple_Check(strides.ptr()) || std::size_t(PyTuple_GET_SIZE(strides.ptr())) < N) return false;
    for (std::size_t i = 0; i < N; ++i) {
      value.strides[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), Py_ssize_t(i)));
    }
    return !PyErr_Occurred();
  }
};

}  // namespace pybind11::detail
