from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from ssm_fast.ops.output_norm import output_norm

pytest.importorskip("triton")
from ssm_fast.kernels import output_norm as kernels


def problem(shape, *, device="cpu", dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(x, dtype=torch.float64, generator=generator)
        for x in (shape, shape[-1:], shape[-1:], shape)
    ]
    return [x.to(device, dtype) for x in tensors]


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 16), (10, 33), (2, 1000)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_outputs_and_gradients_equal_reference(
    device, canaries, monkeypatch, shape, norm, tanh, residual
):
    monkeypatch.setattr(kernels, "TILE", 64)
    monkeypatch.setattr(kernels, "PARTS", 3)
    z, weight, bias, added = problem(shape, device=device)
    weights = (weight, bias) if norm else (None, None)
    results = []
    for impl in ("auto", "reference"):
        arguments = [z, *weights, added if residual else None]
        leaves = [None if x is None else x.detach().requires_grad_() for x in arguments]
        y = output_norm(*leaves, tanh=tanh, impl=impl)
        given = [x for x in leaves if x is not None]
        results.append([y, *torch.autograd.grad((y * added).sum(), given)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
def test_error_of_each_dtype(device, canaries, dtype, bound):
    arguments = problem((9, 30), device=device, dtype=dtype)
    y = output_norm(*arguments, tanh=True)
    assert y.dtype == dtype
    expected = output_norm(*(x.double() for x in arguments), tanh=True, impl="reference")
    torch.testing.assert_close(y.double(), expected, rtol=bound, atol=bound)


def test_gradients_in_half_precision_far_from_zero(device, canaries):
    z, weight, bias, _ = problem((64, 48), device=device)
    leaves = [x.half().requires_grad_() for x in (z + 200.0, weight, bias)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    output_norm(*leaves).sum().backward()
    output_norm(*exact, impl="reference").sum().backward()
    difference = leaves[1].grad.double() - exact[1].grad  # of sums of 64
    assert float(difference.norm() / exact[1].grad.norm()) < 2e-3


def test_tanh_near_zero_and_far_away(device):
    x = torch.cat([torch.logspace(-12, 3, 301, dtype=torch.float64), torch.zeros(1)]).to(device)
    x = torch.cat([x, -x]).unsqueeze(0)
    torch.testing.assert_close(output_norm(x, tanh=True), x.tanh(), rtol=1e-14, atol=0)


def test_gradcheck_and_gradgradcheck(backend):
    leaves = [x.requires_grad_() for x in problem((3, 4), device=backend)]
    assert gradcheck(lambda *x: output_norm(*x, tanh=True), leaves, fast_mode=True)
    assert gradgradcheck(lambda *x: output_norm(*x, tanh=True), leaves, fast_mode=True)


def test_groups_have_weights_of_their_own(backend, canaries):
    problems = [problem((3, 4), device=backend, seed=g) for g in range(2)]
    z, weight, bias, residual = (torch.stack(x) for x in zip(*problems, strict=True))
    y = torch.vmap(lambda *x: output_norm(*x, tanh=True))(z, weight, bias, residual)
    torch.testing.assert_close(y, torch.stack([output_norm(*p, tanh=True) for p in problems]))


def test_features_that_do_not_fit_are_named(device):
    with pytest.raises(ValueError, match="output_norm on a GPU takes at most H = 8192"):
        output_norm(*problem((1, 8193), device=device))
