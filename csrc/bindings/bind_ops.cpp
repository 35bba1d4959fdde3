// The ops: addresses, sizes and strides in, nothing of torch's ABI.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include "../calls.h"
#include "bindings.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ssm_fast {
namespace {

// Elements from the first to the end of the last one of [G, B, T, N] with these strides.
Index last_element(const Strides<3>& strides, const Strides<4>& sizes) {
  Index end = sizes[3];
  for (std::size_t i = 0; i < 3; ++i) end += (sizes[i] - 1) * strides[i];
  return end;
}

// Asks for pages of 2 MiB in the whole ones that an output spans. Fresh memory is mapped while a kernel
// writes it, and at 4 KiB a page that takes longer than the arithmetic.
template <class T>
void use_huge_pages(T* output, Index elements) {
#if defined(__linux__)
  constexpr std::uintptr_t kPage = std::uintptr_t(1) << 21;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(output) + kPage - 1) & ~(kPage - 1);
  const std::uintptr_t end = reinterpret_cast<std::uintptr_t>(output + elements) & ~(kPage - 1);
  if (output && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint
#else
  (void)output, (void)elements;
#endif
}

template <class T>
void dense_scan(Address u, Strides<3> u_strides, Address A, Strides<3> A_strides, Address s0, Strides<2> s0_strides,
                Address reset, Strides<3> reset_strides, Address s, Strides<3> s_strides, Strides<4> sizes,
                bool reverse) {
  const auto [G, B, T_len, N] = sizes;
  const int threads =
      threads_for(double(G * B * T_len) * double(N * N), SSM_FAST_CALL(dense_scan_rows(G, B, T_len, N)));
  const auto scratch = scratch_block<T>(SSM_FAST_CALL(dense_scan_scratch(G, B, T_len, N, threads, sizeof(T) == 8)));
  const DenseScan<T> params{at<T>(u),
                            u_strides[0],
                            u_strides[1],
                            u_strides[2],
                            at<T>(A),
                            A_strides[0],
                            A_strides[1],
                            A_strides[2],
                            at<T>(s0),
                            s0_strides[0],
                            s0_strides[1],
                            at<std::uint8_t>(reset),
                            reset_strides[0],
                            reset_strides[1],
                            reset_strides[2],
                            at<T>(s),
                            s_strides[0],
                            s_strides[1],
                            s_strides[2],
                            G,
                            B,
                            T_len,
                            N,
                            reverse,
                            threads,
                            static_cast<T*>(scratch.get())};
  const py::gil_scoped_release release;
  use_huge_pages(params.s, last_element(s_strides, sizes));
  SSM_FAST_CALL(dense_scan(params));
}

template <class T>
void norm_scan(Sweep sweep, Address u, Strides<3> u_strides, Address c, Strides<3> c_strides, Address A,
               Strides<3> A_strides, Address weight, Index weight_stride, Address bias, Index bias_stride, Address n,
               Strides<3> n_strides, Address rstd, Address s0, Strides<2> s0_strides, Address reset,
               Strides<3> reset_strides, Address s, Address x, Strides<3> s_strides, Strides<4> sizes, double eps,
               Address weight_grad, Address bias_grad) {
  const auto [G, B, T_len, N] = sizes;
  const int threads = threads_for(double(G * B * T_len) * double(N * N), G * B);
  const Index work = SSM_FAST_CALL(norm_scan_scratch(N, sizeof(T) == 8)) * threads;
  const Index sums = weight_grad ? SSM_FAST_CALL(norm_scan_sums(G, B, N, sizeof(T) == 8)) : 0;
  const auto scratch = scratch_block<T>(work + sums);
  NormScan<T> params{};
  params.u = at<T>(u);
  std::tie(params.u_g, params.u_b, params.u_t) = std::tuple_cat(u_strides);
  params.c = at<T>(c);
  std::tie(params.c_g, params.c_b, params.c_t) = std::tuple_cat(c_strides);
  params.A = at<T>(A);
  std::tie(params.A_g, params.A_row, params.A_col) = std::tuple_cat(A_strides);
  params.weight = at<T>(weight);
  params.weight_g = weight_stride;
  params.bias = at<T>(bias);
  params.bias_g = bias_stride;
  params.n = at<T>(n);
  std::tie(params.n_g, params.n_b, params.n_t) = std::tuple_cat(n_strides);
  params.rstd = at<T>(rstd);
  params.s0 = at<T>(s0);
  std::tie(params.s0_g, params.s0_b) = std::tuple_cat(s0_strides);
  params.reset = at<std::uint8_t>(reset);
  std::tie(params.reset_g, params.reset_b, params.reset_t) = std::tuple_cat(reset_strides);
  params.s = at<T>(s);
  params.x = at<T>(x);
  std::tie(params.s_g, params.s_b, params.s_t) = std::tuple_cat(s_strides);
  std::tie(params.G, params.B, params.T_len, params.N) = std::tuple_cat(sizes);
  params.eps = T(eps);
  params.sweep = sweep;
  params.threads = threads;
  params.scratch = static_cast<T*>(scratch.get());
  params.weight_grad = at<T>(weight_grad);
  params.bias_grad = at<T>(bias_grad);
  params.sums = weight_grad ? params.scratch + work : nullptr;
  const py::gil_scoped_release release;
  use_huge_pages(params.s, last_element(s_strides, sizes));
  use_huge_pages(params.x, last_element(s_strides, sizes));
  if (sweep == Sweep::forward) use_huge_pages(params.n, last_element(n_strides, sizes));
  SSM_FAST_CALL(norm_scan(params));
}

template <class T>
void weight_grad(Address x, Strides<3> x_strides, Address s, Strides<3> s_strides, Address s0, Strides<2> s0_strides,
                 Address reset, Strides<3> reset_strides, Address grad, Strides<4> sizes, bool reverse) {
  const auto [G, B, T_len, N] = sizes;
  const auto scratch = scratch_block<T>(SSM_FAST_CALL(weight_grad_scratch(G, B, T_len, N, sizeof(T) == 8)));
  const WeightGrad<T> params{at<T>(x),
                             x_strides[0],
                             x_strides[1],
                             x_strides[2],
                             at<T>(s),
                             s_strides[0],
                             s_strides[1],
                             s_strides[2],
                             at<T>(s0),
                             s0_strides[0],
                             s0_strides[1],
                             at<std::uint8_t>(reset),
                             reset_strides[0],
                             reset_strides[1],
                             reset_strides[2],
                             at<T>(grad),
                             G,
                             B,
                             T_len,
                             N,
                             reverse,
                             s_strides[2] > s_strides[1],
                             threads_for(double(G * B * T_len) * double(N * N), G * B * T_len),
                             static_cast<T*>(scratch.get())};
  const py::gil_scoped_release release;
  SSM_FAST_CALL(weight_grad(params));
}

template <class T>
void linear_scan(Address a, Strides<3> a_strides, Address b, Strides<3> b_strides, Address h0, Strides<2> h0_strides,
                 Address h, Strides<3> h_strides, Strides<3> sizes, bool reverse, bool shift) {
  const auto [M, T_len, C] = sizes;
  const Index elements = M * T_len * C;
  const LinearScan<T> params{at<T>(a),
                             a_strides[0],
                             a_strides[1],
                             a_strides[2],
                             at<T>(b),
                             b_strides[0],
                             b_strides[1],
                             b_strides[2],
                             at<T>(h0),
                             h0_strides[0],
                             h0_strides[1],
                             at<T>(h),
                             h_strides[0],
                             h_strides[1],
                             h_strides[2],
                             M,
                             T_len,
                             C,
                             reverse,
                             shift,
                             threads_for(double(elements), elements)};
  const py::gil_scoped_release release;
  use_huge_pages(at<T>(h), elements);
  SSM_FAST_CALL(linear_scan(params));
}

template <class T>
void gae(Address rewards, Address values, Address next_values, Address terminated, Address truncated,
         Address advantages, Address returns, Strides<3> sizes, double gamma, double gae_lambda) {
  const auto [M, T_len, C] = sizes;
  const Index elements = M * T_len * C;
  const Gae<T> params{at<T>(rewards),
                      at<T>(values),
                      at<T>(next_values),
                      at<std::uint8_t>(terminated),
                      at<std::uint8_t>(truncated),
                      at<T>(advantages),
                      at<T>(returns),
                      M,
                      T_len,
                      C,
                      T(gamma),
                      T(gae_lambda),
                      threads_for(double(elements), elements)};
  const py::gil_scoped_release release;
  use_huge_pages(at<T>(advantages), elements);
  use_huge_pages(at<T>(returns), elements);
  SSM_FAST_CALL(gae(params));
}

template <class T>
void discounted_returns(Address rewards, Address next_values, Address terminated, Address truncated, Address returns,
                        Strides<3> sizes, double gamma) {
  const auto [M, T_len, C] = sizes;
  const Index elements = M * T_len * C;
  const DiscountedReturns<T> params{at<T>(rewards),
                                    at<T>(next_values),
                                    at<std::uint8_t>(terminated),
                                    at<std::uint8_t>(truncated),
                                    at<T>(returns),
                                    M,
                                    T_len,
                                    C,
                                    T(gamma),
                                    threads_for(double(elements), elements)};
  const py::gil_scoped_release release;
  use_huge_pages(at<T>(returns), elements);
  SSM_FAST_CALL(discounted_returns(params));
}

template <class T>
void output_norm(Address z, Strides<2> z_strides, Address weight, Index weight_stride, Address bias, Index bias_stride,
                 Address residual, Strides<2> residual_strides, Address y, Address mean, Address rstd, Strides<3> sizes,
                 double eps, bool tanh) {
  OutputNorm<T> params{};
  params.z = at<T>(z);
  std::tie(params.z_g, params.z_m) = std::tuple_cat(z_strides);
  params.weight = at<T>(weight);
  params.weight_g = weight_stride;
  params.bias = at<T>(bias);
  params.bias_g = bias_stride;
  params.residual = at<T>(residual);
  std::tie(params.residual_g, params.residual_m) = std::tuple_cat(residual_strides);
  params.y = at<T>(y);
  params.mean = at<T>(mean);
  params.rstd = at<T>(rstd);
  std::tie(params.G, params.M, params.H) = std::tuple_cat(sizes);
  params.eps = T(eps);
  params.tanh = tanh;
  params.threads = threads_for(double(params.G * params.M) * double(params.H) / 4, params.G * params.M);
  const py::gil_scoped_release release;
  SSM_FAST_CALL(output_norm(params));
}

template <class T>
void output_norm_grad(Address grad_y, Strides<2> grad_strides, Address z, Strides<2> z_strides, Address weight,
                      Index weight_stride, Address bias, Index bias_stride, Address mean, Address rstd, Address grad_z,
                      Address grad_weight, Address grad_bias, Strides<3> sizes, bool tanh) {
  const auto [G, M, H] = sizes;
  const auto scratch = scratch_block<T>(SSM_FAST_CALL(output_norm_scratch(G, M, H, sizeof(T) == 8)));
  OutputNormGrad<T> params{};
  params.grad_y = at<T>(grad_y);
  std::tie(params.grad_g, params.grad_m) = std::tuple_cat(grad_strides);
  params.z = at<T>(z);
  std::tie(params.z_g, params.z_m) = std::tuple_cat(z_strides);
  params.weight = at<T>(weight);
  params.weight_g = weight_stride;
  params.bias = at<T>(bias);
  params.bias_g = bias_stride;
  params.mean = at<T>(mean);
  params.rstd = at<T>(rstd);
  params.grad_z = at<T>(grad_z);
  params.grad_weight = at<T>(grad_weight);
  params.grad_bias = at<T>(grad_bias);
  std::tie(params.G, params.M, params.H) = std::tuple_cat(sizes);
  params.tanh = tanh;
  params.threads = threads_for(double(G * M) * double(H) / 4, G * M);
  params.scratch = static_cast<T*>(scratch.get());
  const py::gil_scoped_release release;
  SSM_FAST_CALL(output_norm_grad(params));
}

template <class T>
void linear(Address x, Strides<2> x_strides, Address W, Strides<3> W_strides, Address bias, Index bias_stride,
            Address add, Strides<2> add_strides, Address y, Strides<4> sizes, bool tanh) {
  const auto [G, M, I, O] = sizes;
  Linear<T> params{};
  params.threads = linear_threads(G * M, double(I * O));
  const auto scratch = scratch_block<T>(params.threads * SSM_FAST_CALL(linear_scratch(I, O, sizeof(T) == 8)));
  params.x = at<T>(x);
  std::tie(params.x_g, params.x_m) = std::tuple_cat(x_strides);
  params.W = at<T>(W);
  std::tie(params.W_g, params.W_o, params.W_i) = std::tuple_cat(W_strides);
  params.bias = at<T>(bias);
  params.bias_g = bias_stride;
  params.add = at<T>(add);
  std::tie(params.add_g, params.add_m) = std::tuple_cat(add_strides);
  params.y = at<T>(y);
  std::tie(params.G, params.M, params.I, params.O) = std::tuple_cat(sizes);
  params.tanh = tanh;
  params.scratch = static_cast<T*>(scratch.get());
  const py::gil_scoped_release release;
  use_huge_pages(params.y, G * M * O);
  SSM_FAST_CALL(linear(params));
}

template <class T>
void linear_grad(Address grad_y, Strides<2> grad_strides, Address y, Strides<2> y_strides, Address x,
                 Strides<2> x_strides, Address W, Strides<3> W_strides, Address grad_x, Address grad_W,
                 Address grad_bias, Strides<4> sizes) {
  const auto [G, M, I, O] = sizes;
  LinearGrad<T> params{};
  const Index parts = SSM_FAST_CALL(linear_grad_parts(G, M, I, O, sizeof(T) == 8));
  params.threads = threads_for(double(G * M) * double(I * O), parts);
  const auto scratch = scratch_block<T>(SSM_FAST_CALL(linear_grad_scratch(G, M, I, O, params.threads, sizeof(T) == 8)));
  params.grad_y = at<T>(grad_y);
  std::tie(params.grad_g, params.grad_m) = std::tuple_cat(grad_strides);
  params.y = at<T>(y);
  std::tie(params.y_g, params.y_m) = std::tuple_cat(y_strides);
  params.x = at<T>(x);
  std::tie(params.x_g, params.x_m) = std::tuple_cat(x_strides);
  params.W = at<T>(W);
  std::tie(params.W_g, params.W_o, params.W_i) = std::tuple_cat(W_strides);
  params.grad_x = at<T>(grad_x);
  params.grad_W = at<T>(grad_W);
  params.grad_bias = at<T>(grad_bias);
  std::tie(params.G, params.M, params.I, params.O) = std::tuple_cat(sizes);
  params.scratch = static_cast<T*>(scratch.get());
  const py::gil_scoped_release release;
  use_huge_pages(params.grad_x, G * M * I);
  SSM_FAST_CALL(linear_grad(params));
}

template <class T>
void linear_tangent(Address x_t, Strides<2> xt_strides, Address W_t, Strides<3> Wt_strides, Address bias_t,
                    Index bias_stride, Address x, Strides<2> x_strides, Address W, Strides<3> W_strides, Address y,
                    Strides<2> y_strides, Address grad_y, Strides<2> grad_strides, Address y_t, Address turn,
                    Strides<4> sizes) {
  const auto [G, M, I, O] = sizes;
  LinearTangent<T> params{};
  params.threads = linear_threads(G * M, double(I * O));
  const auto scratch = scratch_block<T>(params.threads * SSM_FAST_CALL(linear_scratch(I, O, sizeof(T) == 8)));
  params.x_t = at<T>(x_t);
  std::tie(params.xt_g, params.xt_m) = std::tuple_cat(xt_strides);
  params.W_t = at<T>(W_t);
  std::tie(params.Wt_g, params.Wt_o, params.Wt_i) = std::tuple_cat(Wt_strides);
  params.bias_t = at<T>(bias_t);
  params.bias_g = bias_stride;
  params.x = at<T>(x);
  std::tie(params.x_g, params.x_m) = std::tuple_cat(x_strides);
  params.W = at<T>(W);
  std::tie(params.W_g, params.W_o, params.W_i) = std::tuple_cat(W_strides);
  params.y = at<T>(y);
  std::tie(params.y_g, params.y_m) = std::tuple_cat(y_strides);
  params.grad_y = at<T>(grad_y);
  std::tie(params.grad_g, params.grad_m) = std::tuple_cat(grad_strides);
  params.y_t = at<T>(y_t);
  params.turn = at<T>(turn);
  std::tie(params.G, params.M, params.I, params.O) = std::tuple_cat(sizes);
  params.scratch = static_cast<T*>(scratch.get());
  const py::gil_scoped_release release;
  use_huge_pages(params.y_t, G * M * O);
  use_huge_pages(params.turn, G * M * O);
  SSM_FAST_CALL(linear_tangent(params));
}

}  // namespace

void bind_ops(py::module_& m) {
  m.def("dense_scan_float32", &dense_scan<float>);
  m.def("dense_scan_float64", &dense_scan<double>);
  py::enum_<Sweep>(m, "Sweep")
      .value("forward", Sweep::forward)
      .value("tangent", Sweep::tangent)
      .value("adjoint", Sweep::adjoint);
  m.def("norm_scan_float32", &norm_scan<float>);
  m.def("norm_scan_float64", &norm_scan<double>);
  m.def("weight_grad_float32", &weight_grad<float>);
  m.def("weight_grad_float64", &weight_grad<double>);
  m.def("linear_scan_float32", &linear_scan<float>);
  m.def("linear_scan_float64", &linear_scan<double>);
  m.def("linear_scan_complex64", &linear_scan<Complex<float>>);
  m.def("linear_scan_complex128", &linear_scan<Complex<double>>);
  m.def("gae_float32", &gae<float>);
  m.def("gae_float64", &gae<double>);
  m.def("discounted_returns_float32", &discounted_returns<float>);
  m.def("discounted_returns_float64", &discounted_returns<double>);
  m.def("output_norm_float32", &output_norm<float>);
  m.def("output_norm_float64", &output_norm<double>);
  m.def("output_norm_grad_float32", &output_norm_grad<float>);
  m.def("output_norm_grad_float64", &output_norm_grad<double>);
  m.def("linear_float32", &linear<float>);
  m.def("linear_float64", &linear<double>);
  m.def("linear_grad_float32", &linear_grad<float>);
  m.def("linear_grad_float64", &linear_grad<double>);
  m.def("linear_tangent_float32", &linear_tangent<float>);
  m.def("linear_tangent_float64", &linear_tangent<double>);
}

}  // namespace ssm_fast
