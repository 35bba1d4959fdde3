"""State-space-model kernels for PyTorch, and recurrent reinforcement learning on top of them."""

import os
import sys
from typing import TYPE_CHECKING


def _is_command_line() -> bool:
    """Whether this process is `ssm-fast` or `python -m ssm_fast`."""
    command = sys.argv[0] if sys.argv else ""
    return os.path.basename(command) == "ssm-fast" or (
        command == "-m" and "ssm_fast" in sys.orig_argv
    )


# The command line prints help and mistakes without torch, which takes seconds to import.
# Everywhere else `import ssm_fast` registers the ops, which a .pt2 file needs.
if TYPE_CHECKING or not _is_command_line():
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
