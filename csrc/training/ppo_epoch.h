// An epoch of PPO in one call: every minibatch of a rollout, its loss, gradient and step of Adam; docs/training.md.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "../network/network.h"
#include "losses.h"

namespace ssm_fast {

// A rollout cut into S sequences of L steps, contiguous.
template <class T>
struct RolloutSequences {
  const T *x, *actions;                                    // [S, L, I], [S, L, K]; or, of a discrete policy, labels
  const std::int64_t* labels;                              // [S, L]
  const T *log_probs, *old_values, *returns, *advantages;  // [S, L]; those of a minibatch are standardized here
  const std::uint8_t* reset;                               // [S, L]
  const T* state;                                          // [layers, S, N]
  Index S, L;
};

struct PpoLoss {
  double clip_epsilon, value_coef, entropy_coef;
  bool clip_value_loss;
};

// Adam of all parameters as one vector [P], in the order of the network.
template <class T>
struct AdamState {
  T *vector, *gradient, *m, *v;              // `gradient` receives that of each minibatch
  const T* lr_scales;                        // of each entry, in learning rates
  std::vector<std::pair<T*, Index>> values;  // where the entries of the vector go, and how many
  double learning_rate, beta1, beta2, eps, max_norm;
  Index steps;  // taken before
};

constexpr Index kMetrics =
    6;  // of a minibatch: policy loss, value loss, entropy, KL divergence, clipped, gradient norm

// Learns from the sequences `order` names, `minibatch` of them at a time, and writes the metrics [minibatches, 6].
// Returns how many steps were taken: a gradient that is not finite ends the epoch before its own.
// Threads split a large minibatch by sequences. The last bits depend on their number: an exception to the rule.
// The network's branches give the means or logits, and the values; its weights lie at adam.values.
template <class T>
Index ppo_epoch(const Network<T>& network, int log_std, const RolloutSequences<T>& rollout, const std::int64_t* order,
                Index count, Index minibatch, const PpoLoss& loss, const AdamState<T>& adam, double* metrics);

}  // namespace ssm_fast
