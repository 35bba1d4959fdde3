// dense_scan: a block of rows keeps its state in L1 while time advances; docs/ops/dense_scan.md.
#include "ops.h"
#include "simd.h"

namespace ssm_fast::SSM_FAST_ISA {
namespace {

constexpr int kMaxRows = 6;

constexpr Index round_up(Index n, Index multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T>
constexpr int kTile = kTileVectors * kWidth<T>;  // columns of a full tile

// A, transposed and cut into tiles of columns: W[tile][k][column], zero beyond N.
template <class T>
void pack(const DenseScan<T>& p, Index g, T* W) {
  const T* A = p.A + g * p.A_g;
  for (Index first = 0; first < p.N; first += kTile<T>) {
    const Index width = round_up(p.N - first < kTile<T> ? p.N - first : kTile<T>, kWidth<T>);
    for (Index k = 0; k < p.N; ++k, W += width) {
      for (Index j = 0; j < width; ++j) {
        W[j] = first + j < p.N ? A[(first + j) * p.A_row + k * p.A_col] : T(0);
      }
    }
  }
}

// s[r] = h[r] W + u[r] for R rows and NV vectors of columns; the last vector may be partial.
template <class T, int R, int NV>
inline void multiply_tile(const T* const* u, T* const* s, const T* h, Index h_stride, T* h_next, const T* W, Index N,
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
      const Vector<T> x = broadcast(h[r * h_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = fused_vector(x, w[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      store(h_next + r * h_stride + v * L, acc[r][v]);
      if (v + 1 < NV || last == L) {
        store(s[r] + v * L, acc[r][v]);
      } else {
        store_part(s[r] + v * L, acc[r][v], last);
      }
    }
  }
}

template <class T, int R>
inline void multiply_tail(int vectors, const T* const* u, T* const* s, const T* h, Index h_stride, T* h_next,
                          const T* W, Index N, int last) {
  switch (vectors) {
    case 1: return multiply_tile<T, R, 1>(u, s, h, h_stride, h_next, W, N, last);
    case 2: return multiply_tile<T, R, 2>(u, s, h, h_stride, h_next, W, N, last);
    case 3: return multiply_tile<T, R, (kTileVectors < 3 ? 1 : 3)>(u, s, h, h_stride, h_next, W, N, last);
    default: return multiply_tile<T, R, kTileVectors>(u, s, h, h_stride, h_next, W, N, last);
  }
}

// All of time for R consecutive rows of one group. `h` holds two [R, stride] state blocks.
template <class T, int R>
void scan_rows(const DenseScan<T>& p, Index g, Index b, const T* W, T* h, Index stride) {
  const Index first = p.reverse ? p.T_len - 1 : 0;
  const Index step = p.reverse ? -1 : 1;
  const T* u[R];
  T* s[R];
  T* h_next = h + R * stride;
  std::memset(h, 0, std::size_t(2 * R * stride) * sizeof(T));
  for (int r = 0; r < R; ++r) {
    u[r] = p.u + g * p.u_g + (b + r) * p.u_b + first * p.u_t;
    s[r] = p.s + g * p.s_g + (b + r) * p.s_b + first * p.s_t;
    if (p.s0) std::memcpy(h + r * stride, p.s0 + g * p.s0_g + (b + r) * p.s0_b, std::size_t(p.N) * sizeof(T));
  }
  const std::uint8_t* reset = p.reset ? p.reset + g * p.reset_g + b * p.reset_b : nullptr;
  for (Index i = 0, t = first; i < p.T_len; ++i, t += step) {
    const Index gate = p.reverse ? t + 1 : t;  // the step whose reset cuts the incoming state
    if (reset && gate < p.T_len) {
      for (int r = 0; r < R; ++r) {
        if (reset[r * p.reset_b + gate * p.reset_t]) {
          std::memset(h + r * stride, 0, std::size_t(p.N) * sizeof(T));
        }
      }
    }
    const T* w = W;
    Index column = 0;
    const T* u_tile[R];
    T* s_tile[R];
    for (; column + kTile<T> <= p.N; column += kTile<T>, w += p.N * kTile<T>) {
      for (int r = 0; r < R; ++r) {
        u_tile[r] = u[r] + column;
        s_tile[r] = s[r] + column;
      }
      multiply_tile<T, R, kTileVectors>(u_tile, s_tile, h, stride, h_next + column, w, p.N, kWidth<T>);
    }
    if (column < p.N) {
      const int left = int(p.N - column);
      const int vectors = (left + kWidth<T> - 1) / kWidth<T>;
      for (int r = 0; r < R; ++r) {
        u_tile[r] = u[r] + column;
        s_tile[r] = s[r] + column;
      }
      multiply_tail<T, R>(vectors, u_tile, s_tile, h, stride, h_next + column, w, p.N,
                          left - (vectors - 1) * kWidth<T>);
    }
    T* swap = h;
    h = h_next;
    h_next = swap;
    for (int r = 0; r < R; ++r) {
      u[r] += step * p.u_t;
      s[r] += step * p.s_t;
    }
  }
}

template <class T>
void scan_block(const DenseScan<T>& p, Index g, Index b, int rows, const T* W, T* h, Index stride) {
  switch (rows) {
    case 1: return scan_rows<T, 1>(p, g, b, W, h, stride);
    case 2: return scan_rows<T, 2>(p, g, b, W, h, stride);
    case 3: return scan_rows<T, 3>(p, g, b, W, h, stride);
    case 4: return scan_rows<T, 4>(p, g, b, W, h, stride);
    case 5: return scan_rows<T, 5>(p, g, b, W, h, stride);
    default: return scan_rows<T, kMaxRows>(p, g, b, W, h, stride);
  }
}

template <class T>
Index scratch_elements(Index N) {
  const Index padded = round_up(N, kWidth<T>);
  return round_up(N * padded + 2 * kMaxRows * padded, 64 / Index(sizeof(T)));
}

template <class T>
void run(const DenseScan<T>& p) {
  const Index stride = round_up(p.N, kWidth<T>);
  const Index rows = p.G * p.B;
  // A row's sums do not depend on its block, so neither does the result on the number of threads.
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (int thread = 0; thread < p.threads; ++thread) {
    T* W = p.scratch + thread * scratch_elements<T>(p.N);
    T* h = W + p.N * stride;
    Index row = rows * thread / p.threads;
    const Index end = rows * (thread + 1) / p.threads;
    while (row < end) {
      const Index g = row / p.B;
      const Index stop = end < (g + 1) * p.B ? end : (g + 1) * p.B;
      pack(p, g, W);
      while (row < stop) {
        const Index blocks = (stop - row + kMaxRows - 1) / kMaxRows;
        const int R = int((stop - row + blocks - 1) / blocks);  // even blocks: no narrow last one
        scan_block(p, g, row - g * p.B, R, W, h, stride);
        row += R;
      }
    }
  }
}

}  // namespace

Index dense_scan_scratch(Index N, bool is_double) {
  return is_double ? scratch_elements<double>(N) : scratch_elements<float>(N);
}
void dense_scan(const DenseScan<float>& p) { run(p); }
void dense_scan(const DenseScan<double>& p) { run(p); }

}  // namespace ssm_fast::SSM_FAST_ISA
