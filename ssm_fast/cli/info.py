"""The command `info`."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import ssm_fast
from ssm_fast import _native
from ssm_fast.cli.messages import say


def print_info() -> None:
    """Writes versions, instruction sets, threads and GPUs."""
    for name, text in versions().items():
        say(f"{name:12} {text}")
    say(f"{'ISA':12} {_native.isa()} (available: {', '.join(_native.available_isas())})")
    say(f"{'threads':12} {torch.get_num_threads()} of {os.cpu_count()} processors")
    if not torch.cuda.is_available():
        say(f"{'GPU':12} none")
    for i in range(torch.cuda.device_count()):
        say(f"{'GPU':12} {torch.cuda.get_device_name(i)}")


def versions() -> dict[str, str]:
    """The versions of the package and of what it runs on."""
    found = {"ssm_fast": ssm_fast.__version__, "python": platform.python_version()}
    for name in ("torch", "triton", "gymnasium", "mujoco"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
