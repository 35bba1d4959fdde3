// The ops of each dtype, by the names that ssm_fast/ops/dispatch.py looks up.
#include <string>

#include "../launch.h"
#include "bindings.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ssm_fast {
namespace {

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
struct Output {
  T* data;
  Index elements;
};
template <class T>
Output<T> output(T* data, Index elements) {
  return {data, elements};
}
template <class T>
Output<T> output(const View<T, 3>& x, const Sizes<4>& sizes) {
  Index end = sizes[3];
  for (std::size_t i = 0; i < 3; ++i) end += (sizes[i] - 1) * x.strides[i];
  return {x.data, end};
}

// Runs a kernel whose large outputs these are.
template <template <class> class Op, class T, class... Outputs>
void call(const Op<T>& op, const Outputs&... outputs) {
  const py::gil_scoped_release release;
  (use_huge_pages(outputs.data, outputs.elements), ...);
  Scratch scratch;
  launch(op, scratch);
}

template <class T>
struct Bindings {
  using Out = View<T, 1>;  // contiguous

  static void dense_scan(In<T, 3> u, In<T, 3> A, In<T, 2> s0, Flags reset, View<T, 3> s, Sizes<4> sizes, bool reverse) {
    const auto [G, B, T_len, N] = sizes;
    call(DenseScan<T>{{}, u, A, s0, reset, s, G, B, T_len, N, reverse}, output(s, sizes));
  }

  static void norm_scan(Sweep sweep, In<T, 3> u, In<T, 3> c, In<T, 3> A, In<T, 1> weight, In<T, 1> bias, View<T, 3> n,
                        Out rstd, In<T, 2> s0, Flags reset, View<T, 3> s, View<T, 3> x, Sizes<4> sizes, double eps,
                        Out weight_grad, Out bias_grad) {
    const auto [G, B, T_len, N] = sizes;
    const NormScan<T> op{{},    u, c,      A,     weight,           bias,          n, rstd.data, s0, reset, s, x, G, B,
                         T_len, N, T(eps), sweep, weight_grad.data, bias_grad.data};
    const auto states = output(n, sizes);
    call(op, output(s, sizes), output(x, sizes), output(states.data, sweep == Sweep::forward ? states.elements : 0));
  }

  static void weight_grad(In<T, 3> x, In<T, 3> s, In<T, 2> s0, Flags reset, Out grad, Sizes<4> sizes, bool reverse) {
    const auto [G, B, T_len, N] = sizes;
    call(WeightGrad<T>{{}, x, s, s0, reset, grad.data, G, B, T_len, N, reverse});
  }

  static void linear_scan(In<T, 3> a, In<T, 3> b, In<T, 2> h0, View<T, 3> h, Sizes<3> sizes, bool reverse, bool shift) {
    const auto [M, T_len, C] = sizes;
    call(LinearScan<T>{{}, a, b, h0, h, M, T_len, C, reverse, shift}, output(h.data, M * T_len * C));
  }

  static void gae(In<T, 1> rewards, In<T, 1> values, In<T, 1> next_values, View<const std::uint8_t, 1> terminated,
                  View<const std::uint8_t, 1> truncated, Out advantages, Out returns, Sizes<3> sizes, double gamma,
                  double gae_lambda) {
    const auto [M, T_len, C] = sizes;
    const Gae<T> op{
        {}, rewards.data, values.data, next_values.data, terminated.data, truncated.data, advantages.data, returns.data,
        M,  T_len,        C,           T(gamma),         T(gae_lambda)};
    call(op, output(advantages.data, M * T_len * C), output(returns.data, M * T_len * C));
  }

  static void discounted_returns(In<T, 1> rewards, In<T, 1> next_values, View<const std::uint8_t, 1> terminated,
                                 View<const std::uint8_t, 1> truncated, Out returns, Sizes<3> sizes, double gamma) {
    const auto [M, T_len, C] = sizes;
    const DiscountedReturns<T> op{
        {}, rewards.data, next_values.data, terminated.data, truncated.data, returns.data, M, T_len, C, T(gamma)};
    call(op, output(returns.data, M * T_len * C));
  }

  static void output_norm(In<T, 2> z, In<T, 1> weight, In<T, 1> bias, In<T, 2> residual, Out y, Out mean, Out rstd,
                          Sizes<3> sizes, double eps, bool tanh) {
    const auto [G, M, H] = sizes;
    call(OutputNorm<T>{{}, z, weight, bias, residual, y.data, mean.data, rstd.data, G, M, H, T(eps), tanh});
  }

  static void output_norm_grad(In<T, 2> grad_y, In<T, 2> z, In<T, 1> weight, In<T, 1> bias, Out mean, Out rstd,
                               Out grad_z, Out grad_weight, Out grad_bias, Sizes<3> sizes, bool tanh) {
    const auto [G, M, H] = sizes;
    call(OutputNormGrad<T>{{},
                           grad_y,
                           z,
                           weight,
                           bias,
                           mean.data,
                           rstd.data,
                           grad_z.data,
                           grad_weight.data,
                           grad_bias.data,
                           G,
                           M,
                           H,
                           tanh});
  }

  static void linear(In<T, 2> x, In<T, 3> W, In<T, 1> bias, In<T, 2> add, Out y, Sizes<4> sizes, bool tanh) {
    const auto [G, M, I, O] = sizes;
    call(Linear<T>{{}, x, W, bias, add, y.data, G, M, I, O, tanh}, output(y.data, G * M * O));
  }

  static void linear_grad(In<T, 2> grad_y, In<T, 2> y, In<T, 2> x, In<T, 3> W, Out grad_x, Out grad_W, Out grad_bias,
                          Sizes<4> sizes) {
    const auto [G, M, I, O] = sizes;
    call(LinearGrad<T>{{}, grad_y, y, x, W, grad_x.data, grad_W.data, grad_bias.data, G, M, I, O},
         output(grad_x.data, G * M * I));
  }

  static void linear_tangent(In<T, 2> x_t, In<T, 3> W_t, In<T, 1> bias_t, In<T, 2> x, In<T, 3> W, In<T, 2> y,
                             In<T, 2> grad_y, Out y_t, Out curvature, Sizes<4> sizes) {
    const auto [G, M, I, O] = sizes;
    call(LinearTangent<T>{{}, x_t, W_t, bias_t, x, W, y, grad_y, y_t.data, curvature.data, G, M, I, O},
         output(y_t.data, G * M * O), output(curvature.data, G * M * O));
  }

  static void bind(py::module_& m, const std::string& dtype) {
    m.def(("dense_scan_" + dtype).c_str(), &dense_scan);
    m.def(("norm_scan_" + dtype).c_str(), &norm_scan);
    m.def(("weight_grad_" + dtype).c_str(), &weight_grad);
    m.def(("linear_scan_" + dtype).c_str(), &linear_scan);
    m.def(("gae_" + dtype).c_str(), &gae);
    m.def(("discounted_returns_" + dtype).c_str(), &discounted_returns);
    m.def(("output_norm_" + dtype).c_str(), &output_norm);
    m.def(("output_norm_grad_" + dtype).c_str(), &output_norm_grad);
    m.def(("linear_" + dtype).c_str(), &linear);
    m.def(("linear_grad_" + dtype).c_str(), &linear_grad);
    m.def(("linear_tangent_" + dtype).c_str(), &linear_tangent);
  }
};

}  // namespace

void bind_ops(py::module_& m) {
  py::enum_<Sweep>(m, "Sweep")
      .value("forward", Sweep::forward)
      .value("tangent", Sweep::tangent)
      .value("adjoint", Sweep::adjoint);
  Bindings<float>::bind(m, "float32");
  Bindings<double>::bind(m, "float64");
  m.def("linear_scan_complex64", &Bindings<Complex<float>>::linear_scan);
  m.def("linear_scan_complex128", &Bindings<Complex<double>>::linear_scan);
}

}  // namespace ssm_fast
