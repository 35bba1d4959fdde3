// weight_grad: the sum over rows and time of x_t h_t^T, one GEMM after the sweep; docs/ops/weight_grad.md.
#include "ops.h"
#include "outer_products.h"
#include "recurrence.h"
#include "simd.h"

namespace ssm_fast::SSM_FAST_ISA {
namespace {

// The state that enters step t of row b, or null where it is zero.
template <class T>
inline const T* incoming(const WeightGrad<T>& p, Index g, Index b, Index t) {
  const Index gate = p.reverse ? t + 1 : t;
  if (p.reverse && gate == p.T_len) return nullptr;
  if (p.reset && p.reset[g * p.reset_g + b * p.reset_b + gate * p.reset_t]) return nullptr;
  if (p.reverse) return p.s + g * p.s_g + b * p.s_b + gate * p.s_t;
  if (t > 0) return p.s + g * p.s_g + b * p.s_b + (t - 1) * p.s_t;
  return p.s0 ? p.s0 + g * p.s0_g + b * p.s0_b : nullptr;
}

template <class T>
void sum_chunk(const WeightGrad<T>& p, Index g, Index first, Index end, T* C, Index stride) {
  const T *x[kBlock], *h[kBlock];
  std::memset(C, 0, std::size_t(p.N * stride) * sizeof(T));
  Index rows = 0;
  for (Index row = first; row < end; ++row) {
    const Index b = p.time_major ? row % p.B : row / p.T_len;
    const Index t = p.time_major ? row / p.B : row % p.T_len;
    h[rows] = incoming(p, g, b, t);
    if (h[rows]) {
      x[rows] = p.x + g * p.x_g + b * p.x_b + t * p.x_t;
      ++rows;
    }
    if (rows == kBlock || row + 1 == end) {
      add_block(x, h, rows, p.N, p.N, C, stride);
      rows = 0;
    }
  }
}

template <class T>
void run(const WeightGrad<T>& p) {
  const Index stride = round_up(p.N, kWidth<T>);
  const Index chunks = chunks_of<T>(p.G, p.B * p.T_len, p.N, p.N);
  const Index rows = p.B * p.T_len;
#pragma omp parallel for collapse(2) schedule(static) num_threads(p.threads)
  for (Index g = 0; g < p.G; ++g) {
    for (Index chunk = 0; chunk < chunks; ++chunk) {
      T* C = p.scratch + (g * chunks + chunk) * p.N * stride;
      sum_chunk(p, g, rows * chunk / chunks, rows * (chunk + 1) / chunks, C, stride);
    }
  }
  add_chunks(p.G, p.N, p.N, chunks, p.scratch, stride, p.grad, p.threads);
}

}  // namespace

Index weight_grad_scratch(Index G, Index B, Index T_len, Index N, bool is_double) {
  return is_double ? G * chunks_of<double>(G, B * T_len, N, N) * N * round_up(N, kWidth<double>)
                   : G * chunks_of<float>(G, B * T_len, N, N) * N * round_up(N, kWidth<float>);
}
void weight_grad(const WeightGrad<float>& p) { run(p); }
void weight_grad(const WeightGrad<double>& p) { run(p); }

}  // namespace ssm_fast::SSM_FAST_ISA
