// gae and discounted_returns: linear_scan in reverse with the temporal difference fused in; docs/ops/gae.md.
#include "ops.h"
#include "simd.h"

namespace ssm_fast::SSM_FAST_ISA {
namespace {

constexpr Index kColumns = 1024;

// The source term of one step, and the coefficient of the step behind it; zero where that is cut off.
template <class T>
struct Step {
  T source, coefficient;
};

// A value that is not used may be anything, NaN included, so it is left out rather than multiplied by zero.
template <class T>
inline Step<T> step_of(const Gae<T>& p, Index i, bool) {
  const T bootstrap = p.terminated[i] ? T(0) : p.next_values[i];
  const T coefficient = (p.terminated[i] | p.truncated[i]) ? T(0) : p.gamma * p.gae_lambda;
  return {fused(p.gamma, bootstrap, p.rewards[i]) - p.values[i], coefficient};
}
template <class T>
inline void write(const Gae<T>& p, Index i, T scanned) {
  p.advantages[i] = scanned;
  p.returns[i] = scanned + p.values[i];
}

template <class T>
inline Step<T> step_of(const DiscountedReturns<T>& p, Index i, bool last) {
  const bool ends = (int(p.truncated[i]) | int(last)) != 0;
  const T bootstrap = (ends && !p.terminated[i]) ? p.next_values[i] : T(0);
  return {fused(p.gamma, bootstrap, p.rewards[i]), (ends || p.terminated[i]) ? T(0) : p.gamma};
}
template <class T>
inline void write(const DiscountedReturns<T>& p, Index i, T scanned) {
  p.returns[i] = scanned;
}

// coefficient * later + source, where a coefficient of zero cuts off whatever came later.
template <class T>
inline T advance(T coefficient, T later, T source) {
  return coefficient == T(0) ? source : fused(coefficient, later, source);
}

// Columns are contiguous: `later` holds the scanned values of the step behind.
template <class T, class P>
void scan_columns(const P& p, Index m, Index c, Index count) {
  T later[kColumns];
  std::memset(later, 0, sizeof(later));
  for (Index t = p.T_len - 1; t >= 0; --t) {
    const Index row = (m * p.T_len + t) * p.C + c;
    const bool last = t == p.T_len - 1;
#pragma GCC ivdep
    for (Index j = 0; j < count; ++j) {
      const Step<T> step = step_of(p, row + j, last);
      later[j] = advance(step.coefficient, later[j], step.source);
      write(p, row + j, later[j]);
    }
  }
}

// Time is contiguous: kWidth rows at once, each tile transposed so that the rows advance together.
template <class T, class P>
void scan_rows(const P& p, Index m) {
  constexpr int W = kWidth<T>;
  Vector<T> later{};
  for (Index stop = p.T_len; stop > 0; stop -= W) {
    const Index t = stop < W ? 0 : stop - W;
    const int width = int(stop - t);
    Vector<T> source[W] = {}, coefficient[W] = {};
    for (int r = 0; r < W; ++r) {
      const Index row = (m + r) * p.T_len + t;
      T sources[W] = {}, coefficients[W] = {};
#pragma GCC ivdep
      for (int j = 0; j < width; ++j) {
        const Step<T> step = step_of(p, row + j, t + j == p.T_len - 1);
        sources[j] = step.source;
        coefficients[j] = step.coefficient;
      }
      source[r] = load(sources);
      coefficient[r] = load(coefficients);
    }
    transpose<T>(source);
    transpose<T>(coefficient);
    for (int j = width - 1; j >= 0; --j) {
      later = coefficient[j] == Vector<T>{} ? source[j] : fused_vector(coefficient[j], later, source[j]);
      source[j] = later;
    }
    transpose<T>(source);
    for (int r = 0; r < W; ++r) {
      const Index row = (m + r) * p.T_len + t;
      T scanned[W];
      store(scanned, source[r]);
#pragma GCC ivdep
      for (int j = 0; j < width; ++j) write(p, row + j, scanned[j]);
    }
  }
}

template <class T, class P>
void run(const P& p) {
  Index rows = 0;
  if (p.C == 1) {
    const Index blocks = p.M / kWidth<T>;
#pragma omp parallel for schedule(static) num_threads(p.threads)
    for (Index block = 0; block < blocks; ++block) scan_rows<T>(p, block * kWidth<T>);
    rows = blocks * kWidth<T>;
  }
  const Index chunks = (p.C + kColumns - 1) / kColumns;
  const Index columns = (p.C + chunks - 1) / chunks;
#pragma omp parallel for collapse(2) schedule(static) num_threads(p.threads)
  for (Index m = rows; m < p.M; ++m) {
    for (Index chunk = 0; chunk < chunks; ++chunk) {
      const Index c = chunk * columns;
      scan_columns<T>(p, m, c, p.C - c < columns ? p.C - c : columns);
    }
  }
}

}  // namespace

void gae(const Gae<float>& p) { run<float>(p); }
void gae(const Gae<double>& p) { run<double>(p); }
void discounted_returns(const DiscountedReturns<float>& p) { run<float>(p); }
void discounted_returns(const DiscountedReturns<double>& p) { run<double>(p); }

}  // namespace ssm_fast::SSM_FAST_ISA
