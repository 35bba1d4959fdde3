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
  if (p.reset && *p.reset.at(g, b, gate)) return nullptr;
  if (p.reverse) return p.s.at(g, b, gate);
  if (t > 0) return p.s.at(g, b, t - 1);
  return p.s0.at(g, b);
}

template <class T>
void sum_chunk(const WeightGrad<T>& p, Index g, Index first, Index end, T* C, Index stride) {
  const T *x[kBlock], *h[kBlock];
  std::memset(C, 0, std::size_t(p.N * stride) * sizeof(T));
  const bool time_major = p.s.strides[2] > p.s.strides[1];  // the order in which rows lie in memory
  Index rows = 0;
  for (Index row = first; row < end; ++row) {
    const Index b = time_major ? row % p.B : row / p.T_len;
    const Index t = time_major ? row / p.B : row % p.T_len;
    h[rows] = incoming(p, g, b, t);
    if (h[rows]) {
      x[rows] = p.x.at(g, b, t);
      ++rows;
    }
    if (rows == kBlock || row + 1 == end) {
      add_block(x, h, rows, p.N, p.N, C, stride);
      rows = 0;
    }
  }
}

template <class T>
void compute(const WeightGrad<T>& p) {
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

template <class T>
Cost cost_of(const WeightGrad<T>& p) {
  const Index rows = p.G * p.B * p.T_len;
  return {double(rows) * double(p.N * p.N), rows, 0,
          p.G * chunks_of<T>(p.G, p.B * p.T_len, p.N, p.N) * p.N * round_up(p.N, kWidth<T>)};
}

}  // namespace

SSM_FAST_DEFINE_REAL(WeightGrad)

}  // namespace ssm_fast::SSM_FAST_ISA
