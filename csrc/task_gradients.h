// The gradient of MAML through its inner steps, written out for the networks of this package; docs/meta_maml.md.
#pragma once

#include "task_chain.h"

namespace ssm_fast {

// A StateSpaceModel; weights in the order A, B, D, C1, c1, C2, c2.
struct StateSpaceSizes {
  Index I, N, H, O;
};
Index weights_of(const StateSpaceSizes& sizes);
void task_gradients(const TaskGradients<float>&, const StateSpaceSizes&);
void task_gradients(const TaskGradients<double>&, const StateSpaceSizes&);

// What of an ImprovedSSM leads to its actions; weights in the order encoder weight and bias, actor weight and bias, of
// every layer A, B, bias, C, D and weight and bias of its norm, and log_std. The last three are there where the sizes
// say.
struct PolicySizes {
  Index I, H, N, L, O;
  bool norm, residual, gaussian;
  double eps;
};
Index weights_of(const PolicySizes& sizes);
void task_gradients(const TaskGradients<float>&, const PolicySizes&);
void task_gradients(const TaskGradients<double>&, const PolicySizes&);

}  // namespace ssm_fast
