"""The scans in JAX: `lax.scan` compiled by XLA, the strongest peer on a CPU. Optional: empty without jax."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def jax_contenders(
    tensors: tuple[Tensor, ...], weights: Tensor | None = None, eps: float = 1e-5
) -> dict[str, Callable[[], Any]]:
    """A contender of `contest` by its name, or none where jax is not installed.

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
