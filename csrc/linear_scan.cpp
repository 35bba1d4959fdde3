// linear_scan: elementwise first-order recurrence; docs/ops/linear_scan.md.
#include "ops.h"
#include "simd.h"

namespace ssm_fast::SSM_FAST_ISA {
namespace {

constexpr Index kColumns = 2048;  // columns a thread takes at once: their state stays in L1

template <class T>
inline T multiply_add(T a, T h, T b) {
  return fused(a, h, b);
}

template <class T>
inline Complex<T> multiply_add(Complex<T> a, Complex<T> h, Complex<T> b) {
  return {fused(-a.im, h.im, fused(a.re, h.re, b.re)), fused(a.im, h.re, fused(a.re, h.im, b.im))};
}

// One step for `count` columns; a_c is 0 (one coefficient for all of them) or 1.
template <class T>
inline void advance(const T* __restrict a, Index a_c, const T* __restrict previous, const T* __restrict b,
                    T* __restrict h, Index count) {
  if (a_c == 0) {
    const T a_0 = *a;
#pragma GCC ivdep
    for (Index c = 0; c < count; ++c) h[c] = multiply_add(a_0, previous[c], b[c]);
  } else {
#pragma GCC ivdep
    for (Index c = 0; c < count; ++c) h[c] = multiply_add(a[c], previous[c], b[c]);
  }
}

// Columns are contiguous: time is the outer loop, and the previous row of h is the state.
template <class T>
void scan_columns(const LinearScan<T>& p, Index m, Index c, Index count) {
  const Index first = p.reverse ? p.T_len - 1 : 0;
  const Index step = p.reverse ? -1 : 1;
  const T* a = p.a + m * p.a_m + first * p.a_t + c * p.a_c;
  const T* b = p.b + m * p.b_m + first * p.b_t + c;
  T* h = p.h + m * p.h_m + first * p.h_t + c;
  if (p.h0 && !p.shift) {
    advance(a, p.a_c, p.h0 + m * p.h0_m + c, b, h, count);
  } else {
    std::memcpy(h, b, std::size_t(count) * sizeof(T));
  }
  if (!p.shift) a += step * p.a_t;
  for (Index i = 1; i < p.T_len; ++i, a += step * p.a_t) {
    b += step * p.b_t;
    const T* previous = h;
    h += step * p.h_t;
    advance(a, p.a_c, previous, b, h, count);
  }
}

// Time is contiguous: kWidth rows at once, transposed tile by tile.
template <class T>
void scan_rows(const LinearScan<T>& p, Index m) {
  constexpr int W = kWidth<T>;
  Vector<T> state{};
  for (int r = 0; p.h0 && r < W; ++r) state[r] = p.h0[(m + r) * p.h0_m];
  const T* a = p.a + m * p.a_m;
  const T* b = p.b + m * p.b_m;
  T* h = p.h + m * p.h_m;
  const Index lag = p.shift ? (p.reverse ? 1 : -1) : 0;  // where a step's coefficient stands
  for (Index done = 0; done < p.T_len; done += W) {
    const int width = int(p.T_len - done < W ? p.T_len - done : W);
    const Index t = p.reverse ? p.T_len - done - width : done;
    Vector<T> a_tile[W], b_tile[W];
    for (int r = 0; r < W; ++r) {
      b_tile[r] = load_part(b + r * p.b_m + t, width);
      if (p.a_t == 0) {
        a_tile[r] = broadcast(a[r * p.a_m]);
      } else {
        const Index from = t + lag < 0 ? 0 : t + lag;
        const Index to = t + lag + width > p.T_len ? p.T_len : t + lag + width;
        Vector<T> row{};
        std::memcpy(reinterpret_cast<T*>(&row) + (from - t - lag), a + r * p.a_m + from,
                    std::size_t(to - from) * sizeof(T));
        a_tile[r] = row;
      }
    }
    transpose<T>(a_tile);
    transpose<T>(b_tile);
    for (int i = 0; i < width; ++i) {
      const int j = p.reverse ? width - 1 - i : i;
      const bool no_coefficient = done + i == 0 && (p.shift || !p.h0);
      state = no_coefficient ? b_tile[j] : fused_vector(a_tile[j], state, b_tile[j]);
      b_tile[j] = state;
    }
    transpose<T>(b_tile);
    for (int r = 0; r < W; ++r) store_part(h + r * p.h_m + t, b_tile[r], width);
  }
}

template <class T>
constexpr bool is_real = false;
template <>
constexpr bool is_real<float> = true;
template <>
constexpr bool is_real<double> = true;

template <class T>
void run(const LinearScan<T>& p) {
  Index row_blocks = 0;
  if constexpr (is_real<T>) {
    if (p.C == 1 && p.b_t == 1 && p.h_t == 1 && p.a_t <= 1) {
      row_blocks = p.M / kWidth<T>;
#pragma omp parallel for schedule(static) num_threads(p.threads)
      for (Index block = 0; block < row_blocks; ++block) scan_rows(p, block * kWidth<T>);
      row_blocks *= kWidth<T>;
    }
  }
  const Index wide = (p.C + p.threads - 1) / p.threads;
  const Index columns = p.M >= p.threads || wide > kColumns ? kColumns : (wide < 16 ? 16 : wide);
  const Index chunks = (p.C + columns - 1) / columns;
#pragma omp parallel for collapse(2) schedule(static) num_threads(p.threads)
  for (Index m = row_blocks; m < p.M; ++m) {
    for (Index chunk = 0; chunk < chunks; ++chunk) {
      const Index c = chunk * columns;
      scan_columns(p, m, c, p.C - c < columns ? p.C - c : columns);
    }
  }
}

}  // namespace

void linear_scan(const LinearScan<float>& p) { run(p); }
void linear_scan(const LinearScan<double>& p) { run(p); }
void linear_scan(const LinearScan<Complex<float>>& p) { run(p); }
void linear_scan(const LinearScan<Complex<double>>& p) { run(p); }

}  // namespace ssm_fast::SSM_FAST_ISA
