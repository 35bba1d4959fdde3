// Sums over rows of outer products, as gradients of matrices are, cut into partial sums.
#pragma once

#include "ops.h"
#include "recurrence.h"
#include "simd.h"

namespace ssm_fast::SSM_FAST_ISA {

constexpr Index kBlock = 96;            // rows of x and h that stay in cache while all tiles visit them
constexpr Index kChunkRows = 512;       // rows a partial sum covers at least
constexpr Index kMaxChunks = 32;        // partial sums over all groups: more than cores need
constexpr Index kMaxPartial = 1 << 21;  // elements of all partial sums together

// How many partial sums a group is cut into: a rule of the sizes alone, so that the order of the
// additions, and with it every bit of the result, is the same for any number of threads.
template <class T>
Index chunks_of(Index G, Index M, Index N, Index K) {
  Index chunks = M / kChunkRows;
  const Index by_groups = kMaxChunks / G;
  const Index by_memory = kMaxPartial / (G * N * round_up(K, kWidth<T>));
  if (chunks > by_groups) chunks = by_groups;
  if (chunks > by_memory) chunks = by_memory;
  return chunks < 1 ? 1 : chunks;
}

// C[r] += sum over the rows k of x[k][r] h[k], for R elements of x from n on and NV vectors of h from m on.
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
inline void add_columns(const T* const* x, const T* const* h, Index rows, Index n, Index K, T* C, Index stride) {
  constexpr int L = kWidth<T>;
  Index m = 0;
  for (; m + kTileVectors * L <= K; m += kTileVectors * L) {
    add_tile<T, R, kTileVectors>(x, h, rows, n, m, L, C + m, stride);
  }
  if (m == K) return;
  const int left = int(K - m), vectors = (left + L - 1) / L, last = left - (vectors - 1) * L;
  switch (vectors) {
    case 1: return add_tile<T, R, 1>(x, h, rows, n, m, last, C + m, stride);
    case 2: return add_tile<T, R, 2>(x, h, rows, n, m, last, C + m, stride);
    case 3: return add_tile<T, R, (kTileVectors < 3 ? 1 : 3)>(x, h, rows, n, m, last, C + m, stride);
    default: return add_tile<T, R, kTileVectors>(x, h, rows, n, m, last, C + m, stride);
  }
}

// C [N, K] += the outer products of `rows` rows of x and h.
template <class T>
void add_block(const T* const* x, const T* const* h, Index rows, Index N, Index K, T* C, Index stride) {
  for (Index n = 0; n < N;) {
    const Index R = even_block(N - n, kMaxRows);
    T* out = C + n * stride;
    switch (R) {
      case 1: add_columns<T, 1>(x, h, rows, n, K, out, stride); break;
      case 2: add_columns<T, 2>(x, h, rows, n, K, out, stride); break;
      case 3: add_columns<T, 3>(x, h, rows, n, K, out, stride); break;
      case 4: add_columns<T, 4>(x, h, rows, n, K, out, stride); break;
      case 5: add_columns<T, 5>(x, h, rows, n, K, out, stride); break;
      default: add_columns<T, kMaxRows>(x, h, rows, n, K, out, stride); break;
    }
    n += R;
  }
}

// grad [G, N, K], contiguous, from `chunks` partial sums of each group in scratch, their rows `stride` apart.
template <class T>
void add_chunks(Index G, Index N, Index K, Index chunks, const T* scratch, Index stride, T* grad, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (Index g = 0; g < G; ++g) {
    for (Index n = 0; n < N; ++n) {
      T* out = grad + (g * N + n) * K;
      const T* part = scratch + (g * chunks * N + n) * stride;
      std::memcpy(out, part, std::size_t(K) * sizeof(T));
      for (Index chunk = 1; chunk < chunks; ++chunk) {
        part += N * stride;
#pragma GCC ivdep
        for (Index m = 0; m < K; ++m) out[m] += part[m];
      }
    }
  }
}

}  // namespace ssm_fast::SSM_FAST_ISA
