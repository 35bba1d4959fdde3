"""Float64 NumPy loops over a layer's own parameters, sharing no code with ssm_fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

Array = NDArray[np.float64]
EPS = 1e-5  # nn.LayerNorm's default

ACTIVATIONS: dict[str | None, Callable[[Array], Array]] = {
    None: lambda z: z,
    "tanh": np.tanh,
    "relu": lambda z: np.maximum(z, 0.0),
    "silu": lambda z: z / (1.0 + np.exp(-z)),
}


def weights(module: nn.Module) -> dict[str, Array]:
    """Every parameter by its name."""
    return {
        name: value.detach().double().numpy().copy() for name, value in module.named_parameters()
    }


def layer_norm(z: Array, weight: Array, bias: Array) -> Array:
    centred = z - z.mean(-1, keepdims=True)
    std = np.sqrt((centred**2).mean(-1, keepdims=True) + EPS)
    return np.asarray(centred / std * weight + bias)


def layer_loop(
    w: dict[str, Array], x: Array, s0: Array | None, reset: Any, norm: str | None, prefix: str = ""
) -> tuple[Array, Array]:
    """Outputs [B, T, H] and states [B, T, N] of one layer, one row and one step at a time."""
    w = {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}
    B, T, _ = x.shape
    N, H = w["A"].shape[0], w["C"].shape[0]
    y, s = np.empty((B, T, H)), np.empty((B, T, N))
    for b in range(B):
        state = np.zeros(N) if s0 is None else np.array(s0[b], dtype=np.float64)
        for t in range(T):
            if reset is not None and reset[b, t]:
                state = np.zeros(N)
            state = w["A"] @ state + w["B"] @ x[b, t] + w.get("bias", 0.0)
            if norm == "state":
                state = layer_norm(state, w["norm.weight"], w["norm.bias"])
            out = w["C"] @ state + w["D"] @ x[b, t]
            if norm == "output":
                out = layer_norm(out, w["norm.weight"], w["norm.bias"])
            y[b, t], s[b, t] = out, state
    return y, s


def stack_loop(
    module: nn.Module, x: Array, h0: Array | None, reset: Any, activation: str | None = None
) -> tuple[Array, Array]:
    """Outputs [B, T, H] and last states [L, B, N] of an `SSM` in evaluation mode."""
    w = weights(module)
    L = int(module.num_layers)
    h_n = []
    for i in range(L):
        s0 = None if h0 is None else h0[i]
        y, s = layer_loop(w, x, s0, reset, module.norm, f"layers.{i}.")
        if i < L - 1:
            y = ACTIVATIONS[activation](y)
        x = x + y if module.residual and x.shape[-1] == y.shape[-1] else y
        h_n.append(s[:, -1])
    return x, np.stack(h_n)
