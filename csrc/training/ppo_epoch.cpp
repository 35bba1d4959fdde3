#include "ppo_epoch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <memory>

namespace ssm_fast {
namespace {

constexpr Index kRowsOfThread = 32;  // of a minibatch, that are worth a thread

// What the loss takes from all of a minibatch.
struct Whole {
  Index rows;
  double mean, deviation;  // of the advantages
};

// Sums over the rows of a part of one.
struct Sums {
  double policy_loss, squares, entropy, divergence;
  Index clips;
};

// Learns from a part of each minibatch, into a gradient of its own.
template <class T>
class Learner {
 public:
  Learner(const Network<T>& network, int log_std, const RolloutSequences<T>& rollout, Index sequences,
          const PpoLoss& loss, const std::vector<T*>& weights, T* gradient)
      : network_(network),
        log_std_(log_std),
        rollout_(rollout),
        loss_(loss),
        weights_(weights),
        reset_(std::size_t(sequences * rollout.L)),
        labels_(rollout.labels ? std::size_t(sequences * rollout.L) : 0) {
    network.split(gradient, gradients_);
    const Tile tile{sequences, rollout.L, nullptr};
    lay_out<T>(memory_, [&](Layout<T>& layout) { place(layout, tile); });
  }

  // Sets the gradient of everything to that of the part's share in the loss.
  Sums learn(const std::int64_t* sequences, Index count, const Whole& whole) {
    gather(sequences, count);
    const Tile tile{count, rollout_.L, reset_.data()};
    for (Index i = 0; i < tile.rows(); ++i) {
      advantages_[i] = T((double(advantages_[i]) - whole.mean) / whole.deviation);
    }
    const Call<T> call{kernels_, tile, x_, weights_.data(), gradients_.data(), nullptr, nullptr, work_};
    network_.forward(call, {state_, count, 0}, activations_);
    const Sums sums = differentiate(tile.rows(), whole.rows);
    network_.backward(call, {state_, count, 0}, activations_);
    return sums;
  }

 private:
  void place(Layout<T>& layout, const Tile& tile) {
    const Index rows = tile.rows(), K = network_.outputs(0);
    x_ = layout.array(rows * network_.inputs());
    actions_ = layout.array(rollout_.labels ? 0 : rows * K);
    log_probs_ = layout.array(rows), old_values_ = layout.array(rows), returns_ = layout.array(rows);
    advantages_ = layout.array(rows), state_ = layout.array(tile.B * network_.state());
    precision_ = layout.array(K), scratch_ = layout.array(K);
    activations_ = network_.activations(layout, tile);
    work_ = layout.array(network_.work(tile));
  }

  void gather(const std::int64_t* sequences, Index count) {
    const RolloutSequences<T>& r = rollout_;
    const auto copy = [&](auto* to, const auto* from, Index elements) {  // of each sequence
      for (Index i = 0; from && i < count; ++i) {
        std::memcpy(to + i * elements, from + sequences[i] * elements, std::size_t(elements) * sizeof(*to));
      }
    };
    copy(x_, r.x, r.L * network_.inputs());
    copy(actions_, r.actions, r.L * network_.outputs(0));
    copy(labels_.data(), r.labels, r.L);
    copy(log_probs_, r.log_probs, r.L);
    copy(old_values_, r.old_values, r.L);
    copy(returns_, r.returns, r.L);
    copy(advantages_, r.advantages, r.L);
    copy(reset_.data(), r.reset, r.L);
    T* to = state_;
    const T* from = r.state;
    for (const auto& stage : network_.trunk()) {
      copy(to, from, stage->state);
      to += count * stage->state, from += r.S * stage->state;
    }
  }

  // Writes the gradients of the loss with respect to the outputs, and that of log_std.
  Sums differentiate(Index rows, Index rows_of_whole) {
    const Index K = network_.outputs(0);
    const T *y = activations_.output(0), *value = activations_.output(1);
    T *grad_y = activations_.grad_output(0), *grad_value = activations_.grad_output(1);
    const T range = T(loss_.clip_epsilon), per_row = T(1) / T(rows_of_whole);
    const T of_value = T(2 * loss_.value_coef) * per_row, of_entropy = T(-loss_.entropy_coef) * per_row;
    T* of_log_std = log_std_ < 0 ? nullptr : gradients_[std::size_t(log_std_)];
    for (Index k = 0; of_log_std && k < K; ++k) of_log_std[k] = 0;
    const T* log_std = log_std_ < 0 ? nullptr : weights_[std::size_t(log_std_)];
    const auto distribution =
        Distribution<T>::of(K, log_std, precision_, actions_, rollout_.labels ? labels_.data() : nullptr);
    Sums sums{};
    for (Index row = 0; row < rows; ++row, y += K, grad_y += K) {
      const T log_ratio = distribution.log_prob(row, y) - log_probs_[row];
      const Surrogate<T> surrogate = Surrogate<T>::of(log_ratio, advantages_[row], loss_.clip_epsilon);
      distribution.gradient(row, y, surrogate.slope * -per_row, grad_y, of_log_std);
      sums.entropy += double(distribution.entropy(y, of_entropy, grad_y, of_log_std, scratch_));
      T error = value[row] - returns_[row], square = error * error;
      if (loss_.clip_value_loss) {
        const T old = old_values_[row], change = value[row] - old;
        const T bounded = change < -range ? -range : change > range ? range : change;
        const T other = old + bounded - returns_[row];
        if (other * other > square) {
          square = other * other;
          error = other * T(change == bounded);
        }
      }
      grad_value[row] = error * of_value;
      sums.policy_loss -= double(surrogate.value);
      sums.squares += double(square);
      sums.divergence += double(surrogate.ratio - T(1) - log_ratio);
      sums.clips += surrogate.is_clipped;
    }
    return sums;
  }

  const Network<T>& network_;
  const int log_std_;
  const RolloutSequences<T>& rollout_;
  const PpoLoss& loss_;
  const std::vector<T*>& weights_;
  std::vector<T*> gradients_;
  std::vector<std::uint8_t> reset_;
  std::vector<std::int64_t> labels_;
  Kernels<T> kernels_;
  Scratch memory_;
  T *x_, *actions_, *log_probs_, *old_values_, *returns_, *advantages_, *state_, *precision_, *scratch_, *work_;
  Activations<T> activations_;
};

// Threads learn from parts of the same minibatch, add up their gradients and take the step, each in a stretch of the
// vector.
template <class T>
class Epoch {
 public:
  Epoch(const Network<T>& network, int log_std, const RolloutSequences<T>& rollout, Index sequences,
        const PpoLoss& loss, const AdamState<T>& adam)
      : rollout_(rollout), adam_(adam), P_(network.elements()) {
    for (const auto& [values, elements] : adam.values) weights_.push_back(values);
    const Index rows = sequences * rollout.L;
    parts_ = threads_for(double(rows) * double(P_), std::min(sequences, rows / kRowsOfThread));
    const Index most = (sequences + parts_ - 1) / parts_;
    sums_.resize(std::size_t(parts_)), squares_.resize(std::size_t(parts_));
    others_.resize(std::size_t(parts_ - 1) * std::size_t(P_));
    for (int part = 0; part < parts_; ++part) {
      T* gradient = part == 0 ? adam.gradient : gradient_of(part);
      learners_.push_back(std::make_unique<Learner<T>>(network, log_std, rollout, most, loss, weights_, gradient));
    }
  }

  Index run(const std::int64_t* order, Index count, Index minibatch, double* metrics) {
    steps_ = 0;
    if (parts_ == 1) {  // outside any region, or the kernels' own would be nested ones, which start threads anew
      work(order, count, minibatch, metrics);
    } else {
#pragma omp parallel num_threads(parts_)
      work(order, count, minibatch, metrics);
    }
    if (error_) std::rethrow_exception(error_);
    return steps_;
  }

 private:
  // What one thread does. All of them come to the same decisions, from what they have together.
  void work(const std::int64_t* order, Index count, Index minibatch, double* metrics) {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const auto each_part = [&](auto function) {
      for (int part = thread; part < parts_; part += threads) function(part);
#pragma omp barrier
    };
    for (Index first = 0; first < count; first += minibatch, order += minibatch, metrics += kMetrics) {
      const Index sequences = std::min(minibatch, count - first);
      const Whole whole = whole_of(order, sequences);
      // Where a part begins; the first is never empty.
      const auto begin = [&](Index part) { return (sequences * part + parts_ - 1) / parts_; };
      each_part([&](int part) {
        const Index from = begin(part), to = begin(part + 1);
        sums_[std::size_t(part)] = from < to ? learn(part, order + from, to - from, whole) : Sums{};
      });
      if (error_) return;
      each_part([&](int part) {
        const Index from = stretch(part), elements = stretch(part + 1) - from;
        for (int other = 1; other < parts_; ++other) {
          if (begin(other) < begin(other + 1)) add_to(adam_.gradient + from, gradient_of(other) + from, elements);
        }
        squares_[std::size_t(part)] = SSM_FAST_CALL(squared_norm(adam_.gradient + from, elements));
        if (part == 0) write_metrics(whole.rows, metrics);  // before the step changes log_std
      });
      double squares = 0;
      for (const double of_part : squares_) squares += of_part;
      const double norm = std::sqrt(squares);
      if (thread == 0) metrics[kMetrics - 1] = norm;
      if (!std::isfinite(norm)) return;
      const Index step = adam_.steps + first / minibatch + 1;
      each_part([&](int part) { take_step(stretch(part), stretch(part + 1), norm, step); });
      if (thread == 0) ++steps_;
    }
  }

  Sums learn(int part, const std::int64_t* sequences, Index count, const Whole& whole) {
    try {
      return learners_[std::size_t(part)]->learn(sequences, count, whole);
    } catch (...) {  // of the memory: none may leave a parallel region
#pragma omp critical(ssm_fast_ppo_epoch)
      error_ = std::current_exception();
      return {};
    }
  }

  // Where a part of the vector begins.
  Index stretch(Index part) const { return part == parts_ ? P_ : P_ * part / parts_ / kLine * kLine; }

  T* gradient_of(int part) { return others_.data() + Index(part - 1) * P_; }  // of any but the first

  Whole whole_of(const std::int64_t* sequences, Index count) const {
    const auto sum = [&](auto term) {
      double total = 0;
      for (Index i = 0; i < count; ++i) {
        const T* x = rollout_.advantages + sequences[i] * rollout_.L;
        for (Index t = 0; t < rollout_.L; ++t) total += term(double(x[t]));
      }
      return total;
    };
    const Index rows = count * rollout_.L;
    const double mean = sum([](double x) { return x; }) / double(rows);
    const double squares = sum([mean](double x) { return (x - mean) * (x - mean); });
    return {rows, mean, std::sqrt(squares / double(rows)) + 1e-8};
  }

  // All but the norm.
  void write_metrics(Index rows, double* metrics) const {
    Sums total{};
    for (const Sums& part : sums_) {
      total.policy_loss += part.policy_loss, total.squares += part.squares;
      total.entropy += part.entropy, total.divergence += part.divergence, total.clips += part.clips;
    }
    metrics[0] = total.policy_loss / double(rows);
    metrics[1] = total.squares / double(rows);
    metrics[2] = total.entropy / double(rows);
    metrics[3] = total.divergence / double(rows);
    metrics[4] = double(total.clips) / double(rows);
  }

  // The step number `step` of some entries, along the gradient clipped to the largest norm.
  void take_step(Index from, Index to, double norm, Index step) const {
    Adam<T> p{};
    p.w = adam_.vector + from, p.m = adam_.m + from, p.v = adam_.v + from;
    p.grad = adam_.gradient + from, p.lr_scales = adam_.lr_scales + from;
    p.P = to - from;
    p.scale = T(std::min(1.0, adam_.max_norm / (norm + 1e-6)));
    p.beta1 = T(adam_.beta1), p.beta2 = T(adam_.beta2), p.eps = T(adam_.eps);
    p.rate = T(adam_.learning_rate / (1 - std::pow(adam_.beta1, double(step))));
    p.root = T(std::sqrt(1 - std::pow(adam_.beta2, double(step))));
    SSM_FAST_CALL(adam(p));
    Index first = 0;  // entry of a parameter
    for (const auto& [values, elements] : adam_.values) {
      const Index begin = std::max(from, first), end = std::min(to, first + elements);
      if (begin < end) {
        std::memcpy(values + (begin - first), adam_.vector + begin, std::size_t(end - begin) * sizeof(T));
      }
      first += elements;
    }
  }

  static constexpr Index kLine = 64 / Index(sizeof(T));

  const RolloutSequences<T>& rollout_;
  const AdamState<T>& adam_;
  const Index P_;
  int parts_ = 1;
  Index steps_ = 0;
  std::vector<T*> weights_;
  std::vector<T> others_;  // the gradients of all parts but the first, [parts - 1, P]
  std::vector<std::unique_ptr<Learner<T>>> learners_;
  std::vector<Sums> sums_;
  std::vector<double> squares_;
  std::exception_ptr error_;
};

}  // namespace

template <class T>
Index ppo_epoch(const Network<T>& network, int log_std, const RolloutSequences<T>& rollout, const std::int64_t* order,
                Index count, Index minibatch, const PpoLoss& loss, const AdamState<T>& adam, double* metrics) {
  Epoch<T> epoch(network, log_std, rollout, std::min(minibatch, count), loss, adam);
  return epoch.run(order, count, minibatch, metrics);
}

template Index ppo_epoch(const Network<float>&, int, const RolloutSequences<float>&, const std::int64_t*, Index, Index,
                         const PpoLoss&, const AdamState<float>&, double*);
template Index ppo_epoch(const Network<double>&, int, const RolloutSequences<double>&, const std::int64_t*, Index,
                         Index, const PpoLoss&, const AdamState<double>&, double*);

}  // namespace ssm_fast
