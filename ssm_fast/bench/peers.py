"""What the recurrences are compared with: torch's recurrent layers, JAX and TorchRL."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Contenders: TypeAlias = dict[str, Callable[[], Any]]

OPTIONAL = {"jax": "JAX lax.scan", "torchrl": "TorchRL vectorised"}  # packages, and contenders


def missing_peers() -> list[str]:
    """The optional packages that are not installed."""
    return [name for name in OPTIONAL if importlib.util.find_spec(name) is None]


def torch_contenders(u: Tensor, weights: Tensor | None = None) -> Contenders:
    """nn.RNN, nn.GRU and nn.LSTM of the width of a sequence.

    Args:
        u: The sequences `[B, T, N]`.
        weights: Cotangent of the outputs `[B, T, N]`; with it, the gradients of all are taken.
    """
    contenders: Contenders = {}
    for kind in ("RNN", "GRU", "LSTM"):
        layer = getattr(nn, kind)(u.shape[-1], u.shape[-1], batch_first=True).to(u.device)
        contenders[f"nn.{kind}"] = _call(layer, u, weights)
    return contenders


def _call(layer: nn.Module, u: Tensor, weights: Tensor | None) -> Callable[[], Any]:
    if weights is None:
        return lambda: layer(u)
    leaves = (u, *layer.parameters())
    return lambda: torch.autograd.grad(layer(u)[0], leaves, weights)


class GRUPolicy(nn.Module):
    """What users write for a policy with memory: linear layers around two GRU cells."""

    def __init__(self, input_dim: int, action_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(input_dim, hidden_dim)
        self.actor, self.critic = nn.Linear(hidden_dim, action_dim), nn.Linear(hidden_dim, 1)
        self.cells = nn.ModuleList(nn.GRUCell(hidden_dim, hidden_dim) for _ in range(2))

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step: action, value and next state `[2, B, H]`."""
        h = torch.tanh(self.encoder(x))
        states = []
        for cell, s in zip(self.cells, state, strict=True):
            h = cell(h, s)
            states.append(h)
        return self.actor(h), self.critic(h), torch.stack(states)


def jax_contenders(
    tensors: tuple[Tensor, ...], weights: Tensor | None = None, eps: float = 1e-5
) -> Contenders:
    """`lax.scan` compiled by XLA, by its name; none where jax is not installed.

    Args:
        tensors: u `[B, T, N]` and A, and weight and bias for the scan with a layer norm.
        weights: Cotangent of the states; with it, the contender takes the gradients of all tensors.
        eps: Of the layer norm.
    """
    if importlib.util.find_spec("jax") is None:
        return {}
    import jax
    import jax.numpy as jnp

    finished: Any = jax.block_until_ready

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
        return {"JAX lax.scan": lambda: finished(forward(*arrays))}
    cotangent = jnp.asarray(weights.numpy())

    def loss(*leaves: jax.Array) -> jax.Array:
        return (scan(*leaves) * cotangent).sum()

    gradient = jax.jit(jax.value_and_grad(loss, range(len(arrays))))
    return {"JAX lax.scan": lambda: finished(gradient(*arrays))}


def torchrl_contenders(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor
) -> Contenders:
    """TorchRL's advantages of sequences `[B, T]`; none where it is not installed."""
    if importlib.util.find_spec("torchrl") is None:
        return {}
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    columns = [x.unsqueeze(-1) for x in (values, next_values, rewards)]
    flags = {"done": (terminated | truncated).unsqueeze(-1), "terminated": terminated.unsqueeze(-1)}
    return {
        OPTIONAL["torchrl"]: lambda: vec_generalized_advantage_estimate(
            0.99, 0.95, *columns, **flags, time_dim=-2
        )
    }
