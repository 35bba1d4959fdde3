// What the bindings hand to a kernel, and the kernels of each instruction set.
//
// Sizes and strides count elements. A null pointer stands for an argument that was left out.
// Kernels trust their arguments: ssm_fast/ops validates before it calls.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ssm_fast {

using Index = std::int64_t;

// s_t = A h_{t-1} + u_t with h_{t-1} = (1 - reset_t) s_{t-1}; in reverse, s_t = A h_{t+1} + u_t
// with h_{t+1} = (1 - reset_{t+1}) s_{t+1} and nothing incoming at the last step.
template <class T>
struct DenseScan {
  const T* u;
  Index u_g, u_b, u_t;
  const T* A;
  Index A_g, A_row, A_col;
  const T* s0;
  Index s0_g, s0_b;
  const std::uint8_t* reset;
  Index reset_g, reset_b, reset_t;
  T* s;
  Index s_g, s_b, s_t;
  Index G, B, T_len, N;
  bool reverse;
  int threads;
  T* scratch;  // dense_scan_scratch elements, aligned to 64 bytes
};

// The sweeps of norm_scan. With P(x) = x - mean(x) - n mean(x n):
//   forward: z_t = A h_{t-1} + u_t, n_t = (z_t - mean) rstd, s_t = n_t w + b
//   tangent: x_t = A h_{t-1} + u_t, s_t = c_t + w rstd P(x_t), where h are states s
//   adjoint: x_t = A h_{t+1} + u_t, s_t = c_t + rstd P(w x_t), in reverse
enum class Sweep { forward, tangent, adjoint };

template <class T>
struct NormScan {
  const T* u;
  Index u_g, u_b, u_t;
  const T* c;
  Index c_g, c_b, c_t;
  const T* A;
  Index A_g, A_row, A_col;
  const T* weight;
  Index weight_g;
  const T* bias;
  Index bias_g;
  T* n;  // written by the forward sweep unless null, else read
  Index n_g, n_b, n_t;
  T* rstd;  // contiguous [G, B, T], as n
  const T* s0;
  Index s0_g, s0_b;
  const std::uint8_t* reset;
  Index reset_g, reset_b, reset_t;
  T *s, *x;  // x is null in the forward sweep, and may be in the adjoint one
  Index s_g, s_b, s_t;
  Index G, B, T_len, N;
  T eps;
  Sweep sweep;
  int threads;
  T* scratch;                  // `threads` times norm_scan_scratch elements, aligned to 64 bytes
  T *weight_grad, *bias_grad;  // adjoint: sums over rows and time of x n and x, contiguous [G, N]
  T* sums;                     // their sums of each row, norm_scan_sums elements, or null: not wanted
};

// grad[g] = sum over b and t of x_t h_t^T, with h the incoming states of a DenseScan.
template <class T>
struct WeightGrad {
  const T* x;
  Index x_g, x_b, x_t;
  const T* s;
  Index s_g, s_b, s_t;
  const T* s0;
  Index s0_g, s0_b;
  const std::uint8_t* reset;
  Index reset_g, reset_b, reset_t;
  T* grad;  // contiguous [G, N, N]
  Index G, B, T_len, N;
  bool reverse;
  bool time_major;  // the order in which rows lie in memory
  int threads;
  T* scratch;  // weight_grad_scratch elements, aligned to 64 bytes
};

// h_t = a_t h_{t-1} + b_t over [M, T, C]; in reverse, h_t = a_t h_{t+1} + b_t. With `shift` the
// coefficient of a step is that of the step before it in sweep order, and the first has none.
// Any strides are right; fast are those where time, M or C has stride 1 in b and h, and 0 or 1 in a.
template <class T>
struct LinearScan {
  const T* a;
  Index a_m, a_t, a_c;
  const T* b;
  Index b_m, b_t, b_c;
  const T* h0;
  Index h0_m, h0_c;
  T* h;
  Index h_m, h_t, h_c;
  Index M, T_len, C;
  bool reverse, shift;
  int threads;
};

template <class T>
struct Complex {
  T re, im;
};

// advantage_t = delta_t + gamma lambda (1 - terminated_t)(1 - truncated_t) advantage_{t+1} over [M, T, C].
// All five inputs and both outputs share one layout; one of stride_t, and 1 for the columns, is contiguous.
template <class T>
struct Gae {
  const T *rewards, *values, *next_values;
  const std::uint8_t *terminated, *truncated;
  T *advantages, *returns;
  Index M, T_len, C;
  T gamma, gae_lambda;
  int threads;
};

// G_t = r_t + gamma (1 - terminated_t) (truncated_t or last ? next_value_t : G_{t+1}); layout as in Gae.
template <class T>
struct DiscountedReturns {
  const T *rewards, *next_values;
  const std::uint8_t *terminated, *truncated;
  T* returns;
  Index M, T_len, C;
  T gamma;
  int threads;
};

// y = [residual +] [tanh] (LN(z) w + b) over rows of H; without a weight there is no norm.
template <class T>
struct OutputNorm {
  const T* z;
  Index z_g, z_m;
  const T* weight;
  Index weight_g;
  const T* bias;
  Index bias_g;
  const T* residual;
  Index residual_g, residual_m;
  T* y;            // contiguous [G, M, H]
  T *mean, *rstd;  // contiguous [G, M], or null
  Index G, M, H;
  T eps;
  bool tanh;
  int threads;
};

// Gradients of OutputNorm; that of the residual is grad_y itself.
template <class T>
struct OutputNormGrad {
  const T* grad_y;
  Index grad_g, grad_m;
  const T* z;
  Index z_g, z_m;
  const T* weight;
  Index weight_g;
  const T* bias;
  Index bias_g;
  const T *mean, *rstd;
  T* grad_z;                   // contiguous [G, M, H]
  T *grad_weight, *grad_bias;  // contiguous [G, H], null without a weight
  Index G, M, H;
  bool tanh;
  int threads;
  T* scratch;  // output_norm_scratch elements, aligned to 64 bytes
};

// The tangent of OutputNorm, [residual_t +] [(1 - t^2)] (n_t w + n w_t + b_t), for M rows, contiguous.
template <class T>
struct OutputNormTangent {
  const T *z, *z_t;                            // [M, H]
  const T *weight, *weight_t, *bias, *bias_t;  // [H], or null: no norm
  const T *mean, *rstd;                        // [M]
  const T* residual_t;                         // [M, H], or null
  T* y_t;                                      // [M, H]
  Index M, H;
  bool tanh;
  int threads;
};

// The tangents of the gradients of OutputNorm, where both that of y and z have one.
template <class T>
struct OutputNormGradTangent {
  const T *grad_y, *grad_y_t, *z, *z_t;        // [M, H]
  const T *weight, *weight_t, *bias, *bias_t;  // [H], or null: no norm
  const T *mean, *rstd;                        // [M]
  T* grad_z_t;                                 // [M, H]
  T *grad_weight_t, *grad_bias_t;              // [H], null without a weight
  Index M, H;
  bool tanh;
  int threads;
  T* scratch;  // output_norm_tangent_scratch elements, aligned to 64 bytes
};

// y = [tanh] (x W^T + b), or (x W^T + add), over the M rows of each group.
template <class T>
struct Linear {
  const T* x;
  Index x_g, x_m;
  const T* W;
  Index W_g, W_o, W_i;
  const T* bias;  // or null
  Index bias_g;
  const T* add;  // or null; not with a bias
  Index add_g, add_m;
  T* y;  // contiguous [G, M, O]
  Index G, M, I, O;
  bool tanh;
  int threads;
  T* scratch;  // `threads` times linear_scratch elements
};

// Gradients of Linear. With y there was a tanh: the gradient before it is z = grad_y (1 - y^2), else grad_y.
template <class T>
struct LinearGrad {
  const T* grad_y;
  Index grad_g, grad_m;
  const T* y;  // or null
  Index y_g, y_m;
  const T* x;
  Index x_g, x_m;
  const T* W;
  Index W_g, W_o, W_i;
  T *grad_x, *grad_W, *grad_bias;  // z W, z^T x and the sum of z, contiguous; null where not wanted
  Index G, M, I, O;
  int threads;
  T* scratch;  // linear_grad_scratch elements
};

// The tangent y_t = (x_t W^T + x W_t^T + b_t) (1 - y^2), the last factor only with y.
template <class T>
struct LinearTangent {
  const T* x_t;  // null as W_t and bias_t where there is none
  Index xt_g, xt_m;
  const T* W_t;
  Index Wt_g, Wt_o, Wt_i;
  const T* bias_t;
  Index bias_g;
  const T* x;
  Index x_g, x_m;
  const T* W;
  Index W_g, W_o, W_i;
  const T* y;  // or null
  Index y_g, y_m;
  const T* grad_y;  // or null; with y
  Index grad_g, grad_m;
  T* y_t;   // contiguous [G, M, O]
  T* turn;  // -2 y grad_y (x_t W^T + x W_t^T + b_t), contiguous [G, M, O]; with grad_y, else null
  Index G, M, I, O;
  int threads;
  T* scratch;  // `threads` times linear_scratch elements
};

constexpr int kStepRegisters = 32;

// What a stage does to a block of rows. Registers hold rows of features; parameters are numbered, -1 for none.
enum class StepKind : std::uint8_t {
  load_state,  // to = the state [M], zero where an episode begins
  save_state,  // the next state [M] = to
  affine,      // to = W x [+ W2 x2] [+ bias]
  tanh,        // to = tanh(x)
  add_tanh,    // to += tanh(x)
  layer_norm,  // to = LN(to) W + bias
};
struct StepInstruction {
  StepKind kind;
  bool x2_is_state = false;  // x2 is left out where there is no state
  int to = -1, x = -1, x2 = -1;
  int W = -1, W2 = -1, bias = -1;
  Index M = 0, K = 0, K2 = 0;  // features of to, x and x2
  Index state = 0;             // elements of a sequence's state before this one
  double eps = 0;              // of the layer norm
};

// One step of a network without gradients, for B rows of each of G groups with weights of their own.
template <class T>
struct NetworkStep {
  const StepInstruction* program;
  int instructions;
  const Index* features;  // of each register; the first holds the observations
  int registers;
  const T* x;                        // [G B, I], contiguous as all that follow
  const double *obs_mean, *obs_var;  // [I], or null: x enters as it is
  double obs_eps, obs_clip;
  const T* state;                             // a block [G B, M] for each load_state, or null: zeros
  const std::uint8_t* reset;                  // [G B], or null
  const T* noise;                             // [G B, K], or null: the action is the mean
  const T* const* weights;                    // [G, P]
  T *action, *log_prob, *value, *next_state;  // [G B, K], [G B], [G B], as state
  Index G, B, I, K, P;
  int mean, value_register;  // registers
  int log_std;               // parameter, or -1: `action` holds the means (logits), no log_prob
  int threads;
  T* scratch;  // `threads` times network_step_scratch elements, aligned to 64 bytes
};

// A step of Adam on P parameters, each `pace` learning rates long.
template <class T>
struct Adam {
  T *w, *m, *v;
  const T *grad, *pace;
  Index P;
  T scale;       // of the gradient
  T rate, root;  // the learning rate over 1 - beta1^n, and the root of 1 - beta2^n, of the n-th step
  T beta1, beta2, eps;
};

#define SSM_FAST_DECLARE(isa)                                                                    \
  namespace isa {                                                                                \
  Index dense_scan_rows(Index G, Index B, Index T_len, Index N);                                 \
  Index dense_scan_scratch(Index G, Index B, Index T_len, Index N, int threads, bool is_double); \
  void dense_scan(const DenseScan<float>&);                                                      \
  void dense_scan(const DenseScan<double>&);                                                     \
  Index norm_scan_scratch(Index N, bool is_double);                                              \
  Index norm_scan_sums(Index G, Index B, Index N, bool is_double);                               \
  void norm_scan(const NormScan<float>&);                                                        \
  void norm_scan(const NormScan<double>&);                                                       \
  Index weight_grad_scratch(Index G, Index B, Index T_len, Index N, bool is_double);             \
  void weight_grad(const WeightGrad<float>&);                                                    \
  void weight_grad(const WeightGrad<double>&);                                                   \
  void linear_scan(const LinearScan<float>&);                                                    \
  void linear_scan(const LinearScan<double>&);                                                   \
  void linear_scan(const LinearScan<Complex<float>>&);                                           \
  void linear_scan(const LinearScan<Complex<double>>&);                                          \
  void gae(const Gae<float>&);                                                                   \
  void gae(const Gae<double>&);                                                                  \
  void discounted_returns(const DiscountedReturns<float>&);                                      \
  void discounted_returns(const DiscountedReturns<double>&);                                     \
  Index output_norm_scratch(Index G, Index M, Index H, bool is_double);                          \
  void output_norm(const OutputNorm<float>&);                                                    \
  void output_norm(const OutputNorm<double>&);                                                   \
  void output_norm_grad(const OutputNormGrad<float>&);                                           \
  void output_norm_grad(const OutputNormGrad<double>&);                                          \
  Index output_norm_tangent_scratch(Index M, Index H, bool is_double);                           \
  void output_norm_tangent(const OutputNormTangent<float>&);                                     \
  void output_norm_tangent(const OutputNormTangent<double>&);                                    \
  void output_norm_grad_tangent(const OutputNormGradTangent<float>&);                            \
  void output_norm_grad_tangent(const OutputNormGradTangent<double>&);                           \
  Index linear_scratch(Index I, Index O, bool is_double);                                        \
  Index linear_grad_parts(Index G, Index M, Index I, Index O, bool is_double);                   \
  Index linear_grad_scratch(Index G, Index M, Index I, Index O, int threads, bool is_double);    \
  void linear(const Linear<float>&);                                                             \
  void linear(const Linear<double>&);                                                            \
  void linear_grad(const LinearGrad<float>&);                                                    \
  void linear_grad(const LinearGrad<double>&);                                                   \
  void linear_tangent(const LinearTangent<float>&);                                              \
  void linear_tangent(const LinearTangent<double>&);                                             \
  Index network_step_scratch(const Index* features, int registers, bool is_double);              \
  void network_step(const NetworkStep<float>&);                                                  \
  void network_step(const NetworkStep<double>&);                                                 \
  void adam(const Adam<float>&);                                                                 \
  void adam(const Adam<double>&);                                                                \
  double squared_norm(const float* x, Index P);                                                  \
  double squared_norm(const double* x, Index P);                                                 \
  }
SSM_FAST_DECLARE(baseline)
SSM_FAST_DECLARE(avx2)
SSM_FAST_DECLARE(avx512)
#undef SSM_FAST_DECLARE

}  // namespace ssm_fast
