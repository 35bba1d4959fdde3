// The gradient of MAML through its inner steps for a StateSpaceModel, written out; docs/meta_maml.md.
#pragma once

#include <cstdint>

#include "ops.h"

namespace ssm_fast {

// Sequences and what the model should say of them, contiguous.
template <class T>
struct Examples {
  const T* x;                  // [B, T, I]
  const T* y;                  // [B, T, O] for the mean squared error, or null
  const std::int64_t* labels;  // [B, T] in [0, O) for the cross entropy, or null
  const T* s0;                 // [B, N], or null: zeros
  const std::uint8_t* reset;   // [B, T], or null
  Index B, T_len;
};

template <class T>
struct TaskGradients {
  const T *weights, *rates;           // [P]: A, B, D, C1, c1, C2, c2
  const Examples<T>*support, *query;  // [G] each
  T* gradients;                       // [G, P], of the query losses by the weights
  T* rate_gradients;                  // [G, P], by the rates; null if not wanted
  double* losses;                     // [K + 1, G]: before each inner step, then of the query set
  Index G, I, N, H, O, K;
  bool first_order;
};

void task_gradients(const TaskGradients<float>&);
void task_gradients(const TaskGradients<double>&);

}  // namespace ssm_fast
