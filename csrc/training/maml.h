// MAML's chain rule through the inner steps of the tasks of a batch, each task on one thread; docs/meta_maml.md.
#pragma once

#include "../network/network.h"
#include "losses.h"

namespace ssm_fast {

template <class T>
struct TaskGradients {
  const T *weights, *rates;  // [P], of all parameters in the order of the network
  const Examples<T>* inner;  // [K, G], what each step is taken on
  const Examples<T>* outer;  // [K + 1, G], what the weights before each step, and after the last, are judged by
  T* gradients;              // [G, P], of the outer losses by the weights
  T* rate_gradients;         // [G, P], by the rates; null if not wanted
  double* inner_losses;      // [K, G], before each step
  double* outer_losses;      // [K + 1, G]; 0 where there are no examples
  Index G, K;
  int log_std;  // the parameter of a Gaussian policy, or -1
  bool first_order;
};

// The outputs of the network's first branch are what the losses read.
template <class T>
void task_gradients(const Network<T>& network, const TaskGradients<T>& p);

}  // namespace ssm_fast
