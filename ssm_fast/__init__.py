"""State-space-model kernels for PyTorch, and recurrent reinforcement learning on top of them."""

from __future__ import annotations

from importlib.metadata import version

from ssm_fast import ops

__version__ = version("ssm_fast")
__all__ = ["__version__", "ops"]
