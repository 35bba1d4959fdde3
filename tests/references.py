"""Independent references: plain loops over time that share no code with ssm_fast."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of the expected values."""
    error = actual.detach().double() - expected.detach().double()
    return float(error.square().mean().sqrt() / expected.detach().double().square().mean().sqrt())


def dense_scan_loop(
    u: Tensor, A: Tensor, s0: Tensor | None = None, reset: Tensor | None = None
) -> Tensor:
    """s_t = A (1 - reset_t) s_{t-1} + u_t, one eager step at a time: what users write today."""
    state = u.new_zeros(u.shape[0], u.shape[2]) if s0 is None else s0
    states = []
    for t in range(u.shape[1]):
        if reset is not None:
            state = state * (1 - reset[:, t, None].to(u.dtype))
        state = torch.addmm(u[:, t], state, A.T)
        states.append(state)
    return torch.stack(states, dim=1)


def norm_scan_loop(
    u: Tensor,
    A: Tensor,
    weight: Tensor,
    bias: Tensor,
    s0: Tensor | None = None,
    reset: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """s_t = LN(A (1 - reset_t) s_{t-1} + u_t) * weight + bias with the norm written out."""
    state = u.new_zeros(u.shape[0], u.shape[2]) if s0 is None else s0
    states = []
    for t in range(u.shape[1]):
        if reset is not None:
            state = state * (1 - reset[:, t, None].to(u.dtype))
        z = torch.addmm(u[:, t], state, A.T)
        centred = z - z.mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)
        state = centred / torch.sqrt(variance + eps) * weight + bias
        states.append(state)
    return torch.stack(states, dim=1)


def linear_scan_loop(
    a: np.ndarray, b: np.ndarray, h0: np.ndarray | None, reverse: bool, dim: int
) -> np.ndarray:
    """h_t = a_t * h_{t-1} + b_t in NumPy."""
    a = np.moveaxis(np.broadcast_to(a, b.shape), dim, 0)
    b = np.moveaxis(b, dim, 0)
    h = np.empty_like(b)
    state = np.zeros_like(b[0]) if h0 is None else h0
    for t in reversed(range(len(b))) if reverse else range(len(b)):
        state = a[t] * state + b[t]
        h[t] = state
    return np.moveaxis(h, 0, dim)


def gae_by_definition(
    rewards: np.ndarray,
    values: np.ndarray,
    next_values: np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray,
    gamma: float,
    gae_lambda: float,
) -> np.ndarray:
    """Advantages of one trajectory as the explicit sum of (gamma lambda)^l delta_{t+l}."""
    T = len(rewards)
    advantages = np.zeros(T)
    for t in range(T):
        weight = 1.0
        for k in range(t, T):
            bootstrap = 0.0 if terminated[k] else gamma * next_values[k]
            advantages[t] += weight * (rewards[k] + bootstrap - values[k])
            if terminated[k] or truncated[k]:
                break
            weight *= gamma * gae_lambda
    return advantages


def returns_by_definition(
    rewards: np.ndarray,
    next_values: np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray,
    gamma: float,
) -> np.ndarray:
    """Discounted returns of one trajectory as the explicit sum of rewards and a bootstrap."""
    T = len(rewards)
    returns = np.zeros(T)
    for t in range(T):
        discount = 1.0
        for k in range(t, T):
            returns[t] += discount * rewards[k]
            discount *= gamma
            if terminated[k]:
                break
            if truncated[k] or k == T - 1:
                returns[t] += discount * next_values[k]
                break
    return returns
