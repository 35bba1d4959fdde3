// MAML's chain rule through the inner steps of the tasks of a batch, each task on one thread; docs/meta_maml.md.
#pragma once

#include <cstdint>
#include <cstring>
#include <exception>
#include <vector>

#include "passes.h"

namespace ssm_fast {

constexpr Index kTileRows = 512;   // rows whose activations stay in a core's cache from pass to pass
constexpr Index kTileScans = 6;    // sequences that a scan advances together: no tile has fewer
constexpr Index kLoneRows = 8192;  // of a task that is alone and shared by all threads

// Sequences, and what a network should say of them, contiguous. The loss is the mean squared error from y, the cross
// entropy of labels, or, where there are advantages, PPO's surrogate of the actions (labels of a discrete policy).
template <class T>
struct Examples {
  const T* x;                       // [B, T, I]; null: there are none
  const T* y;                       // [B, T, O], or null
  const std::int64_t* labels;       // [B, T] in [0, O), or null
  const T* actions;                 // [B, T, O], or null
  const T *log_probs, *advantages;  // [B, T], or null
  const T* s0;                      // [layers, B, N], or null: zeros
  const std::uint8_t* reset;        // [B, T], or null
  Index B, T_len;
  double clip_epsilon;       // of the surrogate; 0: the ratio is not clipped
  double largest_log_ratio;  // of the surrogate: beyond, it is constant
};

template <class T>
struct TaskGradients {
  const T *weights, *rates;  // [P], in the order of the network
  const Examples<T>* inner;  // [K, G], what each step is taken on
  const Examples<T>* outer;  // [K + 1, G], what the weights before each step, and after the last, are judged by
  T* gradients;              // [G, P], of the outer losses by the weights
  T* rate_gradients;         // [G, P], by the rates; null if not wanted
  double* inner_losses;      // [K, G], before each step
  double* outer_losses;      // [K + 1, G]; 0 where there are no examples
  Index G, K, P;
  bool first_order;
};

// Sequences of a tile, of a task that has a thread or, alone, all of them.
template <class T>
Index tile_sequences(const Examples<T>& e, bool alone) {
  const Index by_rows = (alone ? kLoneRows : kTileRows) / e.T_len;
  const Index most = by_rows > kTileScans ? by_rows : kTileScans, tiles = (e.B + most - 1) / most;
  return (e.B + tiles - 1) / tiles;
}

// A stretch of whole sequences.
struct Tile {
  Index first, B, T_len;  // sequences
  Index row() const { return first * T_len; }
  Index rows() const { return B * T_len; }
};

template <class T, class F>
void for_tiles(const Examples<T>& e, bool alone, F f) {
  const Index most = tile_sequences(e, alone);
  for (Index b = 0; b < e.B; b += most) f(Tile{b, e.B - b < most ? e.B - b : most, e.T_len});
}

// What tiles of all tasks need room for.
struct Room {
  Index rows = 0, tile = 0;  // of the examples of an inner step, and of a tile
};

template <class T>
Room room_for(const TaskGradients<T>& p) {
  Room room;
  const auto grow = [&](const Examples<T>& e, bool inner) {
    if (!e.x) return;
    const Index of_tile = tile_sequences(e, p.G == 1) * e.T_len;
    if (inner && e.B * e.T_len > room.rows) room.rows = e.B * e.T_len;
    if (of_tile > room.tile) room.tile = of_tile;
  };
  for (Index i = 0; i < p.K * p.G; ++i) grow(p.inner[i], true);
  for (Index i = 0; i < (p.K + 1) * p.G; ++i) grow(p.outer[i], false);
  return room;
}

// u += A_t times the states that enter the steps: that of the row before, at the first of a sequence s0. `s` has a
// row before its first one, whatever it holds; scratch is [rows, N].
template <class T>
void add_entering(Passes<T>& passes, const Tile& tile, const T* s, const T* s0, const std::uint8_t* reset, const T* A_t,
                  T* u, T* scratch, Index N) {
  const auto add = [&](Index row, const T* from) { add_to(u + row * N, from, N); };
  passes.linear(s - N, A_t, nullptr, nullptr, false, scratch, tile.rows(), N, N);
  for (Index row = 0; row < tile.rows(); ++row) {
    if (row % tile.T_len && !(reset && reset[row])) add(row, scratch + row * N);
  }
  if (!s0) return;
  passes.linear(s0, A_t, nullptr, nullptr, false, scratch, tile.B, N, N);
  for (Index b = 0; b < tile.B; ++b) {
    if (!(reset && reset[b * tile.T_len])) add(b * tile.T_len, scratch + b * N);
  }
}

// grad_s += A_t^T times the adjoints of the rows behind, which the states enter; those of the last steps go nowhere.
// `adjoint` has a row behind its last one.
template <class T>
void add_leaving(Passes<T>& passes, const Tile& tile, const T* adjoint, const std::uint8_t* reset, const T* A_t,
                 T* grad_s, T* scratch, Index N) {
  passes.linear(adjoint + N, A_t, nullptr, nullptr, false, scratch, tile.rows(), N, N, true);
  for (Index row = 0; row < tile.rows(); ++row) {
    if ((row + 1) % tile.T_len && !(reset && reset[row + 1])) add_to(grad_s + row * N, scratch + row * N, N);
  }
}

// The gradients of one task after the other. A Network has
//   double gradient(const Examples<T>&, const T* weights, Index slot, T* out): the gradient of the mean loss and the
//     loss; what the second derivative needs is kept in the slot, unless that is -1;
//   void curvature(const Examples<T>&, const T* weights, const T* direction, Index slot, T* out): the product of the
//     Hessian there with a direction.
template <class T, class Network>
class TaskChain {
 public:
  TaskChain(const TaskGradients<T>& p, Network network)
      : p_(p), network_(std::move(network)), weights_(std::size_t(p.K)), gradients_(std::size_t(p.K)) {
    arrays_.place([&](auto take) {
      for (T*& vector : weights_) vector = take(p.P);
      for (T*& vector : gradients_) vector = take(p.P);
      direction_ = take(p.P);
    });
  }

  void run(Index g) {
    const Index K = p_.K, G = p_.G, P = p_.P;
    const T* weights = p_.weights;
    for (Index k = 0; k < K; ++k) {
      T *grad = gradients_[std::size_t(k)], *next = weights_[std::size_t(k)];
      const Index slot = p_.first_order ? -1 : k;
      p_.inner_losses[k * G + g] = network_.gradient(p_.inner[k * G + g], weights, slot, grad);
      for (Index i = 0; i < P; ++i) next[i] = weights[i] - p_.rates[i] * grad[i];
      weights = next;
    }
    T* v = p_.gradients + g * P;
    T* of_rates = p_.rate_gradients ? p_.rate_gradients + g * P : nullptr;
    std::memset(v, 0, std::size_t(P) * sizeof(T));
    add_outer(K, g, weights, v);
    if (of_rates) std::memset(of_rates, 0, std::size_t(P) * sizeof(T));
    for (Index k = K - 1; k >= 0; --k) {
      T* grad = gradients_[std::size_t(k)];
      weights = k ? weights_[std::size_t(k - 1)] : p_.weights;
      for (Index i = 0; of_rates && i < P; ++i) of_rates[i] -= v[i] * grad[i];
      if (!p_.first_order) {
        for (Index i = 0; i < P; ++i) direction_[i] = p_.rates[i] * v[i];
        network_.curvature(p_.inner[k * G + g], weights, direction_, k, grad);  // which is not needed any more
        for (Index i = 0; i < P; ++i) v[i] -= grad[i];
      }
      add_outer(k, g, weights, v);
    }
  }

 private:
  void add_outer(Index k, Index g, const T* weights, T* v) {
    const Examples<T>& e = p_.outer[k * p_.G + g];
    p_.outer_losses[k * p_.G + g] = e.x ? network_.gradient(e, weights, -1, direction_) : 0;
    if (e.x) add_to(v, direction_, p_.P);
  }

  const TaskGradients<T>& p_;
  Network network_;
  Arrays<T> arrays_;
  std::vector<T*> weights_, gradients_;  // of each inner step
  T* direction_ = nullptr;               // [P]
};

// Runs every task on the networks that `make` makes, one a thread. A task that is alone is shared by all threads.
template <class T, class F>
void for_tasks(const TaskGradients<T>& p, F make) {
  using Chain = TaskChain<T, decltype(make())>;
  if (p.G == 1) {
    Chain(p, make()).run(0);
    return;
  }
  const int threads = threads_for(1e9, p.G);
  std::exception_ptr error;  // of the memory: none may leave a parallel region
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int thread = 0; thread < threads; ++thread) {
    try {
      Chain chain(p, make());
      for (Index g = p.G * thread / threads; g < p.G * (thread + 1) / threads; ++g) chain.run(g);
    } catch (...) {
#pragma omp critical(ssm_fast_task_gradients)
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace ssm_fast
