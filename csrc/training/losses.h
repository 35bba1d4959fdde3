// The distributions of actions and the losses, on rows of a network's outputs: value, gradient and its tangent.
#pragma once

#include <cmath>
#include <cstdint>

#include "../kernels/ops.h"

namespace ssm_fast {

template <class T>
constexpr T kHalfLogTwoPi = T(0.91893853320467274);

// Of actions [rows, K] by means [rows, K], or of labels [rows] by logits [rows, K].
template <class T>
struct Distribution {
  Index K;
  const T *log_std, *precision;  // [K] and exp(-log_std) of a Gaussian; null of a categorical
  T log_scale;                   // the sum of log_std + log(2 pi) / 2
  const T* actions;
  const std::int64_t* labels;

  // A Gaussian writes its precision [K].
  static Distribution of(Index K, const T* log_std, T* precision, const T* actions, const std::int64_t* labels) {
    T log_scale = 0;
    for (Index k = 0; log_std && k < K; ++k) {
      precision[k] = std::exp(-log_std[k]);
      log_scale += log_std[k] + kHalfLogTwoPi<T>;
    }
    return {K, log_std, precision, log_scale, actions, labels};
  }

  T log_prob(Index row, const T* y) const {
    if (labels) return y[labels[row]] - log_sum_exp(y);
    T energy = 0;
    for (Index k = 0; k < K; ++k) {
      const T z = deviation(row, k, y);
      energy += z * z;
    }
    return T(-0.5) * energy - log_scale;
  }

  // grad_y = slope d log_prob / dy; adds the gradient of log_std unless that is null.
  void gradient(Index row, const T* y, T slope, T* grad_y, T* grad_log_std) const {
    if (labels) {
      probabilities(y, grad_y);
      for (Index k = 0; k < K; ++k) grad_y[k] *= -slope;
      grad_y[labels[row]] += slope;
      return;
    }
    for (Index k = 0; k < K; ++k) {
      const T z = deviation(row, k, y);
      grad_y[k] = slope * z * precision[k];
      if (grad_log_std) grad_log_std[k] += slope * z * z - slope;
    }
  }

  // The tangent of log_prob. `scratch` is [K].
  T tangent(Index row, const T* y, const T* y_t, const T* log_std_t, T* scratch) const {
    T sum = 0;
    if (labels) {
      probabilities(y, scratch);
      for (Index k = 0; k < K; ++k) sum += scratch[k] * y_t[k];
      return y_t[labels[row]] - sum;
    }
    for (Index k = 0; k < K; ++k) {
      const T z = deviation(row, k, y);
      sum += z * precision[k] * y_t[k] + (z * z - T(1)) * log_std_t[k];
    }
    return sum;
  }

  // y_t becomes the tangent of what `gradient` gives; adds that of the gradient of log_std.
  void gradient_tangent(Index row, const T* y, T slope, T slope_t, T* y_t, const T* log_std_t, T* grad_log_std_t,
                        T* scratch) const {
    if (labels) {
      probabilities(y, scratch);
      T mean = 0;
      for (Index k = 0; k < K; ++k) mean += scratch[k] * y_t[k];
      for (Index k = 0; k < K; ++k) y_t[k] = -slope_t * scratch[k] - slope * scratch[k] * (y_t[k] - mean);
      y_t[labels[row]] += slope_t;
      return;
    }
    for (Index k = 0; k < K; ++k) {
      const T z = deviation(row, k, y), z_t = -precision[k] * y_t[k] - z * log_std_t[k];
      y_t[k] = precision[k] * (slope_t * z + slope * (z_t - z * log_std_t[k]));
      if (grad_log_std_t) grad_log_std_t[k] += slope_t * (z * z - T(1)) + T(2) * slope * z * z_t;
    }
  }

  // The entropy; adds its gradient times `slope` to that of y (of a Gaussian, to that of log_std alone).
  T entropy(const T* y, T slope, T* grad_y, T* grad_log_std, T* scratch) const {
    if (log_std) {
      for (Index k = 0; k < K; ++k) grad_log_std[k] += slope;
      return log_scale + T(0.5) * T(K);
    }
    const T log_sum = probabilities(y, scratch);
    T entropy = 0;
    for (Index k = 0; k < K; ++k) entropy -= scratch[k] * (y[k] - log_sum);
    for (Index k = 0; k < K; ++k) grad_y[k] -= slope * scratch[k] * (y[k] - log_sum + entropy);
    return entropy;
  }

  // Writes softmax(y) and returns the logarithm of its denominator.
  T probabilities(const T* y, T* p) const {
    T highest = y[0], sum = 0;
    for (Index k = 1; k < K; ++k) highest = y[k] > highest ? y[k] : highest;
    for (Index k = 0; k < K; ++k) sum += p[k] = std::exp(y[k] - highest);
    for (Index k = 0; k < K; ++k) p[k] /= sum;
    return highest + std::log(sum);
  }

 private:
  T deviation(Index row, Index k, const T* y) const { return (actions[row * K + k] - y[k]) * precision[k]; }
  T log_sum_exp(const T* y) const {
    T highest = y[0], sum = 0;
    for (Index k = 1; k < K; ++k) highest = y[k] > highest ? y[k] : highest;
    for (Index k = 0; k < K; ++k) sum += std::exp(y[k] - highest);
    return highest + std::log(sum);
  }
};

// PPO's clipped surrogate min(r A, clip(r, 1 - epsilon, 1 + epsilon) A), r = exp(log_ratio) (Schulman et al. 2017,
// equation 7), and its derivative by the log-probability. Without an epsilon it is r A.
template <class T>
struct Surrogate {
  T value, slope, ratio;
  bool is_clipped;

  static Surrogate of(T log_ratio, T advantage, double epsilon) {
    const T ratio = std::exp(log_ratio), surrogate = ratio * advantage;
    if (epsilon == 0) return {surrogate, surrogate, ratio, false};
    const T low = T(1 - epsilon), high = T(1 + epsilon);
    const T clipped = ratio < low ? low : ratio > high ? high : ratio, bound = clipped * advantage;  // a NaN stays
    const bool follows = surrogate <= bound;  // elsewhere the loss is constant
    return {follows ? surrogate : bound, surrogate * T(follows), ratio, ratio != clipped};
  }
};

// Sequences and what a network should say of them, contiguous. The loss is the mean squared error from y, the cross
// entropy of labels, or, where there are advantages, the surrogate of the actions (labels of a discrete policy).
template <class T>
struct Examples {
  const T* x;                       // [B, T, I]; null: there are none
  const T* y;                       // [B, T, O], or null
  const std::int64_t* labels;       // [B, T] in [0, O), or null
  const T* actions;                 // [B, T, O], or null
  const T *log_probs, *advantages;  // [B, T], or null
  const T* s0;                      // [stages with a state, B, N], or null: zeros
  const std::uint8_t* reset;        // [B, T], or null
  Index B, T_len;
  double clip_epsilon;       // of the surrogate; 0: the ratio is not clipped
  double largest_log_ratio;  // of the surrogate: beyond, it is constant
};

// The mean loss of examples, for rows from `first` on. Outputs are y [rows, O].
template <class T>
class ExamplesLoss {
 public:
  ExamplesLoss(const Examples<T>& e, Index first, Index rows, Index O, const T* log_std, T* precision)
      : e_(e),
        first_(first),
        rows_(rows),
        O_(O),
        scale_(T(1.0 / double(e.B * e.T_len))),
        distribution_(Distribution<T>::of(O, e.actions ? log_std : nullptr, precision, e.actions, e.labels)) {}

  // The sum of the rows' losses. Writes the gradient of the mean, and that by log_std where it is not null.
  double gradient(const T* y, T* grad_y, T* grad_log_std) const {
    double total = 0;
    for (Index k = 0; grad_log_std && k < O_; ++k) grad_log_std[k] = 0;
    for (Index row = first_; row < first_ + rows_; ++row, y += O_, grad_y += O_) {
      if (e_.advantages) {
        const Surrogate<T> surrogate = surrogate_of(row, y);
        total -= double(surrogate.value);
        distribution_.gradient(row, y, surrogate.slope * -scale_, grad_y, grad_log_std);
      } else if (e_.y) {
        for (Index k = 0; k < O_; ++k) {
          const T error = y[k] - e_.y[row * O_ + k];
          total += double(error) * double(error) / double(O_);
          grad_y[k] = T(2) * scale_ / T(O_) * error;
        }
      } else {
        total -= double(distribution_.log_prob(row, y));
        distribution_.gradient(row, y, -scale_, grad_y, nullptr);
      }
    }
    return total;
  }

  // y_t, the tangent of the outputs, becomes that of the gradient; of a surrogate that is not clipped. `scratch` is
  // [O].
  void tangent(const T* y, const T* log_std_t, T* y_t, T* grad_log_std_t, T* scratch) const {
    for (Index k = 0; grad_log_std_t && k < O_; ++k) grad_log_std_t[k] = 0;
    for (Index row = first_; row < first_ + rows_; ++row, y += O_, y_t += O_) {
      if (e_.y) {
        for (Index k = 0; k < O_; ++k) y_t[k] *= T(2) * scale_ / T(O_);
        continue;
      }
      T slope = -scale_, slope_t = 0;
      if (e_.advantages) {
        slope *= surrogate_of(row, y).slope;
        slope_t = slope * distribution_.tangent(row, y, y_t, log_std_t, scratch);
      }
      distribution_.gradient_tangent(row, y, slope, slope_t, y_t, log_std_t, grad_log_std_t, scratch);
    }
  }

 private:
  Surrogate<T> surrogate_of(Index row, const T* y) const {
    const T bound = T(e_.largest_log_ratio);
    T log_ratio = distribution_.log_prob(row, y) - e_.log_probs[row];
    const bool moves = !(log_ratio < -bound || log_ratio > bound);  // NaN does
    if (!moves) log_ratio = log_ratio < T(0) ? -bound : bound;
    Surrogate<T> surrogate = Surrogate<T>::of(log_ratio, e_.advantages[row], e_.clip_epsilon);
    surrogate.slope *= T(moves);
    return surrogate;
  }

  const Examples<T>& e_;
  const Index first_, rows_, O_;
  const T scale_;
  const Distribution<T> distribution_;
};

}  // namespace ssm_fast
