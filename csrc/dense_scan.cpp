// dense_scan: a block of rows advances through time with the state matrix in cache; docs/ops/dense_scan.md.
#include "ops.h"
#include "recurrence.h"
#include "simd.h"

namespace ssm_fast::SSM_FAST_ISA {
namespace {

// All of time for R consecutive rows of one group. The state of a row is read where the step before
// stored it; `zeros` is a state of N zeros.
template <class T, int R>
void scan_rows(const DenseScan<T>& p, Index g, Index b, const T* W, const T* zeros) {
  const Index first = p.reverse ? p.T_len - 1 : 0;
  const Index step = p.reverse ? -1 : 1;
  const T *u[R], *h[R];
  T* s[R];
  for (int r = 0; r < R; ++r) {
    u[r] = p.u + g * p.u_g + (b + r) * p.u_b + first * p.u_t;
    s[r] = p.s + g * p.s_g + (b + r) * p.s_b + first * p.s_t;
    h[r] = p.s0 ? p.s0 + g * p.s0_g + (b + r) * p.s0_b : zeros;
  }
  const std::uint8_t* reset = p.reset ? p.reset + g * p.reset_g + b * p.reset_b : nullptr;
  for (Index i = 0, t = first; i < p.T_len; ++i, t += step) {
    const Index gate = p.reverse ? t + 1 : t;  // the step whose reset cuts the incoming state
    if (reset && gate < p.T_len) {
      for (int r = 0; r < R; ++r) {
        if (reset[r * p.reset_b + gate * p.reset_t]) h[r] = zeros;
      }
    }
    multiply_step<T, R>(u, h, s, W, p.N);
    for (int r = 0; r < R; ++r) {
      h[r] = s[r];
      u[r] += step * p.u_t;
      s[r] += step * p.s_t;
    }
  }
}

template <class T>
void scan_block(const DenseScan<T>& p, Index g, Index b, int rows, const T* W, const T* zeros) {
  switch (rows) {
    case 1: return scan_rows<T, 1>(p, g, b, W, zeros);
    case 2: return scan_rows<T, 2>(p, g, b, W, zeros);
    case 3: return scan_rows<T, 3>(p, g, b, W, zeros);
    case 4: return scan_rows<T, 4>(p, g, b, W, zeros);
    case 5: return scan_rows<T, 5>(p, g, b, W, zeros);
    default: return scan_rows<T, kMaxRows>(p, g, b, W, zeros);
  }
}

template <class T>
Index scratch_elements(Index N) {
  return round_up((N + 1) * round_up(N, kWidth<T>), 64 / Index(sizeof(T)));
}

template <class T>
void run(const DenseScan<T>& p) {
  const Index stride = round_up(p.N, kWidth<T>);
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (int thread = 0; thread < p.threads; ++thread) {
    T* W = p.scratch + thread * scratch_elements<T>(p.N);
    T* zeros = W + p.N * stride;
    std::memset(zeros, 0, std::size_t(stride) * sizeof(T));
    for_row_blocks(
        p.G, p.B, thread, p.threads, [&](Index g) { pack(p.A + g * p.A_g, p.A_row, p.A_col, p.N, W); },
        [&](Index g, Index b, int rows) { scan_block(p, g, b, rows, W, zeros); });
  }
}

}  // namespace

Index dense_scan_scratch(Index N, bool is_double) {
  return is_double ? scratch_elements<double>(N) : scratch_elements<float>(N);
}
void dense_scan(const DenseScan<float>& p) { run(p); }
void dense_scan(const DenseScan<double>& p) { run(p); }

}  // namespace ssm_fast::SSM_FAST_ISA
