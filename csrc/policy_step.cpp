// policy_step: a whole actor-critic step in one call, on the weights as they lie; docs/ops/policy_step.md.
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

// Where a block of rows lives while it passes through the network; every row is zero beyond its size.
template <class T>
struct Buffers {
  T *x, *h, *y, *z, *state, *heads, *v, *w;
  Index I, H, N, K, W;  // strides
};

template <class T>
Index scratch_elements(Index I, Index H, Index N, Index K, Index W) {
  constexpr Index L = kWidth<T>;
  const Index row = round_up(I, L) + 2 * round_up(H, L) + 2 * round_up(N, L) + round_up(K + 1, L) + 2 * round_up(W, L);
  return round_up(kBlockRows<T> * row, 64 / Index(sizeof(T)));
}

template <class T>
void load_observations(const PolicyStep<T>& p, Index b, int rows, const Buffers<T>& w) {
  for (int r = 0; r < rows; ++r) {
    const T* x = p.x + (b + r) * p.I;
    T* out = w.x + r * w.I;
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

template <class T, int R>
void run_layer(const PolicyStep<T>& p, const PolicyLayer<T>& layer, Index l, Index b, int rows, const Buffers<T>& w) {
  const Index all = p.G * p.B;
  const Product<T> input{w.h, w.H, layer.B, p.H};
  if (p.state) {
    std::memset(w.state, 0, std::size_t(R * w.N) * sizeof(T));
    for (int r = 0; r < rows; ++r) {
      if (p.reset && p.reset[b + r]) continue;
      std::memcpy(w.state + r * w.N, p.state + (l * all + b + r) * p.N, std::size_t(p.N) * sizeof(T));
    }
    affine<T, R, 2>({input, {w.state, w.N, layer.A, p.N}}, layer.bias, p.N, w.z, w.N);
  } else {
    affine<T, R, 1>({input}, layer.bias, p.N, w.z, w.N);
  }
  for (int r = 0; r < rows; ++r) {
    T* z = w.z + r * w.N;
    if (p.norm_state && layer.norm_weight) layer_norm(z, layer.norm_weight, layer.norm_bias, p.N, p.eps);
    std::memcpy(p.next_state + (l * all + b + r) * p.N, z, std::size_t(p.N) * sizeof(T));
  }
  affine<T, R, 2>({{w.z, w.N, layer.C, p.N}, {w.h, w.H, layer.D, p.H}}, nullptr, p.H, w.y, w.H);
  for (int r = 0; r < R; ++r) {
    T *y = w.y + r * w.H, *h = w.h + r * w.H;
    if (!p.norm_state && layer.norm_weight) layer_norm(y, layer.norm_weight, layer.norm_bias, p.H, p.eps);
    for (Index m = 0; m < w.H; m += kWidth<T>) {
      const Vector<T> out = tanh<T>(load(y + m));
      store(h + m, p.residual ? load(h + m) + out : out);
    }
  }
}

template <class T>
void tanh_in_place(T* x, Index count) {
  for (Index m = 0; m < count; m += kWidth<T>) store(x + m, tanh<T>(load(x + m)));
}

// The values of R rows, behind the means of the actions.
template <class T, int R>
void run_critic(const PolicyStep<T>& p, const PolicyWeights<T>& net, const Buffers<T>& w) {
  Product<T> features{w.h, w.H, net.critic_weight, p.H};
  if (net.value_x) {
    affine<T, R, 2>({{w.x, w.I, net.value_x, p.I}, {w.h, w.H, net.value_h, p.H}}, net.value_bias, p.W, w.v, w.W);
    tanh_in_place(w.v, R * w.W);
    affine<T, R, 1>({{w.v, w.W, net.value_hidden, p.W}}, net.value_hidden_bias, p.W, w.w, w.W);
    tanh_in_place(w.w, R * w.W);
    features = {w.w, w.W, net.critic_weight, p.W};
  }
  affine<T, R, 1>({features}, net.critic_bias, 1, w.heads + p.K, w.K);
}

template <class T>
void choose_actions(const PolicyStep<T>& p, const T* log_stds, Index b, int rows, const Buffers<T>& w) {
  constexpr T kHalfLogTwoPi = T(0.91893853320467274178);
  T energy[kBlockRows<T>] = {};
  for (Index k = 0; k < p.K; ++k) {
    const T log_std = log_stds ? log_stds[k] : T(0);
    const T std = p.noise ? exponential(log_std) : T(0);
    for (int r = 0; r < rows; ++r) {
      const T mean = w.heads[r * w.K + k];
      const Index at = (b + r) * p.K + k;
      p.action[at] = p.noise ? fused(p.noise[at], std, mean) : mean;
      const T z = p.noise ? (p.action[at] - mean) / std : T(0);
      energy[r] += fused(z * T(0.5), z, log_std + kHalfLogTwoPi);
    }
  }
  for (int r = 0; r < rows; ++r) {
    p.value[b + r] = w.heads[r * w.K + p.K];
    if (log_stds) p.log_prob[b + r] = -energy[r];
  }
}

// R rows of one group, of which the first `rows` are real, through the whole network.
template <class T, int R>
void step_rows(const PolicyStep<T>& p, const PolicyWeights<T>& net, Index b, int rows, const Buffers<T>& w) {
  load_observations(p, b, rows, w);
  affine<T, R, 1>({{w.x, w.I, net.encoder_weight, p.I}}, net.encoder_bias, p.H, w.h, w.H);
  tanh_in_place(w.h, R * w.H);
  for (Index l = 0; l < p.L; ++l) run_layer<T, R>(p, net.layers[l], l, b, rows, w);
  affine<T, R, 1>({{w.h, w.H, net.actor_weight, p.H}}, net.actor_bias, p.K, w.heads, w.K);
  run_critic<T, R>(p, net, w);
  choose_actions(p, net.log_std, b, rows, w);
}

template <class T>
void step_block(const PolicyStep<T>& p, const PolicyWeights<T>& net, Index b, int rows, const Buffers<T>& w) {
  if (rows == 1) return step_rows<T, 1>(p, net, b, rows, w);
  if (rows == 2) return step_rows<T, 2>(p, net, b, rows, w);
  if constexpr (kBlockRows<T> > 2) {
    if (rows <= 4) return step_rows<T, 4>(p, net, b, rows, w);
  }
  if constexpr (kBlockRows<T> > 4) step_rows<T, kBlockRows<T>>(p, net, b, rows, w);
}

template <class T>
void run(const PolicyStep<T>& p) {
  constexpr int R = kBlockRows<T>;
  const Index blocks_of_group = (p.B + R - 1) / R, blocks = p.G * blocks_of_group;
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (int thread = 0; thread < p.threads; ++thread) {
    T* at = p.scratch + thread * scratch_elements<T>(p.I, p.H, p.N, p.K, p.W);
    std::memset(at, 0, std::size_t(scratch_elements<T>(p.I, p.H, p.N, p.K, p.W)) * sizeof(T));
    const auto take = [&](Index stride) {
      T* taken = at;
      at += R * stride;
      return taken;
    };
    Buffers<T> w{};
    w.I = round_up(p.I, kWidth<T>), w.H = round_up(p.H, kWidth<T>), w.N = round_up(p.N, kWidth<T>);
    w.K = round_up(p.K + 1, kWidth<T>), w.W = round_up(p.W, kWidth<T>);
    w.x = take(w.I), w.h = take(w.H), w.y = take(w.H), w.z = take(w.N), w.state = take(w.N), w.heads = take(w.K);
    w.v = take(w.W), w.w = take(w.W);
    for (Index block = blocks * thread / p.threads; block < blocks * (thread + 1) / p.threads; ++block) {
      const Index g = block / blocks_of_group, b = block % blocks_of_group * R;
      step_block(p, p.weights[g], g * p.B + b, int(p.B - b < R ? p.B - b : R), w);
    }
  }
}

}  // namespace

Index policy_step_scratch(Index I, Index H, Index N, Index K, Index W, bool is_double) {
  return is_double ? scratch_elements<double>(I, H, N, K, W) : scratch_elements<float>(I, H, N, K, W);
}
void policy_step(const PolicyStep<float>& p) { run(p); }
void policy_step(const PolicyStep<double>& p) { run(p); }

}  // namespace ssm_fast::SSM_FAST_ISA
