// norm_scan: dense_scan with a LayerNorm on the state, and its two linear sweeps; docs/ops/norm_scan.md.
#include "elementary.h"
#include "ops.h"
#include "recurrence.h"
#include "simd.h"

namespace ssm_fast::SSM_FAST_ISA {
namespace {

// What R rows read and write in a step; null where an argument is left out. Every loop below runs
// over the rows inside, so that the rows hide the latency of each other's sums and roots.
template <class T, int R>
struct Rows {
  const T* source[R];  // tangent: what enters behind the norm; adjoint: what enters before it
  T* n[R];             // forward writes the normalised state, the others read it
  T* rstd[R];
  T *first[R], *second[R];           // forward: s; tangent: the tangents of s and z; adjoint: those of z and s
  T *weight_grad[R], *bias_grad[R];  // adjoint: sums over time
};

// forward: z -> n = (z - mean) rstd, s = n w + b.
template <class T, int R>
inline void normalise(const Rows<T, R>& row, T* const* z, const T* weight, const T* bias, Index N, T eps) {
  constexpr int L = kWidth<T>;
  Vector<T> total[R] = {}, squares[R] = {}, mean[R], scale[R];
  for (Index c = 0; c < N; c += L) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) total[r] += load(z[r] + c);
  }
  map_sums<T>(total, [&](Vector<T> sums) { return sums / T(N); }, mean);
  for (Index c = 0; c < N; c += L) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector<T> d = deviation(z[r], c, N, mean[r]);
      squares[r] = fused_vector(d, d, squares[r]);
    }
  }
  map_sums<T>(squares, [&](Vector<T> sums) { return T(1) / roots(sums / T(N) + eps); }, scale);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    if (row.rstd[r]) *row.rstd[r] = scale[r][0];
  }
  for (Index c = 0; c < N; c += L) {
    const Vector<T> w = load(weight + c), b = load(bias + c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector<T> n = (load(z[r] + c) - mean[r]) * scale[r];
      store_at(row.first[r], c, N, fused_vector(n, w, b));
      if (row.n[r]) store_at(row.n[r], c, N, n);
    }
  }
}

// tangent: z -> s = source + w rstd (z - mean(z) - n mean(z n)).
template <class T, int R>
inline void push_forward(const Rows<T, R>& row, T* const* z, const T* weight, Index N) {
  constexpr int L = kWidth<T>;
  Vector<T> plain[R] = {}, weighted[R] = {}, mean[R], along[R], scale[R];
  for (Index c = 0; c < N; c += L) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector<T> x = load(z[r] + c);
      plain[r] += x;
      weighted[r] = fused_vector(x, load_at(row.n[r], c, N), weighted[r]);
    }
  }
  const auto over_N = [&](Vector<T> sums) { return sums / T(N); };
  map_sums<T>(plain, over_N, mean);
  map_sums<T>(weighted, over_N, along);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) scale[r] = broadcast(*row.rstd[r]);
  for (Index c = 0; c < N; c += L) {
    const Vector<T> w = load(weight + c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector<T> x = load(z[r] + c);
      const Vector<T> projected = (x - mean[r] - load_at(row.n[r], c, N) * along[r]) * scale[r];
      const Vector<T> source = row.source[r] ? load_at(row.source[r], c, N) : Vector<T>{};
      store_at(row.second[r], c, N, x);
      store_at(row.first[r], c, N, fused_vector(projected, w, source));
    }
  }
}

// adjoint: s -> z = source + rstd (p - mean(p) - n mean(p n)) with p = w s.
template <class T, int R>
inline void pull_back(const Rows<T, R>& row, T* const* s, const T* weight, Index N) {
  constexpr int L = kWidth<T>;
  Vector<T> plain[R] = {}, weighted[R] = {}, mean[R], along[R], scale[R];
  for (Index c = 0; c < N; c += L) {
    const Vector<T> w = load(weight + c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector<T> x = load(s[r] + c), n = load_at(row.n[r], c, N);
      const Vector<T> p = x * w;
      plain[r] += p;
      weighted[r] = fused_vector(p, n, weighted[r]);
      if (row.weight_grad[r]) {
        store(row.weight_grad[r] + c, fused_vector(x, n, load(row.weight_grad[r] + c)));
        store(row.bias_grad[r] + c, load(row.bias_grad[r] + c) + x);
      }
    }
  }
  const auto over_N = [&](Vector<T> sums) { return sums / T(N); };
  map_sums<T>(plain, over_N, mean);
  map_sums<T>(weighted, over_N, along);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) scale[r] = broadcast(*row.rstd[r]);
  for (Index c = 0; c < N; c += L) {
    const Vector<T> w = load(weight + c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector<T> x = load(s[r] + c);
      const Vector<T> projected = x * w - mean[r] - load_at(row.n[r], c, N) * along[r];
      const Vector<T> source = row.source[r] ? load_at(row.source[r], c, N) : Vector<T>{};
      if (row.second[r]) store_at(row.second[r], c, N, x);
      store_at(row.first[r], c, N, fused_vector(projected, scale[r], source));
    }
  }
}

// What one thread works in, vectors padded with zeros to whole registers.
template <class T>
struct Scratch {
  T *weight, *bias, *zeros;
  T* product;  // [kMaxRows, stride]: of the state matrix and the state
  T* W;
  Index stride;
};

template <class T>
Index scratch_elements(Index N) {
  return round_up((N + 3 + kMaxRows) * round_up(N, kWidth<T>), 64 / Index(sizeof(T)));
}

// The sums over time of a row, [2, stride]; they lie behind the scratch memory of the threads.
template <class T>
T* row_sums(const NormScan<T>& p, Index row) {
  return p.scratch + p.threads * scratch_elements<T>(p.N) + row * 2 * round_up(p.N, kWidth<T>);
}

// All of time for R consecutive rows of one group. The state of a row is read where the step before
// stored it.
template <class T, int R, int kSums, Sweep kSweep>
void scan_rows(const NormScan<T>& p, Index g, Index b, const Scratch<T>& scratch) {
  const bool reverse = kSweep == Sweep::adjoint;
  const Index step = reverse ? -1 : 1;
  const T *u[R], *h[R];
  T* product[R];
  Rows<T, R> row{};
  const Index first = reverse ? p.T_len - 1 : 0;
  for (int r = 0; r < R; ++r) {
    const Index i = b + r;
    u[r] = p.u.at(g, i, first);
    h[r] = p.s0 ? p.s0.at(g, i) : scratch.zeros;
    product[r] = scratch.product + r * scratch.stride;
    row.source[r] = p.c.at(g, i, first);
    row.n[r] = p.n.at(g, i, first);
    if (p.rstd) row.rstd[r] = p.rstd + (g * p.B + i) * p.T_len + first;
    row.first[r] = p.s.at(g, i, first);
    row.second[r] = p.x.at(g, i, first);
    if (p.weight_grad) {
      row.weight_grad[r] = row_sums(p, g * p.B + i);
      row.bias_grad[r] = row.weight_grad[r] + scratch.stride;
      std::memset(row.weight_grad[r], 0, std::size_t(2 * scratch.stride) * sizeof(T));
    }
  }
  for (Index i = 0, t = first; i < p.T_len; ++i, t += step) {
    const Index gate = reverse ? t + 1 : t;  // the step whose reset cuts the incoming state
    if (p.reset && gate < p.T_len) {
      for (int r = 0; r < R; ++r) {
        if (*p.reset.at(g, b + r, gate)) h[r] = scratch.zeros;
      }
    }
    if (i + kAhead < p.T_len) {
      prefetch<T>(u, R, kAhead * step * p.u.strides[2], p.N);
      if (kSweep != Sweep::forward) prefetch<T>(row.n, R, kAhead * step * p.n.strides[2], p.N);
      if (kSweep == Sweep::adjoint) prefetch<T>(row.first, R, kAhead * step * p.s.strides[2], p.N);
    }
    multiply_rows<T, R, kSums>(u, h, product, scratch.W, p.N, p.N);
    if constexpr (kSweep == Sweep::forward) {
      normalise<T, R>(row, product, scratch.weight, scratch.bias, p.N, p.eps);
    } else if constexpr (kSweep == Sweep::tangent) {
      push_forward<T, R>(row, product, scratch.weight, p.N);
    } else {
      pull_back<T, R>(row, product, scratch.weight, p.N);
    }
    for (int r = 0; r < R; ++r) {
      h[r] = row.first[r];
      u[r] += step * p.u.strides[2];
      if (row.source[r]) row.source[r] += step * p.c.strides[2];
      if (row.n[r]) row.n[r] += step * p.n.strides[2];
      if (row.rstd[r]) row.rstd[r] += step;
      row.first[r] += step * p.s.strides[2];
      if (row.second[r]) row.second[r] += step * p.x.strides[2];
    }
  }
}

template <class T, int R, int kSums = kTileVectors>
void scan_block(const NormScan<T>& p, Index g, Index b, const Scratch<T>& scratch) {
  switch (p.sweep) {
    case Sweep::forward: return scan_rows<T, R, kSums, Sweep::forward>(p, g, b, scratch);
    case Sweep::tangent: return scan_rows<T, R, kSums, Sweep::tangent>(p, g, b, scratch);
    default: return scan_rows<T, R, kSums, Sweep::adjoint>(p, g, b, scratch);
  }
}

// out += in
template <class T>
inline void add(T* out, const T* in, Index N) {
#pragma GCC ivdep
  for (Index n = 0; n < N; ++n) out[n] += in[n];
}

// The gradients of weight and bias from the sums of each row, always in the order of the rows.
template <class T>
void add_rows(const NormScan<T>& p, Index stride) {
  std::memset(p.weight_grad, 0, std::size_t(p.G * p.N) * sizeof(T));
  std::memset(p.bias_grad, 0, std::size_t(p.G * p.N) * sizeof(T));
  for (Index row = 0; row < p.G * p.B; ++row) {
    const T* sums = row_sums(p, row);
    add(p.weight_grad + row / p.B * p.N, sums, p.N);
    add(p.bias_grad + row / p.B * p.N, sums + stride, p.N);
  }
}

template <class T>
void compute(const NormScan<T>& p) {
  const Index stride = round_up(p.N, kWidth<T>);
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (int thread = 0; thread < p.threads; ++thread) {
    T* weight = p.scratch + thread * scratch_elements<T>(p.N);
    T *bias = weight + stride, *zeros = bias + stride, *product = zeros + stride;
    const Scratch<T> scratch{weight, bias, zeros, product, product + kMaxRows * stride, stride};
    std::memset(weight, 0, std::size_t((3 + kMaxRows) * stride) * sizeof(T));
    const auto enter = [&](Index g) {
      pack(p.A, g, p.N, p.N, scratch.W);
      std::memcpy(weight, p.weight.at(g), std::size_t(p.N) * sizeof(T));
      if (p.bias) std::memcpy(bias, p.bias.at(g), std::size_t(p.N) * sizeof(T));
    };
    for_row_blocks(p.G, p.B, thread, p.threads, kMaxRows, enter, [&](Index g, Index b, int rows) {
      if (p.B == 1) return scan_block<T, 1, kLoneSums>(p, g, b, scratch);
      switch (rows) {
        case 1: return scan_block<T, 1>(p, g, b, scratch);
        case 2: return scan_block<T, 2>(p, g, b, scratch);
        case 3: return scan_block<T, 3>(p, g, b, scratch);
        case 4: return scan_block<T, 4>(p, g, b, scratch);
        case 5: return scan_block<T, 5>(p, g, b, scratch);
        default: return scan_block<T, kMaxRows>(p, g, b, scratch);
      }
    });
  }
  if (p.weight_grad) add_rows(p, stride);
}

template <class T>
Cost cost_of(const NormScan<T>& p) {
  return {double(p.G * p.B * p.T_len) * double(p.N * p.N), p.G * p.B, scratch_elements<T>(p.N),
          p.weight_grad ? p.G * p.B * 2 * round_up(p.N, kWidth<T>) : 0};
}

}  // namespace

SSM_FAST_DEFINE_REAL(NormScan)

}  // namespace ssm_fast::SSM_FAST_ISA
