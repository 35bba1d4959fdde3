"""State-space-model kernels for PyTorch, and recurrent reinforcement learning on top of them."""

from ssm_fast import ops
from ssm_fast.nn import SSM
from ssm_fast.policy import load_policy

__version__ = "0.1.0"
__all__ = ["SSM", "__version__", "load_policy", "ops"]
