#include "kernels.h"

namespace ssm_fast {
namespace {

int norm_threads(Index M, Index H) { return threads_for(double(M) * double(H) / 4, M); }

}  // namespace

template <class T>
T* Kernels<T>::scratch(Index elements) {
  if (elements > elements_) {
    memory_ = scratch_block<T>(elements);
    elements_ = elements;
  }
  return static_cast<T*>(memory_.get());
}

template <class T>
void Kernels<T>::linear(const T* x, const T* W, const T* bias, const T* add, bool tanh, T* y, Index M, Index I, Index O,
                        bool transposed) {
  Linear<T> p{};
  p.x = x, p.x_m = I;
  p.W = W, p.W_o = transposed ? 1 : I, p.W_i = transposed ? O : 1;
  p.bias = bias;
  p.add = add, p.add_m = O;
  p.y = y;
  p.G = 1, p.M = M, p.I = I, p.O = O;
  p.tanh = tanh;
  p.threads = linear_threads(M, double(I * O));
  p.scratch = scratch(p.threads * SSM_FAST_CALL(linear_scratch(I, O, sizeof(T) == 8)));
  SSM_FAST_CALL(linear(p));
}

template <class T>
void Kernels<T>::linear_grad(const T* grad, const T* y, const T* x, const T* W, T* grad_x, T* grad_W, T* grad_bias,
                             Index M, Index I, Index O) {
  LinearGrad<T> p{};
  p.grad_y = grad, p.grad_m = O;
  p.y = y, p.y_m = O;
  p.x = x, p.x_m = I;
  p.W = W, p.W_o = I, p.W_i = 1;
  p.grad_x = grad_x, p.grad_W = grad_W, p.grad_bias = grad_bias;
  p.G = 1, p.M = M, p.I = I, p.O = O;
  p.threads = threads_for(double(M) * double(I * O), SSM_FAST_CALL(linear_grad_parts(1, M, I, O, sizeof(T) == 8)));
  p.scratch = scratch(SSM_FAST_CALL(linear_grad_scratch(1, M, I, O, p.threads, sizeof(T) == 8)));
  SSM_FAST_CALL(linear_grad(p));
}

template <class T>
void Kernels<T>::linear_tangent(const T* x_t, const T* W_t, const T* bias_t, const T* x, const T* W, const T* y,
                                const T* grad, T* y_t, T* turn, Index M, Index I, Index O) {
  LinearTangent<T> p{};
  p.x_t = x_t, p.xt_m = I;
  p.W_t = W_t, p.Wt_o = I, p.Wt_i = 1;
  p.bias_t = bias_t;
  p.x = x, p.x_m = I;
  p.W = W, p.W_o = I, p.W_i = 1;
  p.y = y, p.y_m = O;
  p.grad_y = grad, p.grad_m = O;
  p.y_t = y_t, p.turn = turn;
  p.G = 1, p.M = M, p.I = I, p.O = O;
  p.threads = linear_threads(M, 2.0 * double(I * O));
  p.scratch = scratch(p.threads * SSM_FAST_CALL(linear_scratch(I, O, sizeof(T) == 8)));
  SSM_FAST_CALL(linear_tangent(p));
}

template <class T>
void Kernels<T>::sweep(const T* u, const T* A, bool adjoint, const T* s0, const std::uint8_t* reset, T* s, Index B,
                       Index T_len, Index N) {
  DenseScan<T> p{};
  p.u = u, p.u_b = T_len * N, p.u_t = N;
  p.A = A, p.A_row = adjoint ? 1 : N, p.A_col = adjoint ? N : 1;
  p.s0 = s0, p.s0_b = N;
  p.reset = reset, p.reset_b = T_len, p.reset_t = 1;
  p.s = s, p.s_b = T_len * N, p.s_t = N;
  p.G = 1, p.B = B, p.T_len = T_len, p.N = N;
  p.reverse = adjoint;
  p.threads = threads_for(double(B * T_len) * double(N * N), SSM_FAST_CALL(dense_scan_rows(1, B, T_len, N)));
  p.scratch = scratch(SSM_FAST_CALL(dense_scan_scratch(1, B, T_len, N, p.threads, sizeof(T) == 8)));
  SSM_FAST_CALL(dense_scan(p));
}

template <class T>
void Kernels<T>::norm_sweep(Sweep sweep, const T* u, const T* c, const T* A, const StateNorm& norm, const T* s0,
                            const std::uint8_t* reset, T* s, T* z, T* sum_zn, T* sum_z, Index B, Index T_len, Index N) {
  const bool adjoint = sweep == Sweep::adjoint;
  NormScan<T> p{};
  p.u = u, p.u_b = T_len * N, p.u_t = N;
  p.c = c, p.c_b = T_len * N, p.c_t = N;
  p.A = A, p.A_row = adjoint ? 1 : N, p.A_col = adjoint ? N : 1;
  p.weight = norm.weight, p.bias = sweep == Sweep::forward ? norm.bias : nullptr;
  p.n = norm.n, p.n_b = T_len * N, p.n_t = N;
  p.rstd = norm.rstd;
  p.s0 = s0, p.s0_b = N;
  p.reset = reset, p.reset_b = T_len, p.reset_t = 1;
  p.s = s, p.x = z, p.s_b = T_len * N, p.s_t = N;
  p.G = 1, p.B = B, p.T_len = T_len, p.N = N;
  p.eps = norm.eps;
  p.sweep = sweep;
  p.weight_grad = sum_zn, p.bias_grad = sum_z;
  p.threads = threads_for(double(B * T_len) * double(N * N), B);
  const Index work = SSM_FAST_CALL(norm_scan_scratch(N, sizeof(T) == 8)) * p.threads;
  const Index sums = sum_zn ? SSM_FAST_CALL(norm_scan_sums(1, B, N, sizeof(T) == 8)) : 0;
  p.scratch = scratch(work + sums);
  p.sums = sum_zn ? p.scratch + work : nullptr;
  SSM_FAST_CALL(norm_scan(p));
}

template <class T>
void Kernels<T>::weight_grad(const T* x, const T* s, const T* s0, const std::uint8_t* reset, T* grad, Index B,
                             Index T_len, Index N) {
  WeightGrad<T> p{};
  p.x = x, p.x_b = T_len * N, p.x_t = N;
  p.s = s, p.s_b = T_len * N, p.s_t = N;
  p.s0 = s0, p.s0_b = N;
  p.reset = reset, p.reset_b = T_len, p.reset_t = 1;
  p.grad = grad;
  p.G = 1, p.B = B, p.T_len = T_len, p.N = N;
  p.threads = threads_for(double(B * T_len) * double(N * N), B * T_len);
  p.scratch = scratch(SSM_FAST_CALL(weight_grad_scratch(1, B, T_len, N, sizeof(T) == 8)));
  SSM_FAST_CALL(weight_grad(p));
}

template <class T>
void Kernels<T>::output_norm(const T* z, const Norm& norm, const T* residual, T* y, Index M, Index H) {
  OutputNorm<T> p{};
  p.z = z, p.z_m = H;
  p.weight = norm.weight, p.bias = norm.bias;
  p.residual = residual, p.residual_m = H;
  p.y = y, p.mean = norm.mean, p.rstd = norm.rstd;
  p.G = 1, p.M = M, p.H = H;
  p.eps = norm.eps;
  p.tanh = true;
  p.threads = norm_threads(M, H);
  SSM_FAST_CALL(output_norm(p));
}

template <class T>
void Kernels<T>::output_norm_grad(const T* grad_y, const T* z, const Norm& norm, T* grad_z, T* grad_weight,
                                  T* grad_bias, Index M, Index H) {
  OutputNormGrad<T> p{};
  p.grad_y = grad_y, p.grad_m = H;
  p.z = z, p.z_m = H;
  p.weight = norm.weight, p.bias = norm.bias;
  p.mean = norm.mean, p.rstd = norm.rstd;
  p.grad_z = grad_z, p.grad_weight = grad_weight, p.grad_bias = grad_bias;
  p.G = 1, p.M = M, p.H = H;
  p.tanh = true;
  p.threads = norm_threads(M, H);
  p.scratch = scratch(SSM_FAST_CALL(output_norm_scratch(1, M, H, sizeof(T) == 8)));
  SSM_FAST_CALL(output_norm_grad(p));
}

template <class T>
void Kernels<T>::output_norm_tangent(const T* z, const T* z_t, const Norm& norm, const T* weight_t, const T* bias_t,
                                     const T* residual_t, T* y_t, Index M, Index H) {
  OutputNormTangent<T> p{};
  p.z = z, p.z_t = z_t;
  p.weight = norm.weight, p.weight_t = weight_t, p.bias = norm.bias, p.bias_t = bias_t;
  p.mean = norm.mean, p.rstd = norm.rstd;
  p.residual_t = residual_t;
  p.y_t = y_t;
  p.M = M, p.H = H;
  p.tanh = true;
  p.threads = norm_threads(M, H);
  SSM_FAST_CALL(output_norm_tangent(p));
}

template <class T>
void Kernels<T>::output_norm_grad_tangent(const T* grad_y, const T* grad_y_t, const T* z, const T* z_t,
                                          const Norm& norm, const T* weight_t, const T* bias_t, T* grad_z_t,
                                          T* grad_weight_t, T* grad_bias_t, Index M, Index H) {
  OutputNormGradTangent<T> p{};
  p.grad_y = grad_y, p.grad_y_t = grad_y_t, p.z = z, p.z_t = z_t;
  p.weight = norm.weight, p.weight_t = weight_t, p.bias = norm.bias, p.bias_t = bias_t;
  p.mean = norm.mean, p.rstd = norm.rstd;
  p.grad_z_t = grad_z_t, p.grad_weight_t = grad_weight_t, p.grad_bias_t = grad_bias_t;
  p.M = M, p.H = H;
  p.tanh = true;
  p.threads = norm_threads(M, H);
  p.scratch = scratch(SSM_FAST_CALL(output_norm_tangent_scratch(M, H, sizeof(T) == 8)));
  SSM_FAST_CALL(output_norm_grad_tangent(p));
}

template class Kernels<float>;
template class Kernels<double>;

}  // namespace ssm_fast
