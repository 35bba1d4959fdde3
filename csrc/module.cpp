// Python bindings: addresses, sizes and strides in, nothing of torch's ABI.
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

#include "calls.h"
#include "ppo_epoch.h"
#include "task_gradients.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace py = pybind11;

namespace ssm_fast {
namespace {

using Address = std::uintptr_t;
template <std::size_t N>
using Strides = std::array<Index, N>;

constexpr Index kParallelRows = 16;  // rows of a policy step that are worth a thread

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

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

// `weights` holds the encoder's, the actor's and the critic's weight and bias, log_std, and seven a layer. Returns
// whether values and log-probabilities are finite.
template <class T>
bool policy_step(Address x, Address obs_mean, Address obs_var, double obs_eps, double obs_clip, Address state,
                 Address reset, Address noise, const std::vector<Address>& weights, Address action, Address log_prob,
                 Address value, Address next_state, Strides<8> sizes, bool norm_state, bool residual, double eps) {
  const Index G = sizes[0], B = sizes[1], I = sizes[2], H = sizes[3], N = sizes[4], L = sizes[5], K = sizes[6],
              W = sizes[7];
  const Index F = norm_state ? N : H;
  constexpr std::size_t kHeads = 12, kLayer = 7;
  const Index V = W ? W : H;  // what the critic's last layer reads
  const Index elements[kHeads + kLayer] = {H * I, H, K * H, K,     V, 1,     K,     W * I, W * H, W,
                                           W * W, W, N * N, N * H, N, H * N, H * H, F,     F};
  const auto weight_of = [&](std::size_t i, Index g) {
    T* first = at<T>(weights[i]);
    return first ? first + g * elements[i < kHeads ? i : kHeads + (i - kHeads) % kLayer] : nullptr;
  };
  std::vector<PolicyLayer<T>> layers;
  for (Index g = 0; g < G; ++g) {
    for (std::size_t i = kHeads; i < weights.size(); i += kLayer) {
      layers.push_back({weight_of(i, g), weight_of(i + 1, g), weight_of(i + 2, g), weight_of(i + 3, g),
                        weight_of(i + 4, g), weight_of(i + 5, g), weight_of(i + 6, g)});
    }
  }
  std::vector<PolicyWeights<T>> groups;
  for (Index g = 0; g < G; ++g) {
    groups.push_back({weight_of(0, g), weight_of(1, g), weight_of(2, g), weight_of(3, g), weight_of(4, g),
                      weight_of(5, g), weight_of(6, g), weight_of(7, g), weight_of(8, g), weight_of(9, g),
                      weight_of(10, g), weight_of(11, g), layers.data() + g * L});
  }
  const Index blocks = G * B / kParallelRows;
  const int threads = blocks < 2 ? 1 : threads_for(double(G * B * L) * double(H * H), blocks);
  const auto scratch = scratch_block<T>(SSM_FAST_CALL(policy_step_scratch(I, H, N, K, W, sizeof(T) == 8)) * threads);
  PolicyStep<T> params{};
  params.x = at<T>(x);
  params.obs_mean = at<double>(obs_mean);
  params.obs_var = at<double>(obs_var);
  params.obs_eps = obs_eps;
  params.obs_clip = obs_clip;
  params.state = at<T>(state);
  params.reset = at<std::uint8_t>(reset);
  params.noise = at<T>(noise);
  params.weights = groups.data();
  params.action = at<T>(action);
  params.log_prob = at<T>(log_prob);
  params.value = at<T>(value);
  params.next_state = at<T>(next_state);
  std::tie(params.G, params.B, params.I, params.H, params.N, params.L, params.K, params.W) = std::tuple_cat(sizes);
  params.norm_state = norm_state;
  params.residual = residual;
  params.eps = T(eps);
  params.threads = threads;
  params.scratch = static_cast<T*>(scratch.get());
  const py::gil_scoped_release release;
  SSM_FAST_CALL(policy_step(params));
  const auto all_finite = [&](const T* x) {
    return !x || std::all_of(x, x + G * B, [](T y) { return std::isfinite(y); });
  };
  return all_finite(params.value) && all_finite(params.log_prob);
}

// Addresses and sizes in the order of the structures in ppo_epoch.h.
template <class T>
Index bound_ppo_epoch(SequenceGradient<T>& gradient, const std::array<Address, 8>& rollout, Strides<2> sequences,
                      Address order, Strides<2> counts, const std::array<double, 3>& loss, bool clip_value_loss,
                      const std::array<Address, 2>& log_std, const std::array<Address, 5>& adam,
                      const std::vector<std::pair<Address, Index>>& values, const std::array<double, 5>& settings,
                      Index steps, Address figures) {
  const auto [x, actions, log_probs, old_values, returns, advantages, reset, state] = rollout;
  const RolloutSequences<T> r{at<T>(x),       at<T>(actions),    at<T>(log_probs),        at<T>(old_values),
                              at<T>(returns), at<T>(advantages), at<std::uint8_t>(reset), at<T>(state),
                              sequences[0],   sequences[1]};
  const auto [vector, vector_gradient, m, v, pace] = adam;
  const auto [learning_rate, beta1, beta2, eps, max_norm] = settings;
  AdamState<T> state_of_adam{at<T>(vector), at<T>(vector_gradient),
                             at<T>(m),      at<T>(v),
                             at<T>(pace),   {},
                             learning_rate, beta1,
                             beta2,         eps,
                             max_norm,      steps};
  for (const auto& [address, elements] : values) state_of_adam.values.emplace_back(at<T>(address), elements);
  const py::gil_scoped_release release;
  return ppo_epoch(gradient, r, at<std::int64_t>(order), counts[0], counts[1],
                   PpoLoss{loss[0], loss[1], loss[2], clip_value_loss}, at<T>(log_std[0]), at<T>(log_std[1]),
                   state_of_adam, at<double>(figures));
}

template <class T>
void bind_sequence_gradient(py::module_& m, const char* name) {
  using Gradient = SequenceGradient<T>;
  const auto pointers = [](const std::vector<Address>& addresses) {
    std::vector<T*> found;
    for (const Address address : addresses) found.push_back(at<T>(address));
    return found;
  };
  py::class_<Gradient>(m, name)
      .def(py::init([pointers](const std::vector<Address>& weights, const std::vector<Address>& gradients,
                               const Strides<6>& sizes, bool residual, double eps) {
        const auto [I, H, N, L, K, W] = sizes;
        return std::make_unique<Gradient>(pointers(weights), pointers(gradients),
                                          typename Gradient::Sizes{I, H, N, L, K, W}, residual, T(eps));
      }))
      .def("forward",
           [](Gradient& self, Address x, Address state, Address reset, Address mean, Address value, Index S,
              Index T_len) {
             const py::gil_scoped_release release;
             self.forward(at<T>(x), at<T>(state), at<std::uint8_t>(reset), at<T>(mean), at<T>(value), S, T_len);
           })
      .def("backward",
           [](Gradient& self, Address grad_mean, Address grad_value) {
             const py::gil_scoped_release release;
             self.backward(at<T>(grad_mean), at<T>(grad_value));
           })
      .def("ppo_epoch", &bound_ppo_epoch<T>);
}

// x, y, labels, actions, log_probs, advantages, s0, reset; B, T_len; clip_epsilon, largest_log_ratio
using ExamplesOfTask = std::tuple<std::array<Address, 8>, Strides<2>, std::array<double, 2>>;

template <class T>
std::vector<Examples<T>> examples_at(const std::vector<ExamplesOfTask>& tasks) {
  std::vector<Examples<T>> found;
  for (const auto& [addresses, sizes, ratio] : tasks) {
    const auto [x, y, labels, actions, log_probs, advantages, s0, reset] = addresses;
    found.push_back({at<T>(x), at<T>(y), at<std::int64_t>(labels), at<T>(actions), at<T>(log_probs), at<T>(advantages),
                     at<T>(s0), at<std::uint8_t>(reset), sizes[0], sizes[1], ratio[0], ratio[1]});
  }
  return found;
}

template <class T, class Sizes>
void task_gradients_of(const Sizes& network, Address weights, Address rates, const std::vector<ExamplesOfTask>& inner,
                       const std::vector<ExamplesOfTask>& outer, Address gradients, Address rate_gradients,
                       Address inner_losses, Address outer_losses, Index G, bool first_order) {
  const std::vector<Examples<T>> of_inner = examples_at<T>(inner), of_outer = examples_at<T>(outer);
  TaskGradients<T> p{};
  p.weights = at<T>(weights), p.rates = at<T>(rates);
  p.inner = of_inner.data(), p.outer = of_outer.data();
  p.gradients = at<T>(gradients), p.rate_gradients = at<T>(rate_gradients);
  p.inner_losses = at<double>(inner_losses), p.outer_losses = at<double>(outer_losses);
  p.G = G, p.K = Index(inner.size()) / G, p.P = weights_of(network);
  p.first_order = first_order;
  const py::gil_scoped_release release;
  task_gradients(p, network);
}

template <class T, class... Rest>
void state_space_gradients(Strides<4> sizes, Rest... rest) {
  const auto [I, N, H, O] = sizes;
  task_gradients_of<T>(StateSpaceSizes{I, N, H, O}, rest...);
}

template <class T, class... Rest>
void policy_gradients(Strides<5> sizes, const std::array<bool, 3>& has, double eps, Rest... rest) {
  const auto [I, H, N, L, O] = sizes;
  const auto [norm, residual, gaussian] = has;
  task_gradients_of<T>(PolicySizes{I, H, N, L, O, norm, residual, gaussian, eps}, rest...);
}

// The functions of a network's gradients: its own arguments, then those of all networks.
template <class T>
void bind_task_gradients(py::module_& m, const std::string& dtype) {
  using Tasks = const std::vector<ExamplesOfTask>&;
  m.def(("state_space_gradients_" + dtype).c_str(),
        &state_space_gradients<T, Address, Address, Tasks, Tasks, Address, Address, Address, Address, Index, bool>);
  m.def(("policy_gradients_" + dtype).c_str(),
        &policy_gradients<T, Address, Address, Tasks, Tasks, Address, Address, Address, Address, Index, bool>);
}

}  // namespace
}  // namespace ssm_fast

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
      py::handle(called)();
    };
  });
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
  bind_sequence_gradient<float>(m, "SequenceGradient_float32");
  bind_sequence_gradient<double>(m, "SequenceGradient_float64");
  bind_task_gradients<float>(m, "float32");
  bind_task_gradients<double>(m, "float64");
  m.def("policy_step_float32", &policy_step<float>);
  m.def("policy_step_float64", &policy_step<double>);
}
