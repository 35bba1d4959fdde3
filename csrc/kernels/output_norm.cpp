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
  const T* z = p.z.at(g, m);
  const T *residual = p.residual.at(g, m), *weight = p.weight.at(g), *bias = p.bias.at(g);
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
  const T* z = p.z.at(g, m);
  const T* grad_y = p.grad_y.at(g, m);
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
  const T *weight = p.weight.at(g), *bias = p.bias.at(g);
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

// What the tangent of n = (z - mean) rstd is made of: n_t = rstd (z_t - mean_t - n along).
template <class T>
struct MomentsTangent {
  T mean_t, along;
};

template <class T>
MomentsTangent<T> moments_tangent(const T* z, const T* z_t, T mean, T rstd, Index H) {
  Vector<T> plain{}, weighted{};
  for (Index c = 0; c < H; c += kWidth<T>) {
    const Vector<T> v_t = load_at(z_t, c, H);  // zero beyond the row, and with it both sums
    plain += v_t;
    weighted = fused_vector(v_t, (load_at(z, c, H) - mean) * rstd, weighted);
  }
  return {sum<T>(plain) / T(H), sum<T>(weighted) / T(H)};
}

template <class T>
void tangent_row(const OutputNormTangent<T>& p, Index m) {
  const Index H = p.H;
  const T *z = p.z + m * H, *z_t = p.z_t + m * H, *residual_t = p.residual_t ? p.residual_t + m * H : nullptr;
  T* y_t = p.y_t + m * H;
  const T mean = p.weight ? p.mean[m] : T(0), rstd = p.weight ? p.rstd[m] : T(1);
  MomentsTangent<T> row{T(0), T(0)};
  if (p.weight) row = moments_tangent(z, z_t, mean, rstd, H);
  for (Index c = 0; c < H; c += kWidth<T>) {
    Vector<T> q = load_at(z, c, H), q_t = load_at(z_t, c, H);
    if (p.weight) {
      const Vector<T> w = load_at(p.weight, c, H), n = (q - mean) * rstd;
      const Vector<T> n_t = (q_t - row.mean_t - n * row.along) * rstd;
      q = fused_vector(n, w, load_at(p.bias, c, H));
      q_t = fused_vector(n_t, w, fused_vector(n, load_at(p.weight_t, c, H), load_at(p.bias_t, c, H)));
    }
    if (p.tanh) {
      const Vector<T> t = tanh<T>(q);
      q_t *= T(1) - t * t;
    }
    if (residual_t) q_t += load_at(residual_t, c, H);
    store_at(y_t, c, H, q_t);
  }
}

// With ga = (1 - t^2) g as in backward_row, ga_t = (1 - t^2) g_t - 2 t t_t g, p_t = ga_t w + ga w_t and
// grad z = rstd (p - mean(p) - n mean(p n)): the tangent of each factor in turn. The sums of ga_t n + ga n_t and ga_t
// go to `partial`, [2, stride]. `row` holds p, p_t, n and n_t, [4, stride].
template <class T>
void backward_tangent_row(const OutputNormGradTangent<T>& p, Index m, T* row, T* partial, Index stride) {
  const Index H = p.H;
  const T *z = p.z + m * H, *z_t = p.z_t + m * H, *grad = p.grad_y + m * H, *grad_t = p.grad_y_t + m * H;
  T* out = p.grad_z_t + m * H;
  if (!p.weight) {
    for (Index c = 0; c < H; c += kWidth<T>) {
      Vector<T> g_t = load_at(grad_t, c, H);
      if (p.tanh) {
        const Vector<T> t = tanh<T>(load_at(z, c, H)), slope = T(1) - t * t;
        g_t = slope * (g_t - T(2) * t * load_at(z_t, c, H) * load_at(grad, c, H));
      }
      store_at(out, c, H, g_t);
    }
    return;
  }
  const T mean = p.mean[m], rstd = p.rstd[m];
  const MomentsTangent<T> moved = moments_tangent(z, z_t, mean, rstd, H);
  Vector<T> plain{}, weighted{}, plain_t{}, weighted_t{};
  for (Index c = 0; c < H; c += kWidth<T>) {
    const Vector<T> w = load_at(p.weight, c, H), w_t = load_at(p.weight_t, c, H);
    const Vector<T> n = (load_at(z, c, H) - mean) * rstd;
    const Vector<T> n_t = (load_at(z_t, c, H) - moved.mean_t - n * moved.along) * rstd;
    Vector<T> ga = load_at(grad, c, H), ga_t = load_at(grad_t, c, H);  // zero beyond the row, and with them all sums
    if (p.tanh) {
      const Vector<T> t = tanh<T>(fused_vector(n, w, load_at(p.bias, c, H))), slope = T(1) - t * t;
      const Vector<T> q_t = fused_vector(n_t, w, fused_vector(n, w_t, load_at(p.bias_t, c, H)));
      ga_t = slope * (ga_t - T(2) * t * q_t * ga);
      ga *= slope;
    }
    const Vector<T> q = ga * w, q_t = fused_vector(ga_t, w, ga * w_t);
    plain += q;
    plain_t += q_t;
    weighted = fused_vector(q, n, weighted);
    weighted_t = fused_vector(q_t, n, fused_vector(q, n_t, weighted_t));
    store(row + c, q);
    store(row + stride + c, q_t);
    store(row + 2 * stride + c, n);
    store(row + 3 * stride + c, n_t);
    store(partial + c, fused_vector(ga_t, n, fused_vector(ga, n_t, load(partial + c))));
    store(partial + stride + c, load(partial + stride + c) + ga_t);
  }
  const T mean_p = sum<T>(plain) / T(H), mean_n = sum<T>(weighted) / T(H);
  const T mean_p_t = sum<T>(plain_t) / T(H), mean_n_t = sum<T>(weighted_t) / T(H);
  for (Index c = 0; c < H; c += kWidth<T>) {
    const Vector<T> n = load(row + 2 * stride + c), n_t = load(row + 3 * stride + c);
    const Vector<T> before = load(row + c) - mean_p - n * mean_n;  // grad z over rstd
    const Vector<T> after = load(row + stride + c) - mean_p_t - n_t * mean_n - n * mean_n_t;
    store_at(out, c, H, (after - before * (rstd * moved.along)) * rstd);
  }
}

template <class T>
void compute(const OutputNorm<T>& p) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(p.threads)
  for (Index g = 0; g < p.G; ++g) {
    for (Index m = 0; m < p.M; ++m) forward_row(p, g, m);
  }
}

template <class T>
void compute(const OutputNormTangent<T>& p) {
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (Index m = 0; m < p.M; ++m) tangent_row(p, m);
}

Cost row_cost(Index rows, Index H, Index scratch = 0) { return {double(rows) * double(H) / 4, rows, 0, scratch}; }

Index chunks_of(Index M) { return (M + kChunkRows - 1) / kChunkRows; }

// grad_weight and grad_bias [H] from the sums of every chunk, [2, stride] at the start of its `size` elements.
template <class T>
void add_partials(const T* partial, Index chunks, Index size, Index stride, Index H, T* grad_weight, T* grad_bias) {
  for (Index h = 0; h < H; ++h) grad_weight[h] = grad_bias[h] = 0;
  for (Index chunk = 0; chunk < chunks; ++chunk, partial += size) {
#pragma GCC ivdep
    for (Index h = 0; h < H; ++h) {
      grad_weight[h] += partial[h];
      grad_bias[h] += partial[stride + h];
    }
  }
}

template <class T>
void compute(const OutputNormGradTangent<T>& p) {
  const Index stride = round_up(p.H, kWidth<T>), size = 6 * stride, chunks = chunks_of(p.M);
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (Index chunk = 0; chunk < chunks; ++chunk) {
    T* partial = p.scratch + chunk * size;
    std::memset(partial, 0, std::size_t(size) * sizeof(T));
    const Index end = (chunk + 1) * kChunkRows < p.M ? (chunk + 1) * kChunkRows : p.M;
    for (Index m = chunk * kChunkRows; m < end; ++m) {
      backward_tangent_row(p, m, partial + 2 * stride, partial, stride);
    }
  }
  if (p.weight) add_partials(p.scratch, chunks, size, stride, p.H, p.grad_weight_t, p.grad_bias_t);
}

template <class T>
void compute(const OutputNormGrad<T>& p) {
  const Index stride = round_up(p.H, kWidth<T>), chunks = chunks_of(p.M);
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
    add_partials(p.scratch + g * chunks * 4 * stride, chunks, 4 * stride, stride, p.H, p.grad_weight + g * p.H,
                 p.grad_bias + g * p.H);
  }
}

template <class T>
Cost cost_of(const OutputNorm<T>& p) {
  return row_cost(p.G * p.M, p.H);
}
template <class T>
Cost cost_of(const OutputNormGrad<T>& p) {
  return row_cost(p.G * p.M, p.H, p.G * chunks_of(p.M) * 4 * round_up(p.H, kWidth<T>));
}
template <class T>
Cost cost_of(const OutputNormTangent<T>& p) {
  return row_cost(p.M, p.H);
}
template <class T>
Cost cost_of(const OutputNormGradTangent<T>& p) {
  return row_cost(p.M, p.H, chunks_of(p.M) * 6 * round_up(p.H, kWidth<T>));
}

}  // namespace

SSM_FAST_DEFINE_REAL(OutputNorm)
SSM_FAST_DEFINE_REAL(OutputNormGrad)
SSM_FAST_DEFINE_REAL(OutputNormTangent)
SSM_FAST_DEFINE_REAL(OutputNormGradTangent)

}  // namespace ssm_fast::SSM_FAST_ISA
