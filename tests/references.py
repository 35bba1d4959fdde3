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


def linear_scan_eager(
    a: Tensor, b: Tensor, h0: Tensor | None = None, reverse: bool = False
) -> Tensor:
    """h_t = a_t * h_{t-1} + b_t of [B, T, ...], one differentiable step at a time."""
    a = a.expand(b.shape)
    state = torch.zeros_like(b[:, 0]) if h0 is None else h0
    states = []
    for t in reversed(range(b.shape[1])) if reverse else range(b.shape[1]):
        state = a[:, t] * state + b[:, t]
        states.append(state)
    return torch.stack(states[::-1] if reverse else states, dim=1)


def linear_scan_gradients(a: np.ndarray, h: np.ndarray, grad: np.ndarray) -> list[np.ndarray]:
    """Gradients of a and b of a scan from zero over the first dimension, by their formulas."""
    nothing = np.zeros_like(h[:1])
    grad_b = linear_scan_loop(np.concatenate([a[1:], nothing]), grad, None, True, 0)
    return [grad_b * np.concatenate([nothing, h[:-1]]), grad_b]


def output_norm_written_out(
    z: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    tanh: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    """residual + tanh(LN(z) * weight + bias), each part where it is asked for."""
    y = z
    if weight is not None:
        centred = z - z.mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)
        y = centred / torch.sqrt(variance + eps) * weight + bias
    y = torch.tanh(y) if tanh else y
    return y if residual is None else residual + y


def linear_by_groups(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    tanh: bool = False,
) -> Tensor:
    """tanh(x W^T + b) or x W^T + add, a group at a time: [G, M, I], [G, O, I] -> [G, M, O]."""
    y = torch.stack([x_g @ weight_g.T for x_g, weight_g in zip(x, weight, strict=True)])
    y = y if bias is None else y + bias[:, None]
    y = y if add is None else y + add
    return torch.tanh(y) if tanh else y


def weight_grad_sum(
    x: Tensor, s: Tensor, s0: Tensor | None, reset: Tensor, reverse: bool = False
) -> Tensor:
    """The sum of x_t h_t^T over rows and time: [G, B, T, N] twice -> [G, N, N]."""
    G, _, T, N = x.shape
    start = torch.zeros_like(s[:, :, 0]) if s0 is None else s0
    total = x.new_zeros(G, N, N)
    for t in range(T):
        if reverse:
            h = s[:, :, t + 1] * ~reset[:, :, t + 1, None] if t + 1 < T else start
        else:
            h = (start if t == 0 else s[:, :, t - 1]) * ~reset[:, :, t, None]
        total = total + x[:, :, t].mT @ h
    return total


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


def gae_loop(
    rewards: np.ndarray,
    values: np.ndarray,
    next_values: np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray,
    gamma: float,
    gae_lambda: float,
) -> np.ndarray:
    """Advantages of long trajectories [T, B], backwards in time."""
    delta = rewards + gamma * next_values * ~terminated - values
    goes_on = gamma * gae_lambda * ~(terminated | truncated)
    later = np.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        later = delta[t] = delta[t] + goes_on[t] * later
    return delta


def returns_loop(
    rewards: np.ndarray,
    next_values: np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray,
    gamma: float,
) -> np.ndarray:
    """Discounted returns of long trajectories [T, B], backwards in time."""
    returns = np.empty_like(rewards)
    later = next_values[-1]
    for t in reversed(range(len(rewards))):
        later = np.where(truncated[t], next_values[t], later) * ~terminated[t]
        later = returns[t] = rewards[t] + gamma * later
    return returns
