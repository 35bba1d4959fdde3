// network_step: a whole network's step in one call, a program of instructions on blocks of rows; docs/architecture.md.
#include "elementary.h"
#include "ops.h"
#include "recurrence.h"
#include "simd.h"

namespace ssm_fast::SSM_FAST_ISA {
namespace {

template <class T>
constexpr int kBlockRows = kWidth<T> < 8 ? kWidth<T> : 8;  // rows that share a pass over the weights

// A product x W^T: x holds rows of `stride` elements, zero from K on; W is [M, K], contiguous.
template <class T>
struct Product {
  const T* x;
  Index stride;
  const T* W;
  Index K;
};

// The sums of kWidth vectors, in order: log2(kWidth) rounds that halve the vectors.
template <class T>
inline Vector<T> sums(Vector<T> (&x)[kWidth<T>]) {
#pragma GCC unroll 8
  for (int half = kWidth<T> / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) {
      const auto pair = interleave<T>(x[i], x[i + half]);
      x[i] = pair.low + pair.high;
    }
  }
  return x[0];
}

// acc[o * R + r] += the products, lane by lane, of row r of x and row o of W; O = kWidth / R rows of W.
template <class T, int R>
inline void accumulate(const Product<T>& p, const T* const* w, Vector<T> (&acc)[kWidth<T>]) {
  constexpr int L = kWidth<T>, O = L / R;
  const auto add = [&](const Vector<T>(&weights)[O], Index k) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector<T> x = load(p.x + r * p.stride + k);
#pragma GCC unroll 16
      for (int o = 0; o < O; ++o) acc[o * R + r] = fused_vector(x, weights[o], acc[o * R + r]);
    }
  };
  Index k = 0;
  Vector<T> weights[O];
  for (; k + L <= p.K; k += L) {
#pragma GCC unroll 16
    for (int o = 0; o < O; ++o) weights[o] = load(w[o] + k);
    add(weights, k);
  }
  if (k == p.K) return;
#pragma GCC unroll 16
  for (int o = 0; o < O; ++o) weights[o] = load_part(w[o] + k, int(p.K - k));
  add(weights, k);
}

// y[r][m] = bias[m] + the sum of the products' rows, for R rows and M outputs.
//
// Weights are read as they lie, in dot products: nothing is packed that could be out of date.
template <class T, int R, int P>
void affine(const Product<T> (&products)[P], const T* bias, Index M, T* y, Index stride) {
  constexpr int O = kWidth<T> / R;
  for (Index m = 0; m < M; m += O) {
    Vector<T> acc[kWidth<T>] = {};
#pragma GCC unroll 2
    for (int i = 0; i < P; ++i) {
      const T* w[O];
      for (int o = 0; o < O; ++o) w[o] = products[i].W + (m + o < M ? m + o : M - 1) * products[i].K;
      accumulate<T, R>(products[i], w, acc);
    }
    T out[kWidth<T>];
    store(out, sums<T>(acc));
    for (int o = 0; o < O && m + o < M; ++o) {
      const T offset = bias ? bias[m + o] : T(0);
      for (int r = 0; r < R; ++r) y[r * stride + m + o] = out[o * R + r] + offset;
    }
  }
}

// Normalises a row of M elements in place; what lies behind them stays zero.
template <class T>
void layer_norm(T* y, const T* weight, const T* bias, Index M, T eps) {
  const Moments<T> row = moments(y, M, eps);
  for (Index m = 0; m < M; m += kWidth<T>) {
    const Vector<T> n = (load(y + m) - row.mean) * row.rstd;
    store_at(y, m, M, fused_vector(n, load_at(weight, m, M), load_at(bias, m, M)));
  }
}

// Registers of a block: rows of features in lines of `stride` elements, zero beyond the features.
template <class T>
struct Register {
  T* at;
  Index stride;
};
template <class T>
using Registers = Register<T>[kStepRegisters];

template <class T>
Index scratch_elements(const Index* features, int registers) {
  Index row = 0;
  for (int i = 0; i < registers; ++i) row += round_up(features[i], kWidth<T>);
  return round_up(kBlockRows<T> * row, 64 / Index(sizeof(T)));
}

template <class T>
void load_observations(const NetworkStep<T>& p, Index b, int rows, Register<T> to) {
  for (int r = 0; r < rows; ++r) {
    const T* x = p.x + (b + r) * p.I;
    T* out = to.at + r * to.stride;
    if (!p.obs_mean) {
      std::memcpy(out, x, std::size_t(p.I) * sizeof(T));
      continue;
    }
    for (Index i = 0; i < p.I; ++i) {
      double v = (double(x[i]) - p.obs_mean[i]) * (1.0 / square_root(p.obs_var[i] + p.obs_eps));
      v = v > p.obs_clip ? p.obs_clip : v;
      out[i] = T(v < -p.obs_clip ? -p.obs_clip : v);
    }
  }
}

// The block's rows of a stage's state, zero where an episode begins.
template <class T>
void load_state(const NetworkStep<T>& p, const StepInstruction& i, Index b, int rows, Register<T> to) {
  if (!p.state) return;
  for (int r = 0; r < rows; ++r) {
    T* out = to.at + r * to.stride;
    if (p.reset && p.reset[b + r]) {
      std::memset(out, 0, std::size_t(i.M) * sizeof(T));
    } else {
      std::memcpy(out, p.state + i.state * p.G * p.B + (b + r) * i.M, std::size_t(i.M) * sizeof(T));
    }
  }
}

template <class T>
void save_state(const NetworkStep<T>& p, const StepInstruction& i, Index b, int rows, Register<T> from) {
  for (int r = 0; r < rows; ++r) {
    std::memcpy(p.next_state + i.state * p.G * p.B + (b + r) * i.M, from.at + r * from.stride,
                std::size_t(i.M) * sizeof(T));
  }
}

template <class T, int R>
void run_affine(const NetworkStep<T>& p, const StepInstruction& i, const T* const* weights, const Registers<T>& at) {
  const T* bias = i.bias < 0 ? nullptr : weights[i.bias];
  const Register<T> to = at[i.to];
  const Product<T> first{at[i.x].at, at[i.x].stride, weights[i.W], i.K};
  if (i.x2 < 0 || (i.x2_is_state && !p.state)) {
    affine<T, R, 1>({first}, bias, i.M, to.at, to.stride);
  } else {
    affine<T, R, 2>({first, {at[i.x2].at, at[i.x2].stride, weights[i.W2], i.K2}}, bias, i.M, to.at, to.stride);
  }
}

// to = [to +] tanh(x), over whole rows.
template <class T>
void run_tanh(const T* x, T* to, bool add, Index count) {
  for (Index m = 0; m < count; m += kWidth<T>) {
    const Vector<T> out = tanh<T>(load(x + m));
    store(to + m, add ? load(to + m) + out : out);
  }
}

template <class T>
void choose_actions(const NetworkStep<T>& p, const T* log_stds, Index b, int rows, Register<T> means) {
  constexpr T kHalfLogTwoPi = T(0.91893853320467274178);
  T energy[kBlockRows<T>] = {};
  for (Index k = 0; k < p.K; ++k) {
    const T log_std = log_stds ? log_stds[k] : T(0);
    const T std = p.noise ? exponential(log_std) : T(0);
    for (int r = 0; r < rows; ++r) {
      const T mean = means.at[r * means.stride + k];
      const Index at = (b + r) * p.K + k;
      p.action[at] = p.noise ? fused(p.noise[at], std, mean) : mean;
      const T z = p.noise ? (p.action[at] - mean) / std : T(0);
      energy[r] += fused(z * T(0.5), z, log_std + kHalfLogTwoPi);
    }
  }
  for (int r = 0; log_stds && r < rows; ++r) p.log_prob[b + r] = -energy[r];
}

// R rows of one group, of which the first `rows` are real, through the whole network.
template <class T, int R>
void step_rows(const NetworkStep<T>& p, const T* const* weights, Index b, int rows, const Registers<T>& at) {
  load_observations(p, b, rows, at[0]);
  for (const StepInstruction* i = p.program; i != p.program + p.instructions; ++i) {
    const Register<T> to = at[i->to];
    switch (i->kind) {
      case StepKind::load_state: load_state(p, *i, b, rows, to); break;
      case StepKind::save_state: save_state(p, *i, b, rows, to); break;
      case StepKind::affine: run_affine<T, R>(p, *i, weights, at); break;
      case StepKind::tanh: run_tanh(at[i->x].at, to.at, false, R * to.stride); break;
      case StepKind::add_tanh: run_tanh(at[i->x].at, to.at, true, R * to.stride); break;
      case StepKind::layer_norm:
        for (int r = 0; r < R; ++r) layer_norm(to.at + r * to.stride, weights[i->W], weights[i->bias], i->M, T(i->eps));
        break;
    }
  }
  choose_actions(p, p.log_std < 0 ? nullptr : weights[p.log_std], b, rows, at[p.mean]);
  for (int r = 0; p.value && r < rows; ++r) p.value[b + r] = at[p.value_register].at[r * at[p.value_register].stride];
}

template <class T>
void step_block(const NetworkStep<T>& p, const T* const* weights, Index b, int rows, const Registers<T>& at) {
  if (rows == 1) return step_rows<T, 1>(p, weights, b, rows, at);
  if (rows == 2) return step_rows<T, 2>(p, weights, b, rows, at);
  if constexpr (kBlockRows<T> > 2) {
    if (rows <= 4) return step_rows<T, 4>(p, weights, b, rows, at);
  }
  if constexpr (kBlockRows<T> > 4) step_rows<T, kBlockRows<T>>(p, weights, b, rows, at);
}

template <class T>
void compute(const NetworkStep<T>& p) {
  constexpr int R = kBlockRows<T>;
  const Index blocks_of_group = (p.B + R - 1) / R, blocks = p.G * blocks_of_group;
  const Index elements = scratch_elements<T>(p.features, p.registers);
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (int thread = 0; thread < p.threads; ++thread) {
    T* next = p.scratch + thread * elements;
    std::memset(next, 0, std::size_t(elements) * sizeof(T));
    Registers<T> at;
    for (int i = 0; i < p.registers; ++i) {
      at[i] = {next, round_up(p.features[i], kWidth<T>)};
      next += R * at[i].stride;
    }
    for (Index block = blocks * thread / p.threads; block < blocks * (thread + 1) / p.threads; ++block) {
      const Index g = block / blocks_of_group, b = block % blocks_of_group * R;
      step_block(p, p.weights + g * p.P, g * p.B + b, int(p.B - b < R ? p.B - b : R), at);
    }
  }
}

constexpr Index kParallelRows = 16;  // rows that are worth a thread

template <class T>
Cost cost_of(const NetworkStep<T>& p) {
  const Index rows = p.G * p.B;
  return {double(rows) * double(p.parameters), rows / kParallelRows, scratch_elements<T>(p.features, p.registers)};
}

}  // namespace

SSM_FAST_DEFINE_REAL(NetworkStep)

}  // namespace ssm_fast::SSM_FAST_ISA
