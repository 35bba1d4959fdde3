"""A linear layer with tanh for groups of rows, its gradients and their tangent, beside torch's calls and products."""

from __future__ import annotations

import pytest
import torch
from contest import contest

from ssm_fast.ops.linear import (
    composed_gradients,
    composed_tangent,
    reference,
    run_linear,
    run_linear_grad,
    run_linear_tangent,
)

SIZES = [
    (4, 2000, 64, 128),
    (4, 2000, 17, 64),
    (4, 2000, 128, 6),
    (1, 2048, 64, 64),
    (1, 64, 64, 64),
]
SWEEPS = {  # what runs, what it is compared with, and its products
    "linear": (run_linear, reference, 1),
    "linear_grad": (run_linear_grad, composed_gradients, 2),
    "linear_tangent": (run_linear_tangent, composed_tangent, 2),
}


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize(("G", "M", "I", "O"), SIZES)
def test_linear(benchmark, sweep, G, M, I, O):
    ours, theirs, count = SWEEPS[sweep]
    x, weight, bias, grad = (torch.randn(G, *s) for s in ((M, I), (O, I), (O,), (M, O)))
    y = run_linear(x, weight, bias, None, True)
    arguments = {
        "linear": (x, weight, bias, None, True),
        "linear_grad": (grad, y, x, weight, True, True, True),
        "linear_tangent": (x, weight, x, weight, bias, y, grad),
    }[sweep]
    product = torch.empty_like(grad)

    def products() -> None:
        for _ in range(count):
            torch.bmm(x, weight.mT, out=product)

    contest(
        benchmark,
        sweep,
        {
            sweep: lambda: ours(*arguments),
            "torch calls": lambda: theirs(*arguments),
            f"{count} bmm": products,
        },
        floor=f"{count} bmm",
    )
