#include "ppo_epoch.h"

#include <cmath>
#include <cstring>

namespace ssm_fast {
namespace {

// What a minibatch is made of, [rows, ...] each, and the gradients of its loss.
template <class T>
struct Minibatch {
  T *x, *actions, *log_probs, *old_values, *returns, *advantages, *state;
  T *mean, *value;  // the policy's; `value` turns into the gradient with respect to it, `mean` too
  std::uint8_t* reset;
};

template <class T>
class Epoch {
 public:
  Epoch(SequenceGradient<T>& gradient, const RolloutSequences<T>& rollout, Index minibatch, const PpoLoss& loss,
        const T* log_std, T* log_std_gradient)
      : gradient_(gradient),
        rollout_(rollout),
        loss_(loss),
        log_std_(log_std),
        log_std_gradient_(log_std_gradient),
        reset_(std::size_t(minibatch * rollout.L)) {
    const auto [I, H, N, L, K, W] = gradient.sizes();
    const Index rows = minibatch * rollout.L;
    arrays_.place([&](auto take) {
      batch_ = {take(rows * I), take(rows * K),          take(rows),     take(rows), take(rows),
                take(rows),     take(minibatch * L * N), take(rows * K), take(rows), reset_.data()};
      inverse_std_ = take(K);
    });
  }

  // Sets the gradient of everything to that of the loss of some sequences, and their figures but for its norm.
  void learn(const std::int64_t* sequences, Index count, double* figures) {
    gather(sequences, count);
    const Index rows = count * rollout_.L;
    standardize(batch_.advantages, rows);
    gradient_.forward(batch_.x, batch_.state, batch_.reset, batch_.mean, batch_.value, count, rollout_.L);
    differentiate(rows, figures);
    gradient_.backward(batch_.mean, batch_.value);
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

  static void standardize(T* x, Index rows) {
    double total = 0, squares = 0;
    for (Index i = 0; i < rows; ++i) total += double(x[i]);
    const double mean = total / double(rows);
    for (Index i = 0; i < rows; ++i) squares += (double(x[i]) - mean) * (double(x[i]) - mean);
    const double deviation = std::sqrt(squares / double(rows)) + 1e-8;
    for (Index i = 0; i < rows; ++i) x[i] = T((double(x[i]) - mean) / deviation);
  }

  // Turns mean and value into the gradients of the loss with respect to them, and writes that of log_std.
  void differentiate(Index rows, double* figures) {
    const Index K = gradient_.sizes().K;
    const T low = T(1 - loss_.clip_epsilon), high = T(1 + loss_.clip_epsilon), range = T(loss_.clip_epsilon);
    const T per_row = T(1) / T(rows), of_value = T(2 * loss_.value_coef) * per_row;
    T constant = 0;  // of the log-probabilities
    for (Index k = 0; k < K; ++k) {
      inverse_std_[k] = std::exp(-log_std_[k]);
      constant += log_std_[k] + T(0.91893853320467274);  // log(2 pi) / 2
      log_std_gradient_[k] = T(-loss_.entropy_coef);
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
    figures[0] = policy / double(rows);
    figures[1] = squares / double(rows);
    figures[2] = double(constant) + 0.5 * double(K);
    figures[3] = divergence / double(rows);
    figures[4] = double(clips) / double(rows);
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

// Clips the gradient to the largest norm and takes a step; returns its norm before, and stays where that is not finite.
template <class T>
double take_step(const AdamState<T>& state, Index steps) {
  Adam<T> p{};
  p.w = state.vector, p.m = state.m, p.v = state.v;
  p.grad = state.gradient, p.pace = state.pace;
  for (const auto& [values, elements] : state.values) p.P += elements;
  const double norm = std::sqrt(SSM_FAST_CALL(squared_norm(state.gradient, p.P)));
  if (!std::isfinite(norm)) return norm;
  const double scale = state.max_norm / (norm + 1e-6);
  p.scale = T(scale < 1 ? scale : 1);
  p.beta1 = T(state.beta1), p.beta2 = T(state.beta2), p.eps = T(state.eps);
  p.rate = T(state.learning_rate / (1 - std::pow(state.beta1, double(steps))));
  p.root = T(std::sqrt(1 - std::pow(state.beta2, double(steps))));
  SSM_FAST_CALL(adam(p));
  const T* next = state.vector;
  for (const auto& [values, elements] : state.values) {
    std::memcpy(values, next, std::size_t(elements) * sizeof(T));
    next += elements;
  }
  return norm;
}

}  // namespace

template <class T>
Index ppo_epoch(SequenceGradient<T>& gradient, const RolloutSequences<T>& rollout, const std::int64_t* order,
                Index count, Index minibatch, const PpoLoss& loss, const T* log_std, T* log_std_gradient,
                const AdamState<T>& adam, double* figures) {
  Epoch<T> epoch(gradient, rollout, minibatch < count ? minibatch : count, loss, log_std, log_std_gradient);
  Index steps = 0;
  for (Index first = 0; first < count; first += minibatch, figures += kFigures) {
    epoch.learn(order + first, minibatch < count - first ? minibatch : count - first, figures);
    figures[kFigures - 1] = take_step(adam, adam.steps + steps + 1);
    if (!std::isfinite(figures[kFigures - 1])) break;
    ++steps;
  }
  return steps;
}

template Index ppo_epoch(SequenceGradient<float>&, const RolloutSequences<float>&, const std::int64_t*, Index, Index,
                         const PpoLoss&, const float*, float*, const AdamState<float>&, double*);
template Index ppo_epoch(SequenceGradient<double>&, const RolloutSequences<double>&, const std::int64_t*, Index, Index,
                         const PpoLoss&, const double*, double*, const AdamState<double>&, double*);

}  // namespace ssm_fast
