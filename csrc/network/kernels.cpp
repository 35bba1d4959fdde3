#include "kernels.h"

namespace ssm_fast {
namespace {

// Views of contiguous arrays: rows [M, I], sequences [B, T, N] and their states [B, N], and matrices.
template <class T>
View<T, 2> rows(T* x, Index I) {
  return {x, {0, I}};
}
template <class T>
View<T, 3> sequences(T* x, Index T_len, Index N) {
  return {x, {0, T_len * N, N}};
}
template <class T>
In<T, 3> matrix(const T* W, Index I) {
  return {W, {0, I, 1}};
}
template <class T>
In<T, 3> transposed(const T* W, Index I) {
  return {W, {0, 1, I}};
}

}  // namespace

template <class T>
void Kernels<T>::linear(const T* x, const T* W, const T* bias, const T* add, bool tanh, T* y, Index M, Index I, Index O,
                        bool transpose) {
  const In<T, 3> weights = transpose ? transposed(W, O) : matrix(W, I);
  launch(Linear<T>{{}, rows(x, I), weights, {bias}, rows(add, O), y, 1, M, I, O, tanh}, scratch_);
}

template <class T>
void Kernels<T>::linear_grad(const T* grad, const T* y, const T* x, const T* W, T* grad_x, T* grad_W, T* grad_bias,
                             Index M, Index I, Index O) {
  launch(LinearGrad<T>{{}, rows(grad, O), rows(y, O), rows(x, I), matrix(W, I), grad_x, grad_W, grad_bias, 1, M, I, O},
         scratch_);
}

template <class T>
void Kernels<T>::linear_tangent(const T* x_t, const T* W_t, const T* bias_t, const T* x, const T* W, const T* y,
                                const T* grad, T* y_t, T* curvature, Index M, Index I, Index O) {
  launch(LinearTangent<T>{{},
                          rows(x_t, I),
                          matrix(W_t, I),
                          {bias_t},
                          rows(x, I),
                          matrix(W, I),
                          rows(y, O),
                          rows(grad, O),
                          y_t,
                          curvature,
                          1,
                          M,
                          I,
                          O},
         scratch_);
}

template <class T>
void Kernels<T>::sweep(const T* u, const T* A, bool adjoint, const T* s0, const std::uint8_t* reset, T* s, Index B,
                       Index T_len, Index N) {
  launch(DenseScan<T>{{},
                      sequences(u, T_len, N),
                      adjoint ? transposed(A, N) : matrix(A, N),
                      rows(s0, N),
                      sequences(reset, T_len, 1),
                      sequences(s, T_len, N),
                      1,
                      B,
                      T_len,
                      N,
                      adjoint},
         scratch_);
}

template <class T>
void Kernels<T>::norm_sweep(Sweep sweep, const T* u, const T* c, const T* A, const StateNorm& norm, const T* s0,
                            const std::uint8_t* reset, T* s, T* z, T* sum_zn, T* sum_z, Index B, Index T_len, Index N) {
  launch(NormScan<T>{{},
                     sequences(u, T_len, N),
                     sequences(c, T_len, N),
                     sweep == Sweep::adjoint ? transposed(A, N) : matrix(A, N),
                     {norm.weight},
                     {sweep == Sweep::forward ? norm.bias : nullptr},
                     sequences(norm.n, T_len, N),
                     norm.rstd,
                     rows(s0, N),
                     sequences(reset, T_len, 1),
                     sequences(s, T_len, N),
                     sequences(z, T_len, N),
                     1,
                     B,
                     T_len,
                     N,
                     norm.eps,
                     sweep,
                     sum_zn,
                     sum_z},
         scratch_);
}

template <class T>
void Kernels<T>::weight_grad(const T* x, const T* s, const T* s0, const std::uint8_t* reset, T* grad, Index B,
                             Index T_len, Index N) {
  launch(WeightGrad<T>{{},
                       sequences(x, T_len, N),
                       sequences(s, T_len, N),
                       rows(s0, N),
                       sequences(reset, T_len, 1),
                       grad,
                       1,
                       B,
                       T_len,
                       N,
                       false},
         scratch_);
}

template <class T>
void Kernels<T>::output_norm(const T* z, const Norm& norm, const T* residual, T* y, Index M, Index H) {
  launch(OutputNorm<T>{{},
                       rows(z, H),
                       {norm.weight},
                       {norm.bias},
                       rows(residual, H),
                       y,
                       norm.mean,
                       norm.rstd,
                       1,
                       M,
                       H,
                       norm.eps,
                       true},
         scratch_);
}

template <class T>
void Kernels<T>::output_norm_grad(const T* grad_y, const T* z, const Norm& norm, T* grad_z, T* grad_weight,
                                  T* grad_bias, Index M, Index H) {
  launch(OutputNormGrad<T>{{},
                           rows(grad_y, H),
                           rows(z, H),
                           {norm.weight},
                           {norm.bias},
                           norm.mean,
                           norm.rstd,
                           grad_z,
                           grad_weight,
                           grad_bias,
                           1,
                           M,
                           H,
                           true},
         scratch_);
}

template <class T>
void Kernels<T>::output_norm_tangent(const T* z, const T* z_t, const Norm& norm, const T* weight_t, const T* bias_t,
                                     const T* residual_t, T* y_t, Index M, Index H) {
  launch(
      OutputNormTangent<T>{
          {}, z, z_t, norm.weight, weight_t, norm.bias, bias_t, norm.mean, norm.rstd, residual_t, y_t, M, H, true},
      scratch_);
}

template <class T>
void Kernels<T>::output_norm_grad_tangent(const T* grad_y, const T* grad_y_t, const T* z, const T* z_t,
                                          const Norm& norm, const T* weight_t, const T* bias_t, T* grad_z_t,
                                          T* grad_weight_t, T* grad_bias_t, Index M, Index H) {
  launch(OutputNormGradTangent<T>{{},
                                  grad_y,
                                  grad_y_t,
                                  z,
                                  z_t,
                                  norm.weight,
                                  weight_t,
                                  norm.bias,
                                  bias_t,
                                  norm.mean,
                                  norm.rstd,
                                  grad_z_t,
                                  grad_weight_t,
                                  grad_bias_t,
                                  M,
                                  H,
                                  true},
         scratch_);
}

template class Kernels<float>;
template class Kernels<double>;

}  // namespace ssm_fast
