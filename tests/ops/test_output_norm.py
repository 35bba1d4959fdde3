from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from references import relative_rms
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap

from ssm_fast.ops.output_norm import output_norm

OPTIONS = [(norm, tanh, residual) for norm in (0, 1) for tanh in (0, 1) for residual in (0, 1)]
every_option = pytest.mark.parametrize(("norm", "tanh", "residual"), OPTIONS)


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


@every_option
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 7, 16), (65, 63), (9, 33, 128), (200, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradients_equal_torch(shape, dtype, norm, tanh, residual):
    if shape[-1] == 1 and norm:
        shape = (*shape[:-1], 2)
    tensors = problem(shape, norm, residual, dtype)
    mine, theirs = (
        leaves_of(*tensors),
        leaves_of(*(None if x is None else x.double() for x in tensors)),
    )
    y, expected = output_norm(*mine, tanh=bool(tanh)), torch_calls(*theirs, tanh)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    cotangent = torch.randn(shape, dtype=torch.float64)
    y.backward(cotangent.to(dtype))
    expected.backward(cotangent)
    for one, other in zip(mine, theirs, strict=True):
        if one is not None:
            torch.testing.assert_close(
                one.grad.double(), other.grad, rtol=tolerance, atol=10 * tolerance
            )


@every_option
def test_gradcheck_and_gradgradcheck(norm, tanh, residual):
    leaves = leaves_of(*problem((3, 2, 5), norm, residual))
    given = [x for x in leaves if x is not None]

    def call(*tensors):
        rest = iter(tensors)
        return output_norm(*(None if x is None else next(rest) for x in leaves), tanh=bool(tanh))

    assert gradcheck(call, given)
    assert gradgradcheck(call, given)
    assert gradcheck(call, given, check_forward_ad=True, check_backward_ad=False)


def test_float32_error():
    tensors = problem((64, 256, 128))
    single = [x.float() for x in tensors]
    assert relative_rms(output_norm(*single, tanh=True), torch_calls(*tensors, True)) <= 1e-6


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_any_layout(layout):
    z, weight, bias, residual = problem((6, 5, 17))
    if layout == "transposed":
        z, residual = z.transpose(0, 1), residual.transpose(0, 1)
    elif layout == "strided":
        z, residual = z[::2], residual[:, :, ::3].repeat(1, 1, 3)[::2, :, :17]
        weight = weight.repeat_interleave(2)[::2]
    else:
        z = z[:1].expand(6, 5, 17)
    expected = torch_calls(z, weight, bias, residual, True)
    torch.testing.assert_close(output_norm(z, weight, bias, residual, tanh=True), expected)
    z = z.detach().requires_grad_()
    actual = torch.autograd.grad(output_norm(z, weight, bias, tanh=True).sum(), z)[0]
    expected = torch.autograd.grad(torch_calls(z, weight, bias, None, True).sum(), z)[0]
    torch.testing.assert_close(actual, expected)


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


@every_option
def test_vmap_over_weights_is_groups(norm, tanh, residual):
    many = [problem((4, 9), norm, residual, seed=seed) for seed in range(3)]
    stacked = [None if x[0] is None else torch.stack(x) for x in zip(*many, strict=True)]
    given = [x for x in stacked if x is not None]

    def call(*tensors):
        rest = iter(tensors)
        return output_norm(*(None if x is None else next(rest) for x in stacked), tanh=bool(tanh))

    def gradients(*tensors):
        return grad(lambda *t: call(*t).square().sum(), argnums=tuple(range(len(tensors))))(
            *tensors
        )

    expected = torch.stack([torch_calls(*one, tanh) for one in many])
    torch.testing.assert_close(vmap(call)(*given), expected)
    for one, *each in zip(
        vmap(gradients)(*given),
        *(gradients(*[x for x in one if x is not None]) for one in many),
        strict=True,
    ):
        torch.testing.assert_close(one, torch.stack(each))
    shared = [(None if i in (1, 2) else 0) for i, x in enumerate(stacked) if x is not None]
    if norm:
        mixed = [x[0] if d is None else x for x, d in zip(given, shared, strict=True)]
        rows = vmap(call, in_dims=tuple(shared))(*mixed)
        torch.testing.assert_close(
            rows, torch.stack([torch_calls(z, *many[0][1:3], r, tanh) for z, _, _, r in many])
        )


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


def test_bitwise_for_any_number_of_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            leaves = leaves_of(*problem((4000, 96), dtype=torch.float32))
            y = output_norm(*leaves, tanh=True)
            y.square().sum().backward()
            results.append([y.detach(), *(x.grad for x in leaves)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_opcheck_and_compile():
    z, weight, bias, residual = (x.float()[None] for x in problem((4, 8)))
    weight, bias = weight[0][None], bias[0][None]
    leaves = leaves_of(z, weight, bias, residual)
    ops = torch.ops.ssm_fast
    torch.library.opcheck(ops.output_norm.default, (*leaves, 1e-5, True, True))
    torch.library.opcheck(ops.output_norm.default, (z, None, None, None, 1e-5, True, False))
    y, mean, rstd = ops.output_norm(z, weight, bias, residual, 1e-5, True, True)
    torch.library.opcheck(ops.output_norm_grad.default, (y, z, weight, bias, mean, rstd, True))

    tensors = leaves_of(*(x.float() for x in problem((4, 8))))
    compiled = torch.compile(
        lambda *t: output_norm(*t, tanh=True).square().sum(), fullgraph=True, backend="aot_eager"
    )
    eager = torch.autograd.grad(output_norm(*tensors, tanh=True).square().sum(), tensors)
    for one, other in zip(torch.autograd.grad(compiled(*tensors), tensors), eager, strict=True):
        torch.testing.assert_close(one, other)


def test_nan_stays_in_its_row():
    z, weight, bias, residual = problem((5, 19))
    z[2, 3] = torch.nan
    rows = torch.isfinite(output_norm(z, weight, bias, residual, tanh=True)).all(-1)
    assert rows.tolist() == [True, True, False, True, True]


def test_empty():
    weight, bias = torch.ones(3), torch.zeros(3)
    assert output_norm(torch.empty(0, 3), weight, bias).shape == (0, 3)
    assert output_norm(torch.empty(2, 0)).shape == (2, 0)


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
