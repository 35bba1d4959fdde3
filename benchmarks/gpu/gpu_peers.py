"""Libraries that the Triton kernels are measured beside, where this machine can import them."""

from __future__ import annotations

import functools
import importlib
from typing import Any

PEERS = {  # by their names in the tables: a module, and the function of it that is timed
    "TorchRL gru_triton": ("torchrl.modules.tensordict_module._rnn_triton", "gru_triton"),
    "FlashRNN LSTM": ("flashrnn", "flashrnn"),
    "accelerated-scan": ("accelerated_scan.warp", "scan"),
}
# Of a package that is not installed or of another version, a library that does not load, and a
# kernel that does not compile against this machine's CUDA while it is imported.
_BROKEN = (ImportError, AttributeError, OSError, RuntimeError)
_LONGEST_REASON = 200  # characters


def importable(peer: str) -> Any:
    """A peer's function, or None where it cannot be imported."""
    return _find(peer)[0]


def absent() -> dict[str, str]:
    """The peers that cannot be imported, each with the reason."""
    return {peer: reason for peer in PEERS if (reason := _find(peer)[1])}


@functools.cache  # a kernel that does not compile takes a while to say so
def _find(peer: str) -> tuple[Any, str]:
    module, name = PEERS[peer]
    try:
        return getattr(importlib.import_module(module), name), ""
    except _BROKEN as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return None, reason[:_LONGEST_REASON]
