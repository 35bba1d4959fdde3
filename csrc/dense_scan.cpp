// dense_scan: a block of rows keeps its state in L1 while time advances; docs/ops/dense_scan.md.
#include "ops.h"
#include "recurrence.h"
#include "simd.h"

namespace ssm_fast::SSM_FAST_ISA {
namespace {

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
    multiply_step<T, R, true>(u, s, h, stride, h_next, W, p.N);
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
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (int thread = 0; thread < p.threads; ++thread) {
    T* W = p.scratch + thread * scratch_elements<T>(p.N);
    T* h = W + p.N * stride;
    for_row_blocks(
        p.G, p.B, thread, p.threads, [&](Index g) { pack(p.A + g * p.A_g, p.A_row, p.A_col, p.N, W); },
        [&](Index g, Index b, int rows) { scan_block(p, g, b, rows, W, h, stride); });
  }
}

}  // namespace

Index dense_scan_scratch(Index N, bool is_double) {
  return is_double ? scratch_elements<double>(N) : scratch_elements<float>(N);
}
void dense_scan(const DenseScan<float>& p) { run(p); }
void dense_scan(const DenseScan<double>& p) { run(p); }

}  // namespace ssm_fast::SSM_FAST_ISA
