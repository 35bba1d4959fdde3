"""linear on a GPU: torch's own products and elementwise kernels. Maths in docs/ops/linear.md."""

from ssm_fast.ops.linear import composed_gradients as linear_grad
from ssm_fast.ops.linear import composed_tangent as linear_tangent
from ssm_fast.ops.linear import reference as linear

__all__ = ["linear", "linear_grad", "linear_tangent"]
