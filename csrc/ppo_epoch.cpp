#include "ppo_epoch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <memory>

namespace ssm_fast {
namespace {

constexpr Index kRowsOfThread = 32;  // of a minibatch, that are worth a thread
template <class T>
constexpr T kHalfLogTwoPi = T(0.91893853320467274);

// What a minibatch is made of, [rows, ...] each, and the gradients of its loss.
template <class T>
struct Minibatch {
  T *x, *actions, *log_probs, *old_values, *returns, *advantages, *state;
  T *mean, *value;  // the policy's; `value` turns into the gradient with respect to it, `mean` too
  std::uint8_t* reset;
};

// What the loss takes from all of a minibatch.
struct Whole {
  Index rows;
  double mean, deviation;  // of the advantages
};

// Sums over the rows of a part of one.
struct Sums {
  double policy_loss, squares, divergence;
  Index clips;
};

// Learns from a part of each minibatch, into a gradient of its own.
template <class T>
class Learner {
 public:
  Learner(SequenceGradient<T>& gradient, const RolloutSequences<T>& rollout, Index sequences, const PpoLoss& loss,
          const T* log_std, T* log_std_gradient)
      : gradient_(gradient),
        rollout_(rollout),
        loss_(loss),
        log_std_(log_std),
        log_std_gradient_(log_std_gradient),
        reset_(std::size_t(sequences * rollout.L)) {
    const auto [I, H, N, L, K, W] = gradient.sizes();
    const Index rows = sequences * rollout.L;
    arrays_.place([&](auto take) {
      batch_ = {take(rows * I), take(rows * K),          take(rows),     take(rows), take(rows),
                take(rows),     take(sequences * L * N), take(rows * K), take(rows), reset_.data()};
      inverse_std_ = take(K);
    });
  }

  // Sets the gradient of everything to that of the part's share in the loss.
  Sums learn(const std::int64_t* sequences, Index count, const Whole& whole) {
    gather(sequences, count);
    const Index rows = count * rollout_.L;
    for (Index i = 0; i < rows; ++i) {
      batch_.advantages[i] = T((double(batch_.advantages[i]) - whole.mean) / whole.deviation);
    }
    gradient_.forward(batch_.x, batch_.state, batch_.reset, batch_.mean, batch_.value, count, rollout_.L);
    const Sums sums = differentiate(rows, whole.rows);
    gradient_.backward(batch_.mean, batch_.value);
    return sums;
  }

 private:
  void gather(const std::int64_t* sequences, Index count) {
    const auto [I, H, N, L, K, W] = gradient_.sizes();
    const RolloutSequences<T>& r = rollout_;
    const auto copy = [&](auto* to, const auto* from, Index elements) {  // of each sequence
      for (Index i = 0; i < count; ++i) {
        std::memcpy(to + i * elements, from + sequences[i] * elements, std::size_t(elements) * sizeof(*to));
      }
    };
    copy(batch_.x, r.x, r.L * I);
    copy(batch_.actions, r.actions, r.L * K);
    copy(batch_.log_probs, r.log_probs, r.L);
    copy(batch_.old_values, r.old_values, r.L);
    copy(batch_.returns, r.returns, r.L);
    copy(batch_.advantages, r.advantages, r.L);
    copy(batch_.reset, r.reset, r.L);
    for (Index l = 0; l < L; ++l) copy(batch_.state + l * count * N, r.state + l * r.S * N, N);
  }

  // Turns mean and value into the gradients of the loss with respect to them, and writes that of log_std.
  Sums differentiate(Index rows, Index rows_of_whole) {
    const Index K = gradient_.sizes().K;
    const T low = T(1 - loss_.clip_epsilon), high = T(1 + loss_.clip_epsilon), range = T(loss_.clip_epsilon);
    const T per_row = T(1) / T(rows_of_whole), of_value = T(2 * loss_.value_coef) * per_row;
    const T of_entropy = T(-loss_.entropy_coef * (double(rows) / double(rows_of_whole)));
    T constant = 0;  // of the log-probabilities
    for (Index k = 0; k < K; ++k) {
      inverse_std_[k] = std::exp(-log_std_[k]);
      constant += log_std_[k] + kHalfLogTwoPi<T>;
      log_std_gradient_[k] = of_entropy;
    }
    double policy = 0, squares = 0, divergence = 0;
    Index clips = 0;
    for (Index row = 0; row < rows; ++row) {
      T *mean = batch_.mean + row * K, energy = 0;
      const T* action = batch_.actions + row * K;
      for (Index k = 0; k < K; ++k) {
        mean[k] = (action[k] - mean[k]) * inverse_std_[k];  // the deviation
        energy += mean[k] * mean[k];
      }
      const T log_ratio = -T(0.5) * energy - constant - batch_.log_probs[row], ratio = std::exp(log_ratio);
      const T advantage = batch_.advantages[row];
      const T clipped = ratio < low ? low : ratio > high ? high : ratio;  // a NaN stays
      const T surrogate = ratio * advantage, bound = clipped * advantage;
      const bool follows = surrogate <= bound;  // elsewhere the loss is constant
      const T g_log_prob = surrogate * T(follows) * -per_row;
      for (Index k = 0; k < K; ++k) {
        log_std_gradient_[k] += g_log_prob * mean[k] * mean[k] - g_log_prob;
        mean[k] *= g_log_prob * inverse_std_[k];
      }
      T error = batch_.value[row] - batch_.returns[row], square = error * error;
      if (loss_.clip_value_loss) {
        const T old = batch_.old_values[row], change = batch_.value[row] - old;
        const T bounded = change < -range ? -range : change > range ? range : change;
        const T other = old + bounded - batch_.returns[row];
        if (other * other > square) {
          square = other * other;
          error = other * T(change == bounded);
        }
      }
      batch_.value[row] = error * of_value;
      policy -= double(follows ? surrogate : bound);
      squares += double(square);
      divergence += double(ratio - T(1) - log_ratio);
      clips += ratio != clipped;
    }
    return {policy, squares, divergence, clips};
  }

  SequenceGradient<T>& gradient_;
  const RolloutSequences<T>& rollout_;
  const PpoLoss& loss_;
  const T* log_std_;
  T* log_std_gradient_;
  Arrays<T> arrays_;
  std::vector<std::uint8_t> reset_;
  Minibatch<T> batch_{};
  T* inverse_std_ = nullptr;
};

// Threads learn from parts of the same minibatch, add up their gradients and take the step, each in a stretch of the
// vector.
template <class T>
class Epoch {
 public:
  Epoch(SequenceGradient<T>& gradient, const RolloutSequences<T>& rollout, Index sequences, const PpoLoss& loss,
        const T* log_std, T* log_std_gradient, const AdamState<T>& adam)
      : rollout_(rollout), log_std_(log_std), K_(gradient.sizes().K), adam_(adam) {
    for (const auto& [values, elements] : adam.values) P_ += elements;
    const Index rows = sequences * rollout.L;
    parts_ = threads_for(double(rows) * double(P_), std::min(sequences, rows / kRowsOfThread));
    const Index most = (sequences + parts_ - 1) / parts_;
    sums_.resize(std::size_t(parts_)), squares_.resize(std::size_t(parts_));
    others_.resize(std::size_t(parts_ - 1) * std::size_t(P_));
    gradients_.reserve(std::size_t(parts_ - 1));
    learners_.push_back(std::make_unique<Learner<T>>(gradient, rollout, most, loss, log_std, log_std_gradient));
    for (int part = 1; part < parts_; ++part) {
      T* own = gradient_of(part);
      gradients_.push_back(gradient.with_gradients(adam.gradient, own));
      learners_.push_back(std::make_unique<Learner<T>>(gradients_.back(), rollout, most, loss, log_std,
                                                       own + (log_std_gradient - adam.gradient)));
    }
  }

  Index run(const std::int64_t* order, Index count, Index minibatch, double* figures) {
    taken_ = 0;
    if (parts_ == 1) {  // outside any region, or the kernels' own would be nested ones, which start threads anew
      work(order, count, minibatch, figures);
    } else {
#pragma omp parallel num_threads(parts_)
      work(order, count, minibatch, figures);
    }
    if (error_) std::rethrow_exception(error_);
    return taken_;
  }

 private:
  // What one thread does. All of them come to the same decisions, from what they have together.
  void work(const std::int64_t* order, Index count, Index minibatch, double* figures) {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const auto each_part = [&](auto function) {
      for (int part = thread; part < parts_; part += threads) function(part);
#pragma omp barrier
    };
    for (Index first = 0; first < count; first += minibatch, order += minibatch, figures += kFigures) {
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
        if (part == 0) write_figures(whole.rows, figures);  // before the step changes log_std
      });
      double squares = 0;
      for (const double of_part : squares_) squares += of_part;
      const double norm = std::sqrt(squares);
      if (thread == 0) figures[kFigures - 1] = norm;
      if (!std::isfinite(norm)) return;
      const Index step = adam_.steps + first / minibatch + 1;
      each_part([&](int part) { take_step(stretch(part), stretch(part + 1), norm, step); });
      if (thread == 0) ++taken_;
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
  void write_figures(Index rows, double* figures) const {
    Sums total{};
    for (const Sums& part : sums_) {
      total.policy_loss += part.policy_loss, total.squares += part.squares;
      total.divergence += part.divergence, total.clips += part.clips;
    }
    double entropy = 0.5 * double(K_);
    for (Index k = 0; k < K_; ++k) entropy += double(log_std_[k] + kHalfLogTwoPi<T>);
    figures[0] = total.policy_loss / double(rows);
    figures[1] = total.squares / double(rows);
    figures[2] = entropy;
    figures[3] = total.divergence / double(rows);
    figures[4] = double(total.clips) / double(rows);
  }

  // The step number `step` of some entries, along the gradient clipped to the largest norm.
  void take_step(Index from, Index to, double norm, Index step) const {
    Adam<T> p{};
    p.w = adam_.vector + from, p.m = adam_.m + from, p.v = adam_.v + from;
    p.grad = adam_.gradient + from, p.pace = adam_.pace + from;
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
  const T* log_std_;
  const Index K_;
  const AdamState<T>& adam_;
  int parts_ = 1;
  Index P_ = 0, taken_ = 0;
  std::vector<T> others_;  // the gradients of all parts but the first, [parts - 1, P]
  std::vector<SequenceGradient<T>> gradients_;
  std::vector<std::unique_ptr<Learner<T>>> learners_;
  std::vector<Sums> sums_;
  std::vector<double> squares_;
  std::exception_ptr error_;
};

}  // namespace

template <class T>
Index ppo_epoch(SequenceGradient<T>& gradient, const RolloutSequences<T>& rollout, const std::int64_t* order,
                Index count, Index minibatch, const PpoLoss& loss, const T* log_std, T* log_std_gradient,
                const AdamState<T>& adam, double* figures) {
  Epoch<T> epoch(gradient, rollout, std::min(minibatch, count), loss, log_std, log_std_gradient, adam);
  return epoch.run(order, count, minibatch, figures);
}

template Index ppo_epoch(SequenceGradient<float>&, const RolloutSequences<float>&, const std::int64_t*, Index, Index,
                         const PpoLoss&, const float*, float*, const AdamState<float>&, double*);
template Index ppo_epoch(SequenceGradient<double>&, const RolloutSequences<double>&, const std::int64_t*, Index, Index,
                         const PpoLoss&, const double*, double*, const AdamState<double>&, double*);

}  // namespace ssm_fast
