#include "maml.h"

#include <cstring>
#include <exception>

namespace ssm_fast {
namespace {

constexpr Index kTileRows = 512;     // rows whose activations stay in a core's cache from stage to stage
constexpr Index kTileScans = 6;      // sequences that a scan advances together: no tile has fewer
constexpr Index kSharedRows = 8192;  // of the only task, which all threads share

// The gradient of the mean loss of examples at some weights, and the product of its Hessian with a direction.
template <class T>
class Differentiator {
 public:
  Differentiator(const Network<T>& network, const TaskGradients<T>& p)
      : network_(network),
        P_(network.elements()),
        log_std_(p.log_std),
        is_only_task_(p.G == 1),
        steps_(std::size_t(p.K)) {
    T* next = vectors_.get<T>(3 * P_ + 2 * network.outputs(0));
    part_ = next, second_ = next + P_;
    precision_ = next + 2 * P_, scratch_ = precision_ + network.outputs(0);
    network_.split(part_, gradients_);
    network_.split(second_, seconds_);
  }

  // Writes the gradient and returns the loss. With a step, keeps what `curvature` of it needs.
  double gradient(const Examples<T>& e, const T* weights, Index step, T* out) {
    double total = 0;
    network_.split(const_cast<T*>(weights), weights_);
    clear({out, part_});  // log_std is in no other loss than a policy's
    for_tiles(e, [&](std::size_t i, Index first, const Tile& tile) {
      Kept& kept = step < 0 ? last_ : kept_tile(step, i);
      fit(kept, tile);
      Call<T> call = call_of(e, first, tile, nullptr);
      network_.forward(call, {e.s0, e.B, first}, kept.activations);
      T* of_log_std = e.actions && log_std_ >= 0 ? gradients_[std::size_t(log_std_)] : nullptr;
      total += loss(e, first, tile).gradient(kept.activations.output(0), kept.activations.grad_output(0), of_log_std);
      network_.backward(call, {e.s0, e.B, first}, kept.activations);
      add_to(out, part_, P_);
    });
    return total / double(e.B * e.T_len);
  }

  void curvature(const Examples<T>& e, const T* weights, const T* direction, Index step, T* out) {
    network_.split(const_cast<T*>(weights), weights_);
    network_.split(const_cast<T*>(direction), direction_);
    clear({out, part_, second_});
    for_tiles(e, [&](std::size_t i, Index first, const Tile& tile) {
      const Activations<T>& a = kept_tile(step, i).activations;
      Tangents<T> t;
      lay_out<T>(tangents_, [&](Layout<T>& layout) { t = network_.tangents(layout, tile); });
      Call<T> call = call_of(e, first, tile, direction_.data());
      network_.tangent(call, {e.s0, e.B, first}, a, t);
      const bool gaussian = e.actions && log_std_ >= 0;
      loss(e, first, tile)
          .tangent(a.output(0), gaussian ? direction_[std::size_t(log_std_)] : nullptr, t.output(0),
                   gaussian ? gradients_[std::size_t(log_std_)] : nullptr, scratch_);
      network_.backward_tangent(call, {e.s0, e.B, first}, a, t);
      add_to(out, part_, P_);
      add_to(out, second_, P_);
    });
  }

 private:
  struct Kept {
    Scratch memory;
    Activations<T> activations;
    Index B = 0, T_len = 0;
  };

  Kept& kept_tile(Index step, std::size_t i) {
    std::vector<std::unique_ptr<Kept>>& tiles = steps_[std::size_t(step)];
    while (tiles.size() <= i) tiles.push_back(std::make_unique<Kept>());
    return *tiles[i];
  }

  void fit(Kept& kept, const Tile& tile) {
    if (kept.B == tile.B && kept.T_len == tile.T_len) return;
    lay_out<T>(kept.memory, [&](Layout<T>& layout) { kept.activations = network_.activations(layout, tile); });
    kept.B = tile.B, kept.T_len = tile.T_len;
  }

  template <class F>
  void for_tiles(const Examples<T>& e, F f) {
    const Index by_rows = (is_only_task_ ? kSharedRows : kTileRows) / e.T_len;
    const Index most = by_rows > kTileScans ? by_rows : kTileScans, tiles = (e.B + most - 1) / most;
    const Index of_tile = (e.B + tiles - 1) / tiles;
    std::size_t i = 0;
    for (Index b = 0; b < e.B; b += of_tile, ++i) {
      const Index B = e.B - b < of_tile ? e.B - b : of_tile;
      f(i, b, Tile{B, e.T_len, e.reset ? e.reset + b * e.T_len : nullptr});
    }
  }

  Call<T> call_of(const Examples<T>& e, Index first, const Tile& tile, T* const* direction) {
    return {kernels_,
            tile,
            e.x + first * e.T_len * network_.inputs(),
            weights_.data(),
            gradients_.data(),
            direction,
            seconds_.data(),
            work_.get<T>(network_.work(tile))};
  }

  ExamplesLoss<T> loss(const Examples<T>& e, Index first, const Tile& tile) {
    return {e,
            first * e.T_len,
            tile.rows(),
            network_.outputs(0),
            log_std_ < 0 ? nullptr : weights_[std::size_t(log_std_)],
            precision_};
  }

  void clear(std::initializer_list<T*> vectors) {
    for (T* vector : vectors) std::memset(vector, 0, std::size_t(P_) * sizeof(T));
  }

  const Network<T>& network_;
  const Index P_;
  const int log_std_;
  const bool is_only_task_;
  Kernels<T> kernels_;
  Scratch vectors_, work_, tangents_;
  T *part_, *second_;        // [P]
  T *precision_, *scratch_;  // [O]
  std::vector<T*> weights_, gradients_, direction_, seconds_;
  std::vector<std::vector<std::unique_ptr<Kept>>> steps_;  // the tiles of each inner step
  Kept last_;
};

// The gradients of one task after the other.
template <class T>
class Chain {
 public:
  Chain(const Network<T>& network, const TaskGradients<T>& p)
      : p_(p), P_(network.elements()), at_(network, p), steps_(std::size_t(p.K)) {
    lay_out<T>(memory_, [&](Layout<T>& layout) {
      for (Step& step : steps_) step = {layout.array(P_), layout.array(P_)};
      direction_ = layout.array(P_);
    });
  }

  void run(Index g) {
    const Index K = p_.K, G = p_.G;
    const T* weights = p_.weights;
    for (Index k = 0; k < K; ++k) {
      const auto [next, grad] = steps_[std::size_t(k)];
      p_.inner_losses[k * G + g] = at_.gradient(p_.inner[k * G + g], weights, p_.first_order ? -1 : k, grad);
      for (Index i = 0; i < P_; ++i) next[i] = weights[i] - p_.rates[i] * grad[i];
      weights = next;
    }
    T* v = p_.gradients + g * P_;
    T* of_rates = p_.rate_gradients ? p_.rate_gradients + g * P_ : nullptr;
    std::memset(v, 0, std::size_t(P_) * sizeof(T));
    add_outer(K, g, weights, v);
    if (of_rates) std::memset(of_rates, 0, std::size_t(P_) * sizeof(T));
    for (Index k = K - 1; k >= 0; --k) {
      T* grad = steps_[std::size_t(k)].gradient;
      weights = k ? steps_[std::size_t(k - 1)].weights : p_.weights;
      for (Index i = 0; of_rates && i < P_; ++i) of_rates[i] -= v[i] * grad[i];
      if (!p_.first_order) {
        for (Index i = 0; i < P_; ++i) direction_[i] = p_.rates[i] * v[i];
        at_.curvature(p_.inner[k * G + g], weights, direction_, k, grad);  // which is not needed any more
        for (Index i = 0; i < P_; ++i) v[i] -= grad[i];
      }
      add_outer(k, g, weights, v);
    }
  }

 private:
  struct Step {
    T *weights, *gradient;  // after it, and what it followed, [P]
  };

  void add_outer(Index k, Index g, const T* weights, T* v) {
    const Examples<T>& e = p_.outer[k * p_.G + g];
    p_.outer_losses[k * p_.G + g] = e.x ? at_.gradient(e, weights, -1, direction_) : 0;
    if (e.x) add_to(v, direction_, P_);
  }

  const TaskGradients<T>& p_;
  const Index P_;
  Differentiator<T> at_;
  Scratch memory_;
  std::vector<Step> steps_;
  T* direction_ = nullptr;  // [P]
};

}  // namespace

// A task that is alone is shared by all threads.
template <class T>
void task_gradients(const Network<T>& network, const TaskGradients<T>& p) {
  if (p.G == 1) {
    Chain<T>(network, p).run(0);
    return;
  }
  const int threads = threads_for(1e9, p.G);
  std::exception_ptr error;  // of the memory: none may leave a parallel region
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int thread = 0; thread < threads; ++thread) {
    try {
      Chain<T> chain(network, p);
      for (Index g = p.G * thread / threads; g < p.G * (thread + 1) / threads; ++g) chain.run(g);
    } catch (...) {
#pragma omp critical(ssm_fast_task_gradients)
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

template void task_gradients(const Network<float>&, const TaskGradients<float>&);
template void task_gradients(const Network<double>&, const TaskGradients<double>&);

}  // namespace ssm_fast
