// The losses of a task, their gradients with respect to a network's outputs, and the tangents of these.
#pragma once

#include <cmath>

#include "task_chain.h"

namespace ssm_fast {

// log_std [O] of a Gaussian policy and exp(-log_std); null of other networks.
template <class T>
struct Spread {
  const T *log_std, *precision;
};

// The loss of `rows` rows of examples from `first` on, whose outputs are y [rows, O].
template <class T>
class TaskLoss {
 public:
  TaskLoss(const Examples<T>& e, Index first, Index rows, Index O, Spread<T> spread)
      : e_(e), first_(first), rows_(rows), O_(O), spread_(spread), scale_(T(1.0 / double(e.B * e.T_len))) {}

  // The sum of the losses; writes the gradient of the mean over all rows, and that by log_std where it is not null.
  double gradient(const T* y, T* grad_y, T* grad_log_std) const {
    double total = 0;
    for (Index o = 0; grad_log_std && o < O_; ++o) grad_log_std[o] = 0;
    for (Index r = 0; r < rows_; ++r, y += O_, grad_y += O_) {
      const Index row = first_ + r;
      if (e_.advantages) {
        const Chosen chosen = choose(row, y);
        total -= double(chosen.value);
        if (e_.labels) {
          probabilities(y, grad_y);
          for (Index o = 0; o < O_; ++o) grad_y[o] *= -chosen.slope;
          grad_y[e_.labels[row]] += chosen.slope;
        } else {
          for (Index o = 0; o < O_; ++o) {
            const T z = deviation(row, o, y);
            grad_y[o] = chosen.slope * z * spread_.precision[o];
            if (grad_log_std) grad_log_std[o] += chosen.slope * (z * z - T(1));
          }
        }
      } else if (e_.y) {
        for (Index o = 0; o < O_; ++o) {
          const T error = y[o] - e_.y[row * O_ + o];
          total += double(error) * double(error) / double(O_);
          grad_y[o] = T(2) * scale_ / T(O_) * error;
        }
      } else {
        total += double(probabilities(y, grad_y) - y[e_.labels[row]]);
        for (Index o = 0; o < O_; ++o) grad_y[o] *= scale_;
        grad_y[e_.labels[row]] -= scale_;
      }
    }
    return total;
  }

  // Turns y_t, the tangent of the outputs, into that of the gradient, with log_std_t; of a surrogate that is not
  // clipped.
  void turn(const T* y, const T* log_std_t, T* y_t, T* grad_log_std_t, T* scratch) const {
    for (Index o = 0; grad_log_std_t && o < O_; ++o) grad_log_std_t[o] = 0;
    for (Index r = 0; r < rows_; ++r, y += O_, y_t += O_) {
      const Index row = first_ + r;
      if (e_.advantages && !e_.labels) {
        const T slope = choose(row, y).slope;
        T log_prob_t = 0;
        for (Index o = 0; o < O_; ++o) {
          const T z = deviation(row, o, y);
          log_prob_t += z * spread_.precision[o] * y_t[o] + (z * z - T(1)) * log_std_t[o];
        }
        const T slope_t = slope * log_prob_t;
        for (Index o = 0; o < O_; ++o) {
          const T precision = spread_.precision[o], z = deviation(row, o, y);
          const T z_t = -precision * y_t[o] - z * log_std_t[o];
          y_t[o] = precision * (slope_t * z + slope * (z_t - z * log_std_t[o]));
          if (grad_log_std_t) grad_log_std_t[o] += slope_t * (z * z - T(1)) + T(2) * slope * z * z_t;
        }
      } else if (e_.y) {
        for (Index o = 0; o < O_; ++o) y_t[o] *= T(2) * scale_ / T(O_);
      } else {
        // Of -slope (1_label - p), p = softmax(y); of the cross entropy, the slope is constant.
        probabilities(y, scratch);
        T mean = 0;
        for (Index o = 0; o < O_; ++o) mean += scratch[o] * y_t[o];
        const Index label = e_.labels[row];
        const T slope = e_.advantages ? choose(row, y).slope : -scale_;
        const T slope_t = e_.advantages ? slope * (y_t[label] - mean) : T(0);
        for (Index o = 0; o < O_; ++o) y_t[o] = -slope_t * scratch[o] - slope * scratch[o] * (y_t[o] - mean);
        y_t[label] += slope_t;
      }
    }
  }

 private:
  struct Chosen {
    T value, slope;  // the surrogate, and the derivative of the mean loss by the log-probability
  };

  // Writes softmax(y) and returns the logarithm of its denominator.
  T probabilities(const T* y, T* p) const {
    T highest = y[0], sum = 0;
    for (Index o = 1; o < O_; ++o) highest = y[o] > highest ? y[o] : highest;
    for (Index o = 0; o < O_; ++o) sum += p[o] = std::exp(y[o] - highest);
    for (Index o = 0; o < O_; ++o) p[o] /= sum;
    return highest + std::log(sum);
  }

  T deviation(Index row, Index o, const T* y) const { return (e_.actions[row * O_ + o] - y[o]) * spread_.precision[o]; }

  T log_prob(Index row, const T* y) const {
    if (e_.labels) {
      T highest = y[0], sum = 0;
      for (Index o = 1; o < O_; ++o) highest = y[o] > highest ? y[o] : highest;
      for (Index o = 0; o < O_; ++o) sum += std::exp(y[o] - highest);
      return y[e_.labels[row]] - highest - std::log(sum);
    }
    T energy = 0;
    for (Index o = 0; o < O_; ++o) {
      const T z = deviation(row, o, y);
      energy += T(0.5) * z * z + spread_.log_std[o] + T(0.91893853320467274);  // log(2 pi) / 2
    }
    return -energy;
  }

  Chosen choose(Index row, const T* y) const {
    const T bound = T(e_.largest_log_ratio), advantage = e_.advantages[row];
    T log_ratio = log_prob(row, y) - e_.log_probs[row];
    const bool moves = !(log_ratio < -bound || log_ratio > bound);  // NaN does
    if (!moves) log_ratio = log_ratio < T(0) ? -bound : bound;
    const T ratio = std::exp(log_ratio), surrogate = ratio * advantage;
    if (e_.clip_epsilon == 0) return {surrogate, surrogate * T(moves) * -scale_};
    const T low = T(1 - e_.clip_epsilon), high = T(1 + e_.clip_epsilon);
    const T clipped = (ratio < low ? low : ratio > high ? high : ratio) * advantage;
    const bool follows = surrogate <= clipped;  // elsewhere the loss is constant
    return {follows ? surrogate : clipped, surrogate * T(follows && moves) * -scale_};
  }

  const Examples<T>& e_;
  const Index first_, rows_, O_;
  const Spread<T> spread_;
  const T scale_;
};

}  // namespace ssm_fast
