"""State-space-model kernels for PyTorch, and recurrent reinforcement learning on top of them."""

from typing import TYPE_CHECKING

from ssm_fast import ops
from ssm_fast.nn import SSM

if TYPE_CHECKING:
    from ssm_fast.policy import load_policy

__version__ = "0.1.0"
__all__ = ["SSM", "__version__", "load_policy", "ops"]


def __getattr__(name: str) -> object:
    """Import what not every user of a layer needs when it is first asked for."""
    if name == "load_policy":
        from ssm_fast.policy import load_policy

        return load_policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
