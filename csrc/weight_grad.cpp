// weight_grad: the sum over rows and time of x_t h_t^T, one GEMM after the sweep; docs/ops/weight_grad.md.
#include "ops.h"
#include "recurrence.h"
#include "simd.h"

namespace ssm_fast::SSM_FAST_ISA {
namespace {

constexpr Index kBlock = 96;            // rows of x and h that stay in cache while all tiles visit them
constexpr Index kChunkRows = 512;       // rows a partial sum covers at least
constexpr Index kMaxChunks = 32;        // partial sums over all groups: more than cores need
constexpr Index kMaxPartial = 1 << 21;  // elements of all partial sums together

// How many partial sums a group is cut into: a rule of the sizes alone, so that the order of the
// additions, and with it every bit of the result, is the same for any number of threads.
template <class T>
Index chunks_of(Index G, Index B, Index T_len, Index N) {
  Index chunks = B * T_len / kChunkRows;
  const Index by_groups = kMaxChunks / G;
  const Index by_memory = kMaxPartial / (G * N * round_up(N, kWidth<T>));
  if (chunks > by_groups) chunks = by_groups;
  if (chunks > by_memory) chunks = by_memory;
  return chunks < 1 ? 1 : chunks;
}

// C[r] += sum over the rows k of x[k][r] h[k], for R elements of x and NV vectors of h.
template <class T, int R, int NV>
inline void add_tile(const T* const* x, const T* const* h, Index rows, Index n, Index m, int last, T* C, Index stride) {
  constexpr int L = kWidth<T>;
  Vector<T> acc[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = load(C + r * stride + v * L);
  }
  for (Index k = 0; k < rows; ++k) {
    const T *x_k = x[k] + n, *h_k = h[k] + m;
    __asm__("" : "+r"(x_k), "+r"(h_k));  // else an index for each element takes a register, and spills
    Vector<T> w[NV];
#pragma GCC unroll 4
    for (int v = 0; v + 1 < NV; ++v) w[v] = load(h_k + v * L);
    w[NV - 1] = last == L ? load(h_k + (NV - 1) * L) : load_part(h_k + (NV - 1) * L, last);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector<T> factor = broadcast(x_k[r]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = fused_vector(factor, w[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(C + r * stride + v * L, acc[r][v]);
  }
}

template <class T, int R>
inline void add_columns(const T* const* x, const T* const* h, Index rows, Index n, Index N, T* C, Index stride) {
  constexpr int L = kWidth<T>;
  Index m = 0;
  for (; m + kTileVectors * L <= N; m += kTileVectors * L) {
    add_tile<T, R, kTileVectors>(x, h, rows, n, m, L, C + m, stride);
  }
  if (m == N) return;
  const int left = int(N - m), vectors = (left + L - 1) / L, last = left - (vectors - 1) * L;
  switch (vectors) {
    case 1: return add_tile<T, R, 1>(x, h, rows, n, m, last, C + m, stride);
    case 2: return add_tile<T, R, 2>(x, h, rows, n, m, last, C + m, stride);
    case 3: return add_tile<T, R, (kTileVectors < 3 ? 1 : 3)>(x, h, rows, n, m, last, C + m, stride);
    default: return add_tile<T, R, kTileVectors>(x, h, rows, n, m, last, C + m, stride);
  }
}

template <class T>
void add_block(const T* const* x, const T* const* h, Index rows, Index N, T* C, Index stride) {
  for (Index n = 0; n < N;) {
    const Index R = even_block(N - n, kMaxRows);
    T* out = C + n * stride;
    switch (R) {
      case 1: add_columns<T, 1>(x, h, rows, n, N, out, stride); break;
      case 2: add_columns<T, 2>(x, h, rows, n, N, out, stride); break;
      case 3: add_columns<T, 3>(x, h, rows, n, N, out, stride); break;
      case 4: add_columns<T, 4>(x, h, rows, n, N, out, stride); break;
      case 5: add_columns<T, 5>(x, h, rows, n, N, out, stride); break;
      default: add_columns<T, kMaxRows>(x, h, rows, n, N, out, stride); break;
    }
    n += R;
  }
}

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
      add_block(x, h, rows, p.N, C, stride);
      rows = 0;
    }
  }
}

template <class T>
void run(const WeightGrad<T>& p) {
  const Index stride = round_up(p.N, kWidth<T>);
  const Index chunks = chunks_of<T>(p.G, p.B, p.T_len, p.N);
  const Index rows = p.B * p.T_len;
#pragma omp parallel for collapse(2) schedule(static) num_threads(p.threads)
  for (Index g = 0; g < p.G; ++g) {
    for (Index chunk = 0; chunk < chunks; ++chunk) {
      T* C = p.scratch + (g * chunks + chunk) * p.N * stride;
      sum_chunk(p, g, rows * chunk / chunks, rows * (chunk + 1) / chunks, C, stride);
    }
  }
#pragma omp parallel for collapse(2) schedule(static) num_threads(p.threads)
  for (Index g = 0; g < p.G; ++g) {
    for (Index n = 0; n < p.N; ++n) {
      T* out = p.grad + (g * p.N + n) * p.N;
      const T* part = p.scratch + (g * chunks * p.N + n) * stride;
      std::memcpy(out, part, std::size_t(p.N) * sizeof(T));
      for (Index chunk = 1; chunk < chunks; ++chunk) {
        part += p.N * stride;
#pragma GCC ivdep
        for (Index m = 0; m < p.N; ++m) out[m] += part[m];
      }
    }
  }
}

}  // namespace

Index weight_grad_scratch(Index G, Index B, Index T_len, Index N, bool is_double) {
  return is_double ? G * chunks_of<double>(G, B, T_len, N) * N * round_up(N, kWidth<double>)
                   : G * chunks_of<float>(G, B, T_len, N) * N * round_up(N, kWidth<float>);
}
void weight_grad(const WeightGrad<float>& p) { run(p); }
void weight_grad(const WeightGrad<double>& p) { run(p); }

}  // namespace ssm_fast::SSM_FAST_ISA
