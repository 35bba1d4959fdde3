// What a kernel is called with, and the kernels of each instruction set; `launch` (../launch.h) calls them.
//
// Sizes and strides count elements. A null pointer stands for an argument that was left out.
// Kernels trust their arguments: ssm_fast/ops validates before it calls.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ssm_fast {

using Index = std::int64_t;

// A tensor: its first element and the strides of N dimensions. Further dimensions are contiguous.
template <class T, std::size_t N>
struct View {
  T* data = nullptr;
  Index strides[N] = {};

  // The element at these indices, zero for those left out; null if the view is. Inlined by force, because the linker
  // must not merge the copies of different instruction sets.
  template <class... Indices>
  __attribute__((always_inline)) T* at(Indices... indices) const {
    static_assert(sizeof...(Indices) <= N);
    const Index given[] = {Index(indices)...};
    Index offset = 0;
    for (std::size_t i = 0; i < sizeof...(Indices); ++i) offset += given[i] * strides[i];
    return data ? data + offset : nullptr;
  }
  __attribute__((always_inline)) explicit operator bool() const { return data != nullptr; }
};

template <class T, std::size_t N>
using In = View<const T, N>;
using Flags = View<const std::uint8_t, 3>;  // [G, B, T]

// What `launch` adds to the arguments of a kernel.
template <class T>
struct Launch {
  int threads = 1;
  T* scratch = nullptr;  // as the kernel's Cost says, aligned to 64 bytes
};

// Multiply-adds of a call, the parts that threads can share, elements of scratch memory for each thread, and those
// behind them that all threads share.
struct Cost {
  double work;
  Index parts;
  Index per_thread = 0, shared = 0;
};

// s_t = A h_{t-1} + u_t with h_{t-1} = (1 - reset_t) s_{t-1}; in reverse, s_t = A h_{t+1} + u_t
// with h_{t+1} = (1 - reset_{t+1}) s_{t+1} and nothing incoming at the last step.
template <class T>
struct DenseScan : Launch<T> {
  In<T, 3> u;  // [G, B, T, N]
  In<T, 3> A;  // [G, N, N], any strides
  In<T, 2> s0;
  Flags reset;
  View<T, 3> s;
  Index G, B, T_len, N;
  bool reverse;
};

// The sweeps of norm_scan. With P(x) = x - mean(x) - n mean(x n):
//   forward: z_t = A h_{t-1} + u_t, n_t = (z_t - mean) rstd, s_t = n_t w + b
//   tangent: x_t = A h_{t-1} + u_t, s_t = c_t + w rstd P(x_t), where h are states s
//   adjoint: x_t = A h_{t+1} + u_t, s_t = c_t + rstd P(w x_t), in reverse
enum class Sweep { forward, tangent, adjoint };

template <class T>
struct NormScan : Launch<T> {
  In<T, 3> u, c, A;
  In<T, 1> weight, bias;
  View<T, 3> n;  // written by the forward sweep unless null, else read
  T* rstd;       // contiguous [G, B, T], as n
  In<T, 2> s0;
  Flags reset;
  View<T, 3> s, x;  // x is null in the forward sweep, and may be in the adjoint one
  Index G, B, T_len, N;
  T eps;
  Sweep sweep;
  T *weight_grad, *bias_grad;  // adjoint: sums over rows and time of x n and x, contiguous [G, N], or null
};

// grad[g] = sum over b and t of x_t h_t^T, with h the incoming states of a DenseScan.
template <class T>
struct WeightGrad : Launch<T> {
  In<T, 3> x, s;
  In<T, 2> s0;
  Flags reset;
  T* grad;  // contiguous [G, N, N]
  Index G, B, T_len, N;
  bool reverse;
};

// h_t = a_t h_{t-1} + b_t over [M, T, C]; in reverse, h_t = a_t h_{t+1} + b_t. With `shift` the
// coefficient of a step is that of the step before it in sweep order, and the first has none.
// Any strides are right; fast are those where time, M or C has stride 1 in b and h, and 0 or 1 in a.
template <class T>
struct LinearScan : Launch<T> {
  In<T, 3> a, b;
  In<T, 2> h0;  // [M, C]
  View<T, 3> h;
  Index M, T_len, C;
  bool reverse, shift;
};

template <class T>
struct Complex {
  T re, im;
};

// advantage_t = delta_t + gamma lambda (1 - terminated_t)(1 - truncated_t) advantage_{t+1}, contiguous [M, T, C].
template <class T>
struct Gae : Launch<T> {
  const T *rewards, *values, *next_values;
  const std::uint8_t *terminated, *truncated;
  T *advantages, *returns;
  Index M, T_len, C;
  T gamma, gae_lambda;
};

// G_t = r_t + gamma (1 - terminated_t) (truncated_t or last ? next_value_t : G_{t+1}), contiguous [M, T, C].
template <class T>
struct DiscountedReturns : Launch<T> {
  const T *rewards, *next_values;
  const std::uint8_t *terminated, *truncated;
  T* returns;
  Index M, T_len, C;
  T gamma;
};

// y = [residual +] [tanh] (LN(z) w + b) over rows of H; without a weight there is no norm.
template <class T>
struct OutputNorm : Launch<T> {
  In<T, 2> z;  // [G, M, H]
  In<T, 1> weight, bias;
  In<T, 2> residual;
  T* y;            // contiguous [G, M, H]
  T *mean, *rstd;  // contiguous [G, M], or null
  Index G, M, H;
  T eps;
  bool tanh;
};

// Gradients of OutputNorm; that of the residual is grad_y itself.
template <class T>
struct OutputNormGrad : Launch<T> {
  In<T, 2> grad_y, z;
  In<T, 1> weight, bias;
  const T *mean, *rstd;
  T* grad_z;                   // contiguous [G, M, H]
  T *grad_weight, *grad_bias;  // contiguous [G, H], null without a weight
  Index G, M, H;
  bool tanh;
};

// The tangent of OutputNorm, [residual_t +] [(1 - t^2)] (n_t w + n w_t + b_t), for M rows, contiguous.
template <class T>
struct OutputNormTangent : Launch<T> {
  const T *z, *z_t;                            // [M, H]
  const T *weight, *weight_t, *bias, *bias_t;  // [H], or null: no norm
  const T *mean, *rstd;                        // [M]
  const T* residual_t;                         // [M, H], or null
  T* y_t;                                      // [M, H]
  Index M, H;
  bool tanh;
};

// The tangents of the gradients of OutputNorm, where both that of y and z have one.
template <class T>
struct OutputNormGradTangent : Launch<T> {
  const T *grad_y, *grad_y_t, *z, *z_t;        // [M, H]
  const T *weight, *weight_t, *bias, *bias_t;  // [H], or null: no norm
  const T *mean, *rstd;                        // [M]
  T* grad_z_t;                                 // [M, H]
  T *grad_weight_t, *grad_bias_t;              // [H], null without a weight
  Index M, H;
  bool tanh;
};

// y = [tanh] (x W^T + b), or (x W^T + add), over the M rows of each group.
template <class T>
struct Linear : Launch<T> {
  In<T, 2> x;     // [G, M, I]
  In<T, 3> W;     // [G, O, I], any strides
  In<T, 1> bias;  // [G, O], or null
  In<T, 2> add;   // [G, M, O], or null; not with a bias
  T* y;           // contiguous [G, M, O]
  Index G, M, I, O;
  bool tanh;
};

// Gradients of Linear. With y there was a tanh: the gradient before it is z = grad_y (1 - y^2), else grad_y.
template <class T>
struct LinearGrad : Launch<T> {
  In<T, 2> grad_y;
  In<T, 2> y;  // or null
  In<T, 2> x;
  In<T, 3> W;
  T *grad_x, *grad_W, *grad_bias;  // z W, z^T x and the sum of z, contiguous; null where not wanted
  Index G, M, I, O;
};

// The tangent y_t = (x_t W^T + x W_t^T + b_t) (1 - y^2), the last factor only with y.
template <class T>
struct LinearTangent : Launch<T> {
  In<T, 2> x_t;  // null as W_t and bias_t where there is none
  In<T, 3> W_t;
  In<T, 1> bias_t;
  In<T, 2> x;
  In<T, 3> W;
  In<T, 2> y;       // or null
  In<T, 2> grad_y;  // or null; with y
  T* y_t;           // contiguous [G, M, O]
  T* curvature;     // -2 y grad_y (x_t W^T + x W_t^T + b_t), contiguous [G, M, O]; with grad_y, else null
  Index G, M, I, O;
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
struct NetworkStep : Launch<T> {
  const StepInstruction* program;
  int instructions;
  const Index* features;  // of each register; the first holds the observations
  int registers;
  Index parameters;                  // elements of all of them
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
};

// A step of Adam on P parameters, each with a learning rate of its own.
template <class T>
struct Adam {
  T *w, *m, *v;
  const T *grad, *lr_scales;
  Index P;
  T scale;       // of the gradient
  T rate, root;  // the learning rate over 1 - beta1^n, and the root of 1 - beta2^n, of the n-th step
  T beta1, beta2, eps;
};

// Every kernel, in the namespace of every instruction set.
#define SSM_FAST_DECLARE_OP(Op) \
  Cost cost(const Op&);         \
  void run(const Op&);
#define SSM_FAST_DECLARE_REAL(Op) \
  SSM_FAST_DECLARE_OP(Op<float>)  \
  SSM_FAST_DECLARE_OP(Op<double>)
#define SSM_FAST_DECLARE(isa)                      \
  namespace isa {                                  \
  SSM_FAST_DECLARE_REAL(DenseScan)                 \
  SSM_FAST_DECLARE_REAL(NormScan)                  \
  SSM_FAST_DECLARE_REAL(WeightGrad)                \
  SSM_FAST_DECLARE_REAL(LinearScan)                \
  SSM_FAST_DECLARE_OP(LinearScan<Complex<float>>)  \
  SSM_FAST_DECLARE_OP(LinearScan<Complex<double>>) \
  SSM_FAST_DECLARE_REAL(Gae)                       \
  SSM_FAST_DECLARE_REAL(DiscountedReturns)         \
  SSM_FAST_DECLARE_REAL(OutputNorm)                \
  SSM_FAST_DECLARE_REAL(OutputNormGrad)            \
  SSM_FAST_DECLARE_REAL(OutputNormTangent)         \
  SSM_FAST_DECLARE_REAL(OutputNormGradTangent)     \
  SSM_FAST_DECLARE_REAL(Linear)                    \
  SSM_FAST_DECLARE_REAL(LinearGrad)                \
  SSM_FAST_DECLARE_REAL(LinearTangent)             \
  SSM_FAST_DECLARE_REAL(NetworkStep)               \
  void adam(const Adam<float>&);                   \
  void adam(const Adam<double>&);                  \
  double squared_norm(const float* x, Index P);    \
  double squared_norm(const double* x, Index P);   \
  }
SSM_FAST_DECLARE(baseline)
SSM_FAST_DECLARE(avx2)
SSM_FAST_DECLARE(avx512)
#undef SSM_FAST_DECLARE

// Defines both of an op for a number type, by the templates `cost_of` and `compute` of its source.
#define SSM_FAST_DEFINE_OP(Op)                  \
  Cost cost(const Op& p) { return cost_of(p); } \
  void run(const Op& p) { compute(p); }
#define SSM_FAST_DEFINE_REAL(Op) \
  SSM_FAST_DEFINE_OP(Op<float>)  \
  SSM_FAST_DEFINE_OP(Op<double>)

}  // namespace ssm_fast
