"""Every op, layer and model under torch.export of any size, checkpointing and hooks on saved tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.export import Dim, export
from torch.utils.checkpoint import checkpoint

from ssm_fast import SSM
from ssm_fast.core import ImprovedSSM, StateSpaceModel
from ssm_fast.ops import dense_scan, discounted_returns, gae, linear_scan, norm_scan
from ssm_fast.ops.linear import linear
from ssm_fast.ops.output_norm import output_norm

pytestmark = pytest.mark.isa_independent

N = 6
A = 0.9 * torch.linalg.qr(torch.randn(N, N, generator=torch.Generator().manual_seed(0)))[0]
WEIGHT, BIAS = torch.linspace(0.5, 1.5, N), torch.linspace(-1.0, 1.0, N)

DIFFERENTIABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "dense_scan": lambda u: dense_scan(u, A),
    "norm_scan": lambda u: norm_scan(u, A, WEIGHT, BIAS),
    "linear_scan": lambda u: linear_scan(WEIGHT / 2, u),
    "output_norm": lambda u: output_norm(u, WEIGHT, BIAS, tanh=True),
    "linear": lambda u: linear(u, A, BIAS, tanh=True),
}


class Op(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def sequence(B: int, T: int) -> Tensor:
    return torch.randn(B, T, N)


def policy_inputs(B: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    return sequence(B, T), torch.randn(2, B, 4), torch.rand(B, T) < 0.2


def advantage_inputs(B: int, T: int) -> tuple[Tensor, ...]:
    rewards, values, next_values = torch.randn(3, B, T)
    terminated, truncated = torch.rand(2, B, T) < 0.2
    return rewards, values, next_values, terminated, truncated


def stacked(**options: Any) -> SSM:
    return SSM(N, 8, 2, batch_first=True, residual=True, **options)


EXPORTED: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], tuple[Tensor, ...]]]] = {
    "SSM": (lambda: SSM(N, 8, batch_first=True), lambda B, T: (sequence(B, T),)),
    "SSM-output": (lambda: stacked(norm="output"), lambda B, T: (sequence(B, T),)),
    "SSM-state": (lambda: stacked(norm="state"), lambda B, T: (sequence(B, T),)),
    "ImprovedSSM": (
        lambda: ImprovedSSM(N, 2, 4, 8, critic_dim=5, normalize_observations=True),
        policy_inputs,
    ),
    "ImprovedSSM-discrete": (
        lambda: ImprovedSSM(N, 2, 4, 8, norm="state", discrete=True),
        policy_inputs,
    ),
    "StateSpaceModel": (
        lambda: StateSpaceModel(4, N, 2, 8),
        lambda B, T: (sequence(B, T), torch.randn(B, 4)),
    ),
    "gae": (lambda: Op(lambda *x: gae(*x, gamma=0.9, gae_lambda=0.8)), advantage_inputs),
    "discounted_returns": (
        lambda: Op(lambda r, v, n, end, cut: discounted_returns(r, end, cut, 0.9, n)),
        advantage_inputs,
    ),
} | {
    name: (lambda op=op: Op(op), lambda B, T: (sequence(B, T),))  # type: ignore[misc]
    for name, op in DIFFERENTIABLE.items()
}


@pytest.mark.parametrize("name", EXPORTED)
def test_export_takes_any_batch_and_time(name: str) -> None:
    """One program for few rows and for many, which eager mode runs through other kernels."""
    make, inputs = EXPORTED[name]
    module, B, T = make(), Dim("B"), Dim("T")
    sizes = {3: B, 11: T}
    examples = inputs(3, 11)
    dynamic = tuple({i: sizes[n] for i, n in enumerate(x.shape) if n in sizes} for x in examples)
    program = export(
        module, examples, dynamic_shapes=(dynamic,) if isinstance(module, Op) else dynamic
    ).module()
    for B, T in ((2, 300), (1, 1), (5, 2)):
        x = inputs(B, T)
        torch.testing.assert_close(program(*x), module(*x), rtol=1e-4, atol=1e-5)


def test_compile_specializes_no_more_than_a_linear_layer() -> None:
    counts = []
    for module in (nn.Linear(N, 8), stacked(norm="output")):
        torch._dynamo.reset()
        counter = CompileCounter()
        fast = torch.compile(module, backend=counter, fullgraph=True)
        for B, T in ((3, 11), (2, 300), (5, 2), (4, 3000), (1, 7), (64, 64)):
            fast(sequence(B, T))
        counts.append(counter.frame_count)
    assert counts[1] <= counts[0]


TRAINED: dict[str, Callable[[Tensor], Tensor]] = DIFFERENTIABLE | {
    "SSM-output": lambda u: stacked(norm="output")(u)[0],
    "SSM-state": lambda u: stacked(norm="state")(u)[0],
    "ImprovedSSM": lambda u: ImprovedSSM(N, 2, 4, 8)(u)[0],
    "StateSpaceModel": lambda u: StateSpaceModel(4, N, 2, 8)(u)[0],
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", TRAINED)
def test_a_gradient_unpacks_each_saved_tensor_once(name: str, create_graph: bool) -> None:
    packed: list[int] = []
    unpacked: list[int] = []

    def pack(x: Tensor) -> tuple[int, Tensor]:
        packed.append(len(packed))
        return packed[-1], x

    def unpack(pair: tuple[int, Tensor]) -> Tensor:
        unpacked.append(pair[0])
        return pair[1]

    u = sequence(3, 5).requires_grad_()
    with saved_tensors_hooks(pack, unpack):
        loss = TRAINED[name](u).square().sum()
        saved = len(packed)
        torch.autograd.grad(loss, u, create_graph=create_graph)
    first = [i for i in unpacked if i < saved]
    assert sorted(first) == sorted(set(first))
    assert first


@pytest.mark.parametrize("name", TRAINED)
def test_checkpoint_and_save_on_cpu_give_the_same_gradient(name: str) -> None:
    u = sequence(3, 5).requires_grad_()

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return TRAINED[name](x)

    (expected,) = torch.autograd.grad(run(u).square().sum(), u)
    y = checkpoint(run, u, use_reentrant=False)
    assert isinstance(y, Tensor)
    assert torch.equal(torch.autograd.grad(y.square().sum(), u)[0], expected)
    with save_on_cpu():
        y = run(u)
    assert torch.equal(torch.autograd.grad(y.square().sum(), u)[0], expected)
