// The kernels on contiguous rows of one group.
#pragma once

#include <cstdint>

#include "../launch.h"

namespace ssm_fast {

// Everything is contiguous: rows [M, I], [M, O] or [B, T, N], matrices [O, I]. A null pointer stands for what is left
// out or not wanted, as in the kernels' own structures (ops.h).
template <class T>
class Kernels {
 public:
  // y = [tanh] (x W^T + bias), or (x W^T + add), which may be y itself; with `transposed`, x W for W [I, O].
  void linear(const T* x, const T* W, const T* bias, const T* add, bool tanh, T* y, Index M, Index I, Index O,
              bool transposed = false);
  void linear_grad(const T* grad, const T* y, const T* x, const T* W, T* grad_x, T* grad_W, T* grad_bias, Index M,
                   Index I, Index O);
  void linear_tangent(const T* x_t, const T* W_t, const T* bias_t, const T* x, const T* W, const T* y, const T* grad,
                      T* y_t, T* curvature, Index M, Index I, Index O);
  // dense_scan, or with `adjoint` its adjoint: in reverse, with the matrix transposed.
  void sweep(const T* u, const T* A, bool adjoint, const T* s0, const std::uint8_t* reset, T* s, Index B, Index T_len,
             Index N);
  // norm_scan and its linear sweeps (ops.h); s and z [B, T, N]. The sums of `z n` and z are null where not wanted.
  struct StateNorm {
    const T *weight, *bias;  // [N]
    T *n, *rstd;             // [B, T, N] and [B, T]: written by the forward sweep
    T eps;
  };
  void norm_sweep(Sweep sweep, const T* u, const T* c, const T* A, const StateNorm& norm, const T* s0,
                  const std::uint8_t* reset, T* s, T* z, T* sum_zn, T* sum_z, Index B, Index T_len, Index N);
  void weight_grad(const T* x, const T* s, const T* s0, const std::uint8_t* reset, T* grad, Index B, Index T_len,
                   Index N);
  // output_norm with tanh and its gradients, for rows [M, H]; without a norm `weight` and what goes with it are null.
  struct Norm {
    const T *weight, *bias;  // [H]
    T *mean, *rstd;          // [M]
    T eps;
  };
  void output_norm(const T* z, const Norm& norm, const T* residual, T* y, Index M, Index H);
  void output_norm_grad(const T* grad_y, const T* z, const Norm& norm, T* grad_z, T* grad_weight, T* grad_bias, Index M,
                        Index H);
  void output_norm_tangent(const T* z, const T* z_t, const Norm& norm, const T* weight_t, const T* bias_t,
                           const T* residual_t, T* y_t, Index M, Index H);
  void output_norm_grad_tangent(const T* grad_y, const T* grad_y_t, const T* z, const T* z_t, const Norm& norm,
                                const T* weight_t, const T* bias_t, T* grad_z_t, T* grad_weight_t, T* grad_bias_t,
                                Index M, Index H);

 private:
  Scratch scratch_;
};

extern template class Kernels<float>;
extern template class Kernels<double>;

// x += y
template <class T>
void add_to(T* x, const T* y, Index elements) {
#pragma GCC ivdep
  for (Index i = 0; i < elements; ++i) x[i] += y[i];
}

}  // namespace ssm_fast
