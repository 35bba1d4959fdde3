// What the dense recurrences share: the state matrix packed for a sweep, and one step of a block of rows.
#pragma once

#include "ops.h"
#include "simd.h"

namespace ssm_fast::SSM_FAST_ISA {

constexpr int kMaxRows = 6;  // rows of a block; with kTileVectors, the accumulators that fit the registers

constexpr int kLoneSums = 8;  // vectors of sums of a row that is alone: as many additions are under way

constexpr Index kAhead = 8;  // steps that rows are prefetched ahead of their use

constexpr Index round_up(Index n, Index multiple) { return (n + multiple - 1) / multiple * multiple; }

// The rows of the first block when `rows` are cut into even blocks of at most `most`: no narrow last one.
inline Index even_block(Index rows, Index most) {
  const Index blocks = (rows + most - 1) / most;
  return (rows + blocks - 1) / blocks;
}

template <class T>
constexpr int kTile = kTileVectors * kWidth<T>;  // columns of a full tile

// A [N, K], transposed and cut into tiles of columns: W[tile][k][column], zero beyond N. For a minibatch of a policy
// that takes as long as the product, so vectors of A are copied where they lie in memory, or transposed in squares.
template <class T>
inline void pack(const T* A, Index row, Index column, Index K, Index N, T* W) {
  constexpr int L = kWidth<T>;
  for (Index first = 0; first < N; first += kTile<T>) {
    const Index width = round_up(N - first < kTile<T> ? N - first : kTile<T>, L);
    for (Index j = 0; j < width; j += L) {
      const int columns = N - first - j < L ? int(N - first - j) : L;
      const T* from = A + (first + j) * row;
      T* to = W + j;
      Index k = 0;
      for (; row == 1 && k < K; ++k) {
        const T* p = from + k * column;
        store(to + k * width, columns == L ? load(p) : load_part(p, columns));
      }
      for (; column == 1 && k + L <= K; k += L) {
        Vector<T> square[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) square[i] = i < columns ? load(from + i * row + k) : Vector<T>{};
        transpose<T>(square);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(to + (k + i) * width, square[i]);
      }
      for (; k < K; ++k) {
        for (int i = 0; i < L; ++i) to[k * width + i] = i < columns ? from[i * row + k * column] : T(0);
      }
    }
    W += K * width;
  }
}

// out[r] = h[r] W + u[r] for R rows of K elements and NV vectors of columns from `column` on, the last of them partial.
//
// With kSums / NV chains every such product is summed apart, so that the latency of one addition does
// not pace a narrow tile, or the row of a batch of one (kLoneSums). The order of the additions depends
// on the tile and the batch alone: a row's bits do not depend on the block it is in.
template <class T, int R, int NV, int kSums>
inline void multiply_tile(const T* const* u, const T* const* h, T* const* out, const T* W, Index K, Index column,
                          int last) {
  constexpr int L = kWidth<T>;
  constexpr int kChains = kSums / NV;
  const T* x[R];
  Vector<T> acc[kChains][R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    x[r] = h[r];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const T* from = u[r] + column + v * L;
      acc[0][r][v] = v + 1 < NV || last == L ? load(from) : load_part(from, last);
#pragma GCC unroll 8
      for (int chain = 1; chain < kChains; ++chain) acc[chain][r][v] = Vector<T>{};
    }
  }
  const auto add_product = [&](Index k, Vector<T>(&sums)[R][NV]) __attribute__((always_inline)) {
    Vector<T> w[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) w[v] = load(W + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector<T> factor = broadcast(x[r][k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sums[r][v] = fused_vector(factor, w[v], sums[r][v]);
    }
    W += NV * L;
  };
  Index k = 0;
  for (; k + kChains <= K; k += kChains) {
#pragma GCC unroll 8
    for (int chain = 0; chain < kChains; ++chain) add_product(k + chain, acc[chain]);
  }
  for (; k < K; ++k) add_product(k, acc[0]);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
#pragma GCC unroll 3
      for (int half = kChains / 2; half > 0; half /= 2) {
#pragma GCC unroll 4
        for (int chain = 0; chain < half; ++chain) acc[chain][r][v] += acc[chain + half][r][v];
      }
      T* to = out[r] + column + v * L;
      if (v + 1 < NV || last == L) {
        store(to, acc[0][r][v]);
      } else {
        store_part(to, acc[0][r][v], last);
      }
    }
  }
}

// The tile of columns from `column` on; W is that tile.
template <class T, int R, int kSums = kTileVectors>
inline void multiply_columns(const T* const* u, const T* const* h, T* const* out, const T* W, Index K, Index N,
                             Index column) {
  constexpr int L = kWidth<T>;
  if (column + kTile<T> <= N) return multiply_tile<T, R, kTileVectors, kSums>(u, h, out, W, K, column, L);
  const int left = int(N - column);
  const int vectors = (left + L - 1) / L;
  const int last = left - (vectors - 1) * L;
  switch (vectors) {
    case 1: return multiply_tile<T, R, 1, kSums>(u, h, out, W, K, column, last);
    case 2: return multiply_tile<T, R, 2, kSums>(u, h, out, W, K, column, last);
    case 3: return multiply_tile<T, R, (kTileVectors < 3 ? 1 : 3), kSums>(u, h, out, W, K, column, last);
    default: return multiply_tile<T, R, kTileVectors, kSums>(u, h, out, W, K, column, last);
  }
}

// Group g of A [G, N, K].
template <class T>
inline void pack(const View<const T, 3>& A, Index g, Index K, Index N, T* W) {
  pack(A.at(g), A.strides[1], A.strides[2], K, N, W);
}

// R rows, all N columns: out = h A^T + u.
template <class T, int R, int kSums = kTileVectors>
inline void multiply_rows(const T* const* u, const T* const* h, T* const* out, const T* W, Index K, Index N) {
  for (Index column = 0; column < N; column += kTile<T>) {
    multiply_columns<T, R, kSums>(u, h, out, W + K * column, K, N, column);
  }
}

// The same for any number of rows; all of them visit a tile before the next one is read.
template <class T>
inline void multiply_rows(const T* const* u, const T* const* h, T* const* out, int rows, const T* W, Index K, Index N) {
  for (Index column = 0; column < N; column += kTile<T>, W += K * kTile<T>) {
    for (int r = 0, R; r < rows; r += R) {
      R = int(even_block(rows - r, kMaxRows));
      switch (R) {
        case 1: multiply_columns<T, 1>(u + r, h + r, out + r, W, K, N, column); break;
        case 2: multiply_columns<T, 2>(u + r, h + r, out + r, W, K, N, column); break;
        case 3: multiply_columns<T, 3>(u + r, h + r, out + r, W, K, N, column); break;
        case 4: multiply_columns<T, 4>(u + r, h + r, out + r, W, K, N, column); break;
        case 5: multiply_columns<T, 5>(u + r, h + r, out + r, W, K, N, column); break;
        default: multiply_columns<T, kMaxRows>(u + r, h + r, out + r, W, K, N, column); break;
      }
    }
  }
}

// Brings the rows of a later step, `ahead` elements away from these, into the second-level cache.
// The rows of a block are as many streams, and in an adjoint sweep they run backwards: the processor
// does not follow them by itself.
template <class T>
inline void prefetch(const T* const* rows, int count, Index ahead, Index N) {
  for (int r = 0; r < count; ++r) {
    for (Index c = 0; c < N; c += 64 / Index(sizeof(T))) __builtin_prefetch(rows[r] + ahead + c, 0, 2);
  }
}

// Calls scan(group, first row, rows) for blocks of at most `most` that cover the rows of one thread,
// and enter(group) before the first block of each group.
//
// A row's sums do not depend on its block, so neither does a result on the number of threads.
template <class Enter, class Scan>
inline void for_row_blocks(Index G, Index B, int thread, int threads, Index most, Enter enter, Scan scan) {
  const Index rows = G * B;
  Index row = rows * thread / threads;
  const Index end = rows * (thread + 1) / threads;
  while (row < end) {
    const Index g = row / B;
    const Index stop = end < (g + 1) * B ? end : (g + 1) * B;
    enter(g);
    while (row < stop) {
      const Index R = even_block(stop - row, most);
      scan(g, row - g * B, int(R));
      row += R;
    }
  }
}

}  // namespace ssm_fast::SSM_FAST_ISA
