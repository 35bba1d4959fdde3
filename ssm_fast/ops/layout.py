"""How tensors of the ops lie in memory."""

from __future__ import annotations

from torch import Tensor


def empty_states(u: Tensor) -> Tensor:
    """Memory for the states in the layout of ``u``: time-major if ``u`` is, else batch-major."""
    G, B, T, N = u.shape
    if u.stride(2) > u.stride(1) > 0 and B > 1:
        return u.new_empty(G, T, B, N).transpose(1, 2)
    return u.new_empty(G, B, T, N)


def last_contiguous(x: Tensor) -> Tensor:
    """``x`` with elements of its last dimension side by side, as the kernels need it."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def fold(x: Tensor, in_dim: int | None, size: int, to: int) -> Tensor:
    """Merge a vmapped dimension of ``x`` into its dimension ``to``."""
    if in_dim is None:
        x = x.unsqueeze(to).expand(*x.shape[:to], size, *x.shape[to:])
    else:
        x = x.movedim(in_dim, to)
    return x.flatten(to, to + 1)
