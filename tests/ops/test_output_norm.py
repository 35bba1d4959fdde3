from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, jvp

from ssm_fast.ops.output_norm import output_norm


def problem(shape, norm=True, residual=True, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, dtype=dtype, generator=generator)

    H = shape[-1]
    z = 2.0 * draw(*shape) + 0.5
    weight, bias = (draw(H), draw(H)) if norm else (None, None)
    return z, weight, bias, draw(*shape) if residual else None


def torch_calls(z, weight, bias, residual, tanh):
    """The same in torch's own functions."""
    y = z if weight is None else F.layer_norm(z, z.shape[-1:], weight, bias)
    y = torch.tanh(y) if tanh else y
    return y if residual is None else residual + y


def leaves_of(*tensors):
    return [None if x is None else x.detach().clone().requires_grad_() for x in tensors]


def test_saved_tensors_of_another_layout():
    tensors = problem((3, 5, 8), True, True, torch.float64)
    mine, theirs = leaves_of(*tensors), leaves_of(*tensors)
    output_norm(*theirs).sum().backward()

    def pack(x):
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[..., 0]):
        y = output_norm(*mine).sum()
    y.backward()
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_hessian_vector_product_through_functional_call():
    layer = torch.nn.LayerNorm(6, dtype=torch.float64)
    z = torch.randn(3, 6, dtype=torch.float64)

    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = layer

        def forward(self, z):
            return output_norm(z, self.norm.weight, self.norm.bias, tanh=True)

    weights = {f"norm.{name}": x.detach() for name, x in layer.named_parameters()}
    mine = Mine()

    def loss(weights):
        return functional_call(mine, weights, z).pow(3).sum()

    def torch_loss(weights):
        y = F.layer_norm(z, (6,), weights["norm.weight"], weights["norm.bias"])
        return y.tanh().pow(3).sum()

    direction = {name: torch.randn_like(x) for name, x in weights.items()}
    actual = jvp(grad(loss), (weights,), (direction,))[1]
    expected = jvp(grad(torch_loss), (weights,), (direction,))[1]
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name])


def test_nan_stays_in_its_row():
    z, weight, bias, residual = problem((5, 19))
    z[2, 3] = torch.nan
    rows = torch.isfinite(output_norm(z, weight, bias, residual, tanh=True)).all(-1)
    assert rows.tolist() == [True, True, False, True, True]


def test_reference_equals_torch():
    tensors = problem((2, 3, 7))
    one = output_norm(*tensors, tanh=True, impl="reference")
    torch.testing.assert_close(one, torch_calls(*tensors, True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z": 1.0}, TypeError, "z must be a torch.Tensor, got float"),
        ({"weight": None}, ValueError, "weight and bias must be given together"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \[H\] = \[3\], got \[4\]"),
        ({"residual": torch.ones(3)}, ValueError, "residual must have shape that of z"),
        ({"bias": torch.ones(3).double()}, TypeError, "bias must have the dtype of z"),
        ({"z": torch.ones(2, 3).int()}, TypeError, "z of output_norm must be float32 or float64"),
        ({"z": torch.tensor(1.0)}, ValueError, r"z must have shape \[..., H\]"),
        ({"impl": "fast"}, ValueError, "unknown impl 'fast'"),
    ],
)
def test_errors(change, error, message):
    arguments = {"z": torch.ones(2, 3), "weight": torch.ones(3), "bias": torch.ones(3)}
    with pytest.raises(error, match=message):
        output_norm(**(arguments | change))


def test_rows_that_are_one_row_in_memory():
    z, weight, bias, residual = problem((6, 5, 17))
    z = z[:1].expand(6, 5, 17)
    expected = torch_calls(z, weight, bias, residual, True)
    torch.testing.assert_close(output_norm(z, weight, bias, residual, tanh=True), expected)
    z = z.detach().requires_grad_()
    actual = torch.autograd.grad(output_norm(z, weight, bias, tanh=True).sum(), z)[0]
    expected = torch.autograd.grad(torch_calls(z, weight, bias, None, True).sum(), z)[0]
    torch.testing.assert_close(actual, expected)
