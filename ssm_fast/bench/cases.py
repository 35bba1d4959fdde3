"""The ops and layers in sizes that fit the machine, each beside what does the same otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from ssm_fast.bench import Op
from ssm_fast.bench.peers import (
    Contenders,
    GRUPolicy,
    jax_contenders,
    torch_contenders,
    torchrl_contenders,
)
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.nn import SSM
from ssm_fast.ops import (
    dense_scan,
    discounted_returns,
    gae,
    linear_scan,
    norm_scan,
    output_norm,
)
from ssm_fast.ops.dispatch import Impl

OPS: tuple[Op, ...] = get_args(Op)
_LARGEST_LOOP = 1 << 20  # elements of a scan; beyond, an eager loop only takes time
_STATE = 64


@dataclass(frozen=True)
class Case:
    """One contest.

    Attributes:
        name: Op, what is done, and the sizes: the same on every machine that has them.
        contenders: What is timed; the first is ours.
        gradients: Whether they are called where gradients are recorded.
        calls: Calls in a round.
    """

    name: str
    contenders: Contenders
    gradients: bool = False
    calls: int = 1

    @property
    def ours(self) -> str:
        """The contender whose speed is tracked."""
        return next(iter(self.contenders))


def make_cases(op: Op, device: torch.device, threads: int, quick: bool) -> Iterator[Case]:
    """The contests of an op, those of a size made when they are asked for.

    Args:
        op: One of `OPS`.
        device: Where the tensors are.
        threads: Of torch; a batch that fills a CPU has so many times 32 rows.
        quick: Small sizes only.
    """
    full = 4096 if device.type == "cuda" else 32 * threads
    sizes = [(8, 256, _STATE)]
    if not quick:
        sizes += [(full, 256, _STATE), (full // 2, 256, 2 * _STATE)]
    makers = {
        "dense_scan": _recurrences,
        "norm_scan": _recurrences,
        "linear_scan": _linear_scans,
        "output_norm": _output_norms,
        "gae": _advantages,
        "discounted_returns": _advantages,
        "policy_step": _policy_steps,
        "ssm": _layers,
    }
    for B, T, N in sizes:
        torch.manual_seed(0)
        with device:
            cases = makers[op](op, B, T, N)
        yield from cases


def _recurrences(op: str, B: int, T: int, N: int) -> list[Case]:
    u, weights = torch.randn(2, B, T, N)
    A = 0.9 * torch.linalg.qr(torch.randn(N, N))[0]
    tensors = (u, A) if op == "dense_scan" else (u, A, torch.ones(N), torch.zeros(N))
    leaves = tuple(tensor.clone().requires_grad_() for tensor in tensors)
    scan: Any = dense_scan if op == "dense_scan" else norm_scan
    x = u.reshape(-1, N)
    forward: Contenders = {
        op: lambda: scan(*tensors),
        "one mm of all steps": lambda: torch.mm(x, A),
        "eager loop": lambda: scan(*tensors, impl="reference"),
        **torch_contenders(u),
    }
    backward: Contenders = {
        op: lambda: torch.autograd.grad(scan(*leaves), leaves, weights),
        "eager loop": lambda: torch.autograd.grad(scan(*leaves, impl="reference"), leaves, weights),
        **torch_contenders(leaves[0], weights),
    }
    if u.device.type == "cpu":
        forward |= jax_contenders(tensors)
        backward |= jax_contenders(leaves, weights)
    return _both(f"{op} B{B} T{T} N{N}", forward, backward)


def _linear_scans(op: str, B: int, T: int, N: int) -> list[Case]:
    a, b, weights = torch.rand(3, B, T, N)
    leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
    forward: Contenders = {op: lambda: linear_scan(a, b), "a * b": lambda: a * b}
    backward: Contenders = {
        op: lambda: torch.autograd.grad(linear_scan(*leaves), leaves, weights),
        "a * b": lambda: torch.autograd.grad(leaves[0] * leaves[1], leaves, weights),
    }
    if b.numel() <= _LARGEST_LOOP:
        forward["eager loop"] = lambda: linear_scan(a, b, impl="reference")
        backward["eager loop"] = lambda: torch.autograd.grad(
            linear_scan(*leaves, impl="reference"), leaves, weights
        )
    return _both(f"{op} B{B} T{T} N{N}", forward, backward)


def _output_norms(op: str, B: int, T: int, N: int) -> list[Case]:
    z, residual, cotangent = torch.randn(3, B, T, N)
    weight, bias = torch.ones(N), torch.zeros(N)
    tensors = (z, weight, bias, residual)
    leaves = tuple(tensor.clone().requires_grad_() for tensor in tensors)

    def run(impl: Impl, tensors: Sequence[Tensor] = tensors) -> Tensor:
        z, weight, bias, residual = tensors
        return output_norm(z, weight, bias, residual, tanh=True, impl=impl)

    def run_backward(impl: Impl) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(impl, leaves), leaves, cotangent)

    others = "three torch calls"
    forward: Contenders = {op: lambda: run("auto"), others: lambda: run("reference")}
    backward: Contenders = {
        op: lambda: run_backward("auto"),
        others: lambda: run_backward("reference"),
    }
    return _both(f"{op} B{B} T{T} N{N}", forward, backward)


def _advantages(op: str, B: int, T: int, N: int) -> list[Case]:
    if N != _STATE:  # there is no state
        return []
    rewards, values, next_values = torch.randn(3, B, T)
    terminated, truncated = torch.rand(2, B, T) < 0.01
    if op == "gae":
        inputs = (rewards, values, next_values, terminated, truncated)
        contenders: Contenders = {
            op: lambda: gae(*inputs, 0.99, 0.95),
            "eager loop": lambda: gae(*inputs, 0.99, 0.95, impl="reference"),
            **torchrl_contenders(*inputs),
        }
    else:
        episodes = (rewards, terminated, truncated, 0.99, next_values)
        contenders = {
            op: lambda: discounted_returns(*episodes),
            "eager loop": lambda: discounted_returns(*episodes, impl="reference"),
        }
    return [Case(f"{op} B{B} T{T}", contenders)]


def _policy_steps(op: str, B: int, T: int, N: int) -> list[Case]:
    if N != _STATE:
        return []
    model, gru = ImprovedSSM(17, 6), GRUPolicy(17, 6, _STATE)
    x, state, cells = torch.randn(B, 17), model.init_hidden(B), torch.zeros(2, B, _STATE)

    def modules() -> tuple[Tensor, ...]:
        features, states = model._features(x, state, None)
        return model.actor(features), model.critic(features).squeeze(-1), torch.stack(states)

    contenders: Contenders = {
        op: lambda: model.get_action(x, state, True),
        "the same modules": modules,
        "GRUCell policy": lambda: gru(x, cells),
    }
    return [Case(f"{op} B{B}", contenders, calls=20)]


def _layers(op: str, B: int, T: int, N: int) -> list[Case]:
    x, weights = torch.randn(2, B, T, N)
    layer = SSM(N, N, batch_first=True)
    leaves = (x.clone().requires_grad_(), *layer.parameters())
    forward: Contenders = {"SSM": lambda: layer(x), **torch_contenders(x)}
    backward: Contenders = {
        "SSM": lambda: torch.autograd.grad(layer(leaves[0])[0], leaves, weights),
        **torch_contenders(leaves[0], weights),
    }
    return _both(f"SSM layer B{B} T{T} N{N}", forward, backward)


def _both(name: str, forward: Contenders, backward: Contenders) -> list[Case]:
    return [
        Case(f"{name}, forward", forward),
        Case(f"{name}, with gradients", backward, gradients=True),
    ]
