// What the dense recurrences share: the state matrix packed for a sweep, and one step of a block of rows.
#pragma once

#include "ops.h"
#include "simd.h"

namespace ssm_fast::SSM_FAST_ISA {

constexpr int kMaxRows = 6;  // rows of a block; with kTileVectors, the accumulators that fit the registers

constexpr Index round_up(Index n, Index multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T>
constexpr int kTile = kTileVectors * kWidth<T>;  // columns of a full tile

// A, transposed and cut into tiles of columns: W[tile][k][column], zero beyond N.
template <class T>
inline void pack(const T* A, Index row, Index column, Index N, T* W) {
  for (Index first = 0; first < N; first += kTile<T>) {
    const Index width = round_up(N - first < kTile<T> ? N - first : kTile<T>, kWidth<T>);
    for (Index k = 0; k < N; ++k, W += width) {
      for (Index j = 0; j < width; ++j) {
        W[j] = first + j < N ? A[(first + j) * row + k * column] : T(0);
      }
    }
  }
}

// h_next[r] = h[r] W + u[r] for R rows and NV vectors of columns, also stored to s[r] if kStore;
// the last vector may be partial in u and s, and is zero beyond N in h_next.
template <class T, int R, int NV, bool kStore>
inline void multiply_tile(const T* const* u, T* const* s, const T* h, Index stride, T* h_next, const T* W, Index N,
                          int last) {
  constexpr int L = kWidth<T>;
  Vector<T> acc[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v + 1 < NV; ++v) acc[r][v] = load(u[r] + v * L);
    acc[r][NV - 1] = last == L ? load(u[r] + (NV - 1) * L) : load_part(u[r] + (NV - 1) * L, last);
  }
  for (Index k = 0; k < N; ++k, W += NV * L) {
    Vector<T> w[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) w[v] = load(W + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector<T> x = broadcast(h[r * stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = fused_vector(x, w[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      store(h_next + r * stride + v * L, acc[r][v]);
      if constexpr (kStore) {
        if (v + 1 < NV || last == L) {
          store(s[r] + v * L, acc[r][v]);
        } else {
          store_part(s[r] + v * L, acc[r][v], last);
        }
      }
    }
  }
}

// One step of R rows, all columns: h_next = h A^T + u, and to s if kStore.
template <class T, int R, bool kStore>
inline void multiply_step(const T* const* u, T* const* s, const T* h, Index stride, T* h_next, const T* W, Index N) {
  const T* u_tile[R];
  T* s_tile[R];
  Index column = 0;
  const auto move_to_column = [&] {
    for (int r = 0; r < R; ++r) {
      u_tile[r] = u[r] + column;
      if constexpr (kStore) s_tile[r] = s[r] + column;
    }
  };
  for (; column + kTile<T> <= N; column += kTile<T>, W += N * kTile<T>) {
    move_to_column();
    multiply_tile<T, R, kTileVectors, kStore>(u_tile, s_tile, h, stride, h_next + column, W, N, kWidth<T>);
  }
  if (column == N) return;
  move_to_column();
  const int left = int(N - column);
  const int vectors = (left + kWidth<T> - 1) / kWidth<T>;
  const int last = left - (vectors - 1) * kWidth<T>;
  h_next += column;
  switch (vectors) {
    case 1: return multiply_tile<T, R, 1, kStore>(u_tile, s_tile, h, stride, h_next, W, N, last);
    case 2: return multiply_tile<T, R, 2, kStore>(u_tile, s_tile, h, stride, h_next, W, N, last);
    case 3:
      return multiply_tile<T, R, (kTileVectors < 3 ? 1 : 3), kStore>(u_tile, s_tile, h, stride, h_next, W, N, last);
    default: return multiply_tile<T, R, kTileVectors, kStore>(u_tile, s_tile, h, stride, h_next, W, N, last);
  }
}

// Calls scan(group, first row, rows as an integral constant) for blocks that cover the rows of one
// thread, and enter(group) before the first block of each group.
//
// A row's sums do not depend on its block, so neither does a result on the number of threads.
template <class Enter, class Scan>
inline void for_row_blocks(Index G, Index B, int thread, int threads, Enter enter, Scan scan) {
  const Index rows = G * B;
  Index row = rows * thread / threads;
  const Index end = rows * (thread + 1) / threads;
  while (row < end) {
    const Index g = row / B;
    const Index stop = end < (g + 1) * B ? end : (g + 1) * B;
    enter(g);
    while (row < stop) {
      const Index blocks = (stop - row + kMaxRows - 1) / kMaxRows;
      const int R = int((stop - row + blocks - 1) / blocks);  // even blocks: no narrow last one
      scan(g, row - g * B, R);
      row += R;
    }
  }
}

}  // namespace ssm_fast::SSM_FAST_ISA
