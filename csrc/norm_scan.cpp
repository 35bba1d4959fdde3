// norm_scan: dense_scan with a LayerNorm on the state, and its two linear sweeps; docs/ops/norm_scan.md.
#include "ops.h"
#include "recurrence.h"
#include "simd.h"

namespace ssm_fast::SSM_FAST_ISA {
namespace {

template <class T>
inline T sum(Vector<T> v) {
  T lanes[kWidth<T>];
  store(lanes, v);
#pragma GCC unroll 8
  for (int half = kWidth<T> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <class T>
inline T square_root(T x) {
  if constexpr (sizeof(T) == 4) {
    return __builtin_sqrtf(x);
  } else {
    return __builtin_sqrt(x);
  }
}

// Loads and stores of the vector at column `c` of rows that hold N elements.
template <class T>
inline Vector<T> load_at(const T* row, Index c, Index N) {
  return c + kWidth<T> <= N ? load(row + c) : load_part(row + c, int(N - c));
}
template <class T>
inline void store_at(T* row, Index c, Index N, Vector<T> v) {
  if (c + kWidth<T> <= N) {
    store(row + c, v);
  } else {
    store_part(row + c, v, int(N - c));
  }
}

// What one row reads and writes in a step, beside the state block. Null where an argument is left out.
template <class T>
struct Row {
  const T* source;  // tangent: what enters behind the norm; adjoint: what enters before it
  T* normalised;    // forward writes it, the others read it
  T* rstd;
  T *first, *second;  // forward: s; tangent: the tangents of s and z; adjoint: those of z and s
};

// forward: z -> n = (z - mean) rstd, s = n w + b. `z` becomes s.
template <class T>
inline void normalise(const Row<T>& row, T* z, const T* weight, const T* bias, Index N, T eps) {
  constexpr int L = kWidth<T>;
  Vector<T> total{};
  for (Index c = 0; c < N; c += L) total += load(z + c);
  const Vector<T> mean = broadcast(sum<T>(total) / T(N));
  Vector<T> squares{};
  for (Index c = 0; c < N; c += L) {
    Vector<T> d = load(z + c) - mean;
    if (c + L > N) {
      T part[L] = {};
      store_part(part, d, int(N - c));
      d = load(part);
    }
    squares = fused_vector(d, d, squares);
  }
  const T rstd = T(1) / square_root(sum<T>(squares) / T(N) + eps);
  const Vector<T> scale = broadcast(rstd);
  for (Index c = 0; c < N; c += L) {
    const Vector<T> n = (load(z + c) - mean) * scale;
    const Vector<T> s = fused_vector(n, load(weight + c), load(bias + c));
    store(z + c, s);
    store_at(row.first, c, N, s);
    if (row.normalised) store_at(row.normalised, c, N, n);
  }
  if (row.rstd) *row.rstd = rstd;
}

// tangent: z -> s = source + w rstd (z - mean(z) - n mean(z n)). `z` becomes s.
template <class T>
inline void push_forward(const Row<T>& row, T* z, const T* weight, Index N) {
  constexpr int L = kWidth<T>;
  Vector<T> plain{}, weighted{};
  for (Index c = 0; c < N; c += L) {
    const Vector<T> x = load(z + c);
    plain += x;
    weighted = fused_vector(x, load_at(row.normalised, c, N), weighted);
  }
  const Vector<T> mean = broadcast(sum<T>(plain) / T(N)), mean_n = broadcast(sum<T>(weighted) / T(N));
  const Vector<T> scale = broadcast(*row.rstd);
  for (Index c = 0; c < N; c += L) {
    const Vector<T> x = load(z + c);
    const Vector<T> n = load_at(row.normalised, c, N);
    const Vector<T> projected = (x - mean - n * mean_n) * scale;
    const Vector<T> source = row.source ? load_at(row.source, c, N) : Vector<T>{};
    const Vector<T> s = fused_vector(projected, load(weight + c), source);
    store_at(row.second, c, N, x);
    store(z + c, s);
    store_at(row.first, c, N, s);
  }
}

// adjoint: s -> z = source + rstd (p - mean(p) - n mean(p n)) with p = w s. `s` becomes z.
template <class T>
inline void pull_back(const Row<T>& row, T* s, const T* weight, Index N) {
  constexpr int L = kWidth<T>;
  Vector<T> plain{}, weighted{};
  for (Index c = 0; c < N; c += L) {
    const Vector<T> p = load(s + c) * load(weight + c);
    plain += p;
    weighted = fused_vector(p, load_at(row.normalised, c, N), weighted);
  }
  const Vector<T> mean = broadcast(sum<T>(plain) / T(N)), mean_n = broadcast(sum<T>(weighted) / T(N));
  const Vector<T> scale = broadcast(*row.rstd);
  for (Index c = 0; c < N; c += L) {
    const Vector<T> x = load(s + c);
    const Vector<T> p = x * load(weight + c);
    const Vector<T> n = load_at(row.normalised, c, N);
    const Vector<T> source = row.source ? load_at(row.source, c, N) : Vector<T>{};
    const Vector<T> z = fused_vector(p - mean - n * mean_n, scale, source);
    store_at(row.second, c, N, x);
    store(s + c, z);
    store_at(row.first, c, N, z);
  }
}

// All of time for R consecutive rows of one group. `h` holds two [R, stride] state blocks.
template <class T, int R>
void scan_rows(const NormScan<T>& p, Index g, Index b, const T* W, const T* weight, const T* bias, T* h, Index stride) {
  const bool reverse = p.sweep == Sweep::adjoint;
  const Index step = reverse ? -1 : 1;
  T* h_next = h + R * stride;
  std::memset(h, 0, std::size_t(2 * R * stride) * sizeof(T));
  for (int r = 0; p.s0 && r < R; ++r) {
    std::memcpy(h + r * stride, p.s0 + g * p.s0_g + (b + r) * p.s0_b, std::size_t(p.N) * sizeof(T));
  }
  const std::uint8_t* reset = p.reset ? p.reset + g * p.reset_g + b * p.reset_b : nullptr;
  for (Index i = 0, t = reverse ? p.T_len - 1 : 0; i < p.T_len; ++i, t += step) {
    const Index gate = reverse ? t + 1 : t;  // the step whose reset cuts the incoming state
    if (reset && gate < p.T_len) {
      for (int r = 0; r < R; ++r) {
        if (reset[r * p.reset_b + gate * p.reset_t]) {
          std::memset(h + r * stride, 0, std::size_t(p.N) * sizeof(T));
        }
      }
    }
    const T* u[R];
    for (int r = 0; r < R; ++r) u[r] = p.u + g * p.u_g + (b + r) * p.u_b + t * p.u_t;
    multiply_step<T, R, false>(u, nullptr, h, stride, h_next, W, p.N);
    for (int r = 0; r < R; ++r) {
      const Index out = g * p.s_g + (b + r) * p.s_b + t * p.s_t;
      const Index saved = g * p.n_g + (b + r) * p.n_b + t * p.n_t;
      const Row<T> row{p.c ? p.c + g * p.c_g + (b + r) * p.c_b + t * p.c_t : nullptr, p.n ? p.n + saved : nullptr,
                       p.rstd ? p.rstd + (g * p.B + b + r) * p.T_len + t : nullptr, p.s + out,
                       p.x ? p.x + out : nullptr};
      T* state = h_next + r * stride;
      if (p.sweep == Sweep::forward) {
        normalise(row, state, weight, bias, p.N, p.eps);
      } else if (p.sweep == Sweep::tangent) {
        push_forward(row, state, weight, p.N);
      } else {
        pull_back(row, state, weight, p.N);
      }
    }
    T* swap = h;
    h = h_next;
    h_next = swap;
  }
}

template <class T>
Index scratch_elements(Index N) {
  const Index padded = round_up(N, kWidth<T>);
  return round_up(N * padded + 2 * padded + 2 * kMaxRows * padded, 64 / Index(sizeof(T)));
}

template <class T>
void run(const NormScan<T>& p) {
  const Index stride = round_up(p.N, kWidth<T>);
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (int thread = 0; thread < p.threads; ++thread) {
    T* weight = p.scratch + thread * scratch_elements<T>(p.N);
    T* bias = weight + stride;
    T* h = bias + stride;
    T* W = h + 2 * kMaxRows * stride;
    std::memset(weight, 0, std::size_t(2 * stride) * sizeof(T));
    const auto enter = [&](Index g) {
      pack(p.A + g * p.A_g, p.A_row, p.A_col, p.N, W);
      std::memcpy(weight, p.weight + g * p.weight_g, std::size_t(p.N) * sizeof(T));
      if (p.bias) std::memcpy(bias, p.bias + g * p.bias_g, std::size_t(p.N) * sizeof(T));
    };
    for_row_blocks(p.G, p.B, thread, p.threads, enter, [&](Index g, Index b, int rows) {
      switch (rows) {
        case 1: return scan_rows<T, 1>(p, g, b, W, weight, bias, h, stride);
        case 2: return scan_rows<T, 2>(p, g, b, W, weight, bias, h, stride);
        case 3: return scan_rows<T, 3>(p, g, b, W, weight, bias, h, stride);
        case 4: return scan_rows<T, 4>(p, g, b, W, weight, bias, h, stride);
        case 5: return scan_rows<T, 5>(p, g, b, W, weight, bias, h, stride);
        default: return scan_rows<T, kMaxRows>(p, g, b, W, weight, bias, h, stride);
      }
    });
  }
}

}  // namespace

Index norm_scan_scratch(Index N, bool is_double) {
  return is_double ? scratch_elements<double>(N) : scratch_elements<float>(N);
}
void norm_scan(const NormScan<float>& p) { run(p); }
void norm_scan(const NormScan<double>& p) { run(p); }

}  // namespace ssm_fast::SSM_FAST_ISA
