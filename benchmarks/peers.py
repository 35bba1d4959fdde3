"""What the dense recurrences are compared with: their GEMM floor, torch's recurrent layers and JAX."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


SHAPES = [  # B, T, N
    (8, 256, 64),
    (64, 256, 64),
    (64, 1000, 64),
    (32, 256, 128),
    (1, 1000, 64),
    (256, 128, 32),
]


def three_mm(u: Tensor, A: Tensor) -> Callable[[], None]:
    """The products that a recurrence and its gradients cannot do without."""
    x, A = u.detach().reshape(-1, u.shape[-1]).clone(), A.detach()

    def run() -> None:
        torch.mm(x, A)
        torch.mm(x, A)
        torch.mm(x.T, x)

    return run


def torch_contenders(u: Tensor, weights: Tensor | None = None) -> dict[str, Callable[[], Any]]:
    """nn.RNN, nn.GRU and nn.LSTM on ``u`` [B, T, N]; with ``weights`` also the gradients of all."""
    N = u.shape[-1]
    contenders: dict[str, Callable[[], Any]] = {}
    for kind in ("RNN", "GRU", "LSTM"):
        layer = getattr(torch.nn, kind)(N, N, batch_first=True)
        leaves = (u, *layer.parameters())
        if weights is None:
            contenders[f"nn.{kind}"] = lambda layer=layer: layer(u)
        else:
            contenders[f"nn.{kind}"] = lambda layer=layer, leaves=leaves: torch.autograd.grad(
                layer(u)[0], leaves, weights
            )
    return contenders


def jax_contenders(
    tensors: tuple[Tensor, ...], weights: Tensor | None = None, eps: float = 1e-5
) -> dict[str, Callable[[], Any]]:
    """`lax.scan` compiled by XLA, by its name; none where jax is not installed.

    Args:
        tensors: u `[B, T, N]` and A, and weight and bias for the scan with a layer norm.
        weights: cotangent of the states; with it the contender takes the gradients of all tensors.
        eps: of the layer norm.
    """
    if importlib.util.find_spec("jax") is None:
        return {}
    import jax
    import jax.numpy as jnp

    def scan(u: jax.Array, A: jax.Array, *norm: jax.Array) -> jax.Array:
        def step(state: jax.Array, u_t: jax.Array) -> tuple[jax.Array, jax.Array]:
            state = state @ A.T + u_t
            if norm:
                centred = state - state.mean(-1, keepdims=True)
                variance = (centred * centred).mean(-1, keepdims=True)
                state = centred * jax.lax.rsqrt(variance + eps) * norm[0] + norm[1]
            return state, state

        _, states = jax.lax.scan(step, jnp.zeros_like(u[:, 0]), u.swapaxes(0, 1))
        return states.swapaxes(0, 1)

    arrays = [jnp.asarray(x.detach().numpy()) for x in tensors]
    if weights is None:
        forward = jax.jit(scan)
        return {"JAX lax.scan": lambda: jax.block_until_ready(forward(*arrays))}
    cotangent = jnp.asarray(weights.numpy())

    def loss(*leaves: jax.Array) -> jax.Array:
        return (scan(*leaves) * cotangent).sum()

    gradient = jax.jit(jax.value_and_grad(loss, range(len(arrays))))
    return {"JAX lax.scan": lambda: jax.block_until_ready(gradient(*arrays))}
