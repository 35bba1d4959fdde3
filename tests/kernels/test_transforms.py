"""torch's own machinery around the ops, through every backend."""

from __future__ import annotations

import pytest
import torch

from ssm_fast import SSM
from ssm_fast.ops import dense_scan, linear_scan, norm_scan
from ssm_fast.ops.output_norm import output_norm


def problem(op, device):
    """An op and arguments that need gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device)

    u, A, s0 = draw(2, 3, 4), 0.3 * draw(4, 4), draw(2, 4)
    reset = torch.tensor([[0, 1, 0], [0, 0, 1]], device=device, dtype=torch.bool)
    f, *leaves = {
        "dense_scan": (lambda *x: dense_scan(*x, reset), u, A, s0),
        "norm_scan": (lambda *x: norm_scan(*x, reset), u, A, draw(4), draw(4), s0),
        "linear_scan": (linear_scan, u.sigmoid(), u, s0),
        "output_norm": (lambda *x: output_norm(*x, tanh=True), u, draw(4), draw(4), draw(2, 3, 4)),
    }[op]
    return f, [x.requires_grad_() for x in leaves]


OPS = ["dense_scan", "norm_scan", "linear_scan", "output_norm"]


@pytest.mark.parametrize("op", OPS)
def test_compile_sees_one_graph(backend, op):
    f, leaves = problem(op, backend)
    loss = lambda *x: f(x[0] * 2, *x[1:]).square().sum()
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for x, y in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("op", OPS)
def test_autocast_runs_the_op_in_float32(backend, request, op):
    f, leaves = problem(op, backend)
    half = leaves[0].detach().bfloat16().requires_grad_()  # as a projection under autocast gives it
    with torch.autocast(backend.type, dtype=torch.bfloat16):
        y = f(half, *leaves[1:])
    assert y.dtype == torch.float32
    bound = 2e-2 if "reference" in request.node.name else 0  # its products are torch's own
    torch.testing.assert_close(y, f(half.float(), *leaves[1:]), rtol=bound, atol=bound)
    for x, leaf in zip(torch.autograd.grad(y.sum(), [half, *leaves[1:]]), leaves, strict=True):
        assert x.dtype == (torch.bfloat16 if leaf is leaves[0] else torch.float32)


@pytest.mark.parametrize("norm", [None, "output", "state"])
def test_a_layer_trains_and_steps_under_autocast(backend, norm):
    layer = SSM(5, 8, num_layers=2, batch_first=True, norm=norm).to(backend)
    x = torch.randn(2, 4, 5, device=backend)
    expected, _ = layer(x)
    with torch.autocast(backend.type, dtype=torch.bfloat16):
        y, _ = layer(x)
        state, steps = None, []
        for t in range(4):
            step, state = layer.step(x[:, t], state)
            steps.append(step)
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)
    torch.testing.assert_close(torch.stack(steps, 1).float(), expected, rtol=0.1, atol=0.1)
    y.float().square().sum().backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters()
    )
