from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from layer_references import weights
from scipy import signal
from torch import Tensor, nn

from ssm_fast.nn import SSMLayer


def make(
    I: int = 3,
    H: int = 5,
    N: int = 4,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **kwargs: Any,
) -> SSMLayer:
    """A layer whose every parameter, also those that start at 0 or 1, is random."""
    torch.manual_seed(seed)
    layer = SSMLayer(I, H, N, dtype=dtype, **kwargs)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return layer


def inputs(B: int, T: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(B, T, 3, dtype=torch.float64)
    return x, torch.randn(B, 4, dtype=torch.float64)


def test_linear_layer_equals_scipy_dlsim() -> None:
    # SciPy reads the state before the input enters it: x_k = s_{k-1}, so C s_k = C A x_k + C B u_k.
    layer = make(norm=None)
    w = weights(layer)
    B = np.hstack([w["B"], w["bias"][:, None]])
    D = w["C"] @ B + np.hstack([w["D"], np.zeros((5, 1))])
    system = signal.StateSpace(w["A"], B, w["C"] @ w["A"], D, dt=1.0)
    x, s0 = inputs(2, 40)
    y, _ = layer(x, s0)
    for b in range(2):
        u = np.hstack([x[b].numpy(), np.ones((40, 1))])
        _, y_ref, _ = signal.dlsim(system, u, x0=s0[b].numpy())
        np.testing.assert_allclose(y[b].detach(), y_ref, atol=1e-12)


@torch.no_grad()
def test_initialisation() -> None:
    torch.manual_seed(0)
    layer = SSMLayer(40, 50, 60)
    torch.testing.assert_close(layer.A @ layer.A.T, 0.81 * torch.eye(60), rtol=0, atol=1e-5)
    assert layer.bias is not None
    assert bool((layer.bias == 0).all())
    y, s = layer(torch.randn(256, 60, 40))
    assert abs(float(y[:, 30:].square().mean()) - 1.0) < 0.1
    assert abs(float(s.square().mean()) * 0.19 - 1.0) < 0.05


def test_initialisation_is_seeded_and_takes_any_dtype() -> None:
    first, second = make(dtype=torch.float32, seed=3), make(dtype=torch.float32, seed=3)
    torch.testing.assert_close(first.A, second.A, rtol=0, atol=0)
    half = SSMLayer(3, 5, 4, norm="output", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_parameter_names() -> None:
    names = {name: tuple(value.shape) for name, value in make(norm="state").named_parameters()}
    assert names == {
        "A": (4, 4),
        "B": (4, 3),
        "C": (5, 4),
        "D": (5, 3),
        "bias": (4,),
        "norm.weight": (4,),
        "norm.bias": (4,),
    }
    assert isinstance(make(norm="output").norm, nn.LayerNorm)
    assert make(bias=False).bias is None


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"input_size": 0}, ValueError, "input_size must be at least 1, got 0"),
        ({"hidden_size": -2}, ValueError, "hidden_size must be at least 1, got -2"),
        ({"state_size": 2.5}, TypeError, "state_size must be an int, got float"),
        ({"state_size": True}, TypeError, "state_size must be an int, got bool"),
        ({"norm": "input"}, ValueError, "norm must be None, 'output' or 'state', got 'input'"),
    ],
)
def test_bad_construction(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SSMLayer(**{"input_size": 3, "hidden_size": 5, "state_size": 4} | kwargs)


def test_bad_input() -> None:
    layer = make()
    x, s0 = inputs(3, 6)
    with pytest.raises(ValueError, match=r"x must have shape \[B, T, I\] = \[B, T, 3\], got"):
        layer(x[..., :2], s0)
    with pytest.raises(ValueError, match=r"got \[3, 3\]"):
        layer(x[:, 0], s0)
    with pytest.raises(TypeError, match=r"dtype torch.float64, got torch.float32"):
        layer(x.float(), s0)
    with pytest.raises(ValueError, match="s0"):
        layer(x, s0[:2])
    with pytest.raises(TypeError, match="s0"):
        layer(x, s0.float())
    with pytest.raises(ValueError, match="reset"):
        layer(x, s0, torch.zeros(3, 5))


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(5, bias=False, dtype=torch.float64),
        nn.LayerNorm(5, elementwise_affine=False, dtype=torch.float64),
    ],
    ids=["no_bias", "no_affine"],
)
def test_runs_the_norm_that_a_user_puts_in(norm: nn.Module) -> None:
    layer, plain = make(norm="output"), make(norm=None)
    plain.load_state_dict(layer.state_dict(), strict=False)
    layer.norm = norm
    x, s0 = inputs(3, 6)
    torch.testing.assert_close(layer(x, s0)[0], norm(plain(x, s0)[0]))
    torch.testing.assert_close(layer.step(x[:, 0], s0)[0], norm(plain.step(x[:, 0], s0)[0]))


def test_readout_refuses_what_the_kernel_cannot_read() -> None:
    layer = make(dtype=torch.float32, norm="output")
    s, x = torch.zeros(2, 3, 4), torch.zeros(2, 3, 3)
    with pytest.raises(ValueError, match=r"residual must fit z of \[2, 3, 5\], got \[1, 5\]"):
        layer.readout(s, x, residual=torch.zeros(1, 5))
    with pytest.raises(TypeError, match="residual must have the dtype of z"):
        layer.readout(s, x, residual=torch.zeros(2, 3, 5).double())
    with pytest.raises(TypeError, match=r"no kernel for torch\.bfloat16"):
        layer.to(torch.bfloat16).readout(s.bfloat16(), x.bfloat16())
