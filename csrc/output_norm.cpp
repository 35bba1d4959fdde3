// output_norm: LayerNorm, tanh and residual of a layer's output in one pass; docs/ops/output_norm.md.
#include "elementary.h"
#include "ops.h"
#include "recurrence.h"
#include "simd.h"

namespace ssm_fast::SSM_FAST_ISA {
namespace {

constexpr Index kChunkRows = 64;  // rows of a partial sum, whatever the number of threads

// y = [residual +] [tanh] (n w + b) with n = (z - mean) rstd, or without the norm (w null) of z itself.
template <class T>
void forward_row(const OutputNorm<T>& p, Index g, Index m) {
  const T* z = p.z + g * p.z_g + m * p.z_m;
  const T* residual = p.residual ? p.residual + g * p.residual_g + m * p.residual_m : nullptr;
  const T* weight = p.weight ? p.weight + g * p.weight_g : nullptr;
  const T* bias = p.weight ? p.bias + g * p.bias_g : nullptr;
  T* y = p.y + (g * p.M + m) * p.H;
  Moments<T> row{T(0), T(1)};
  if (weight) row = moments(z, p.H, p.eps);
  for (Index c = 0; c < p.H; c += kWidth<T>) {
    Vector<T> v = load_at(z, c, p.H);
    if (weight) v = fused_vector((v - row.mean) * row.rstd, load_at(weight, c, p.H), load_at(bias, c, p.H));
    if (p.tanh) v = tanh<T>(v);
    if (residual) v += load_at(residual, c, p.H);
    store_at(y, c, p.H, v);
  }
  if (p.mean) {
    p.mean[g * p.M + m] = row.mean;
    p.rstd[g * p.M + m] = row.rstd;
  }
}

// With n, p = w ga and ga = [1 - tanh^2] g: grad z = rstd (p - mean(p) - n mean(p n)); the sums of ga n
// and ga go to `partial`, [2, stride]. `row` holds p and n, [2, stride].
template <class T>
void backward_row(const OutputNormGrad<T>& p, Index g, Index m, T* row, T* partial, Index stride) {
  const T* z = p.z + g * p.z_g + m * p.z_m;
  const T* grad_y = p.grad_y + g * p.grad_g + m * p.grad_m;
  T* grad_z = p.grad_z + (g * p.M + m) * p.H;
  if (!p.weight) {
    for (Index c = 0; c < p.H; c += kWidth<T>) {
      Vector<T> grad = load_at(grad_y, c, p.H);
      if (p.tanh) {
        const Vector<T> t = tanh<T>(load_at(z, c, p.H));
        grad *= T(1) - t * t;
      }
      store_at(grad_z, c, p.H, grad);
    }
    return;
  }
  const T *weight = p.weight + g * p.weight_g, *bias = p.bias + g * p.bias_g;
  const T mean = p.mean[g * p.M + m], rstd = p.rstd[g * p.M + m];
  Vector<T> plain{}, weighted{};
  for (Index c = 0; c < p.H; c += kWidth<T>) {
    const Vector<T> w = load_at(weight, c, p.H);
    const Vector<T> n = (load_at(z, c, p.H) - mean) * rstd;
    Vector<T> ga = load_at(grad_y, c, p.H);  // zero beyond the row, and with it all that follows
    if (p.tanh) {
      const Vector<T> t = tanh<T>(fused_vector(n, w, load_at(bias, c, p.H)));
      ga *= T(1) - t * t;
    }
    const Vector<T> q = ga * w;
    plain += q;
    weighted = fused_vector(q, n, weighted);
    store(row + c, q);
    store(row + stride + c, n);
    store(partial + c, fused_vector(ga, n, load(partial + c)));
    store(partial + stride + c, load(partial + stride + c) + ga);
  }
  const T mean_p = sum<T>(plain) / T(p.H), mean_n = sum<T>(weighted) / T(p.H);
  for (Index c = 0; c < p.H; c += kWidth<T>) {
    const Vector<T> n = load(row + stride + c);
    store_at(grad_z, c, p.H, (load(row + c) - mean_p - n * mean_n) * rstd);
  }
}

template <class T>
void run(const OutputNorm<T>& p) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(p.threads)
  for (Index g = 0; g < p.G; ++g) {
    for (Index m = 0; m < p.M; ++m) forward_row(p, g, m);
  }
}

template <class T>
void run(const OutputNormGrad<T>& p) {
  const Index stride = round_up(p.H, kWidth<T>);
  const Index chunks = (p.M + kChunkRows - 1) / kChunkRows;
#pragma omp parallel for collapse(2) schedule(static) num_threads(p.threads)
  for (Index g = 0; g < p.G; ++g) {
    for (Index chunk = 0; chunk < chunks; ++chunk) {
      T* partial = p.scratch + (g * chunks + chunk) * 4 * stride;
      std::memset(partial, 0, std::size_t(4 * stride) * sizeof(T));
      const Index end = (chunk + 1) * kChunkRows < p.M ? (chunk + 1) * kChunkRows : p.M;
      for (Index m = chunk * kChunkRows; m < end; ++m) {
        backward_row(p, g, m, partial + 2 * stride, partial, stride);
      }
    }
  }
  if (!p.weight) return;
  for (Index g = 0; g < p.G; ++g) {
    T *grad_weight = p.grad_weight + g * p.H, *grad_bias = p.grad_bias + g * p.H;
    for (Index h = 0; h < p.H; ++h) grad_weight[h] = grad_bias[h] = 0;
    for (Index chunk = 0; chunk < chunks; ++chunk) {
      const T* partial = p.scratch + (g * chunks + chunk) * 4 * stride;
#pragma GCC ivdep
      for (Index h = 0; h < p.H; ++h) {
        grad_weight[h] += partial[h];
        grad_bias[h] += partial[stride + h];
      }
    }
  }
}

}  // namespace

Index output_norm_scratch(Index G, Index M, Index H, bool is_double) {
  const Index stride = is_double ? round_up(H, kWidth<double>) : round_up(H, kWidth<float>);
  return G * ((M + kChunkRows - 1) / kChunkRows) * 4 * stride;
}
void output_norm(const OutputNorm<float>& p) { run(p); }
void output_norm(const OutputNorm<double>& p) { run(p); }
void output_norm_grad(const OutputNormGrad<float>& p) { run(p); }
void output_norm_grad(const OutputNormGrad<double>& p) { run(p); }

}  // namespace ssm_fast::SSM_FAST_ISA
