from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from layer_references import layer_loop, weights
from references import relative_rms
from scipy import signal
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from ssm_fast.nn import SSMLayer

NORMS = [None, "output", "state"]
RESETS: dict[str, list[int] | slice] = {
    "none": [],
    "first": [0],
    "last": [-1],
    "consecutive": [1, 2],
    "all": slice(None),
}


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


def inputs(
    B: int,
    T: int,
    I: int = 3,
    N: int = 4,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, I, dtype=torch.float64, generator=generator)
    s0 = torch.randn(B, N, dtype=torch.float64, generator=generator)
    return x.to(dtype), s0.to(dtype)


def mask(B: int, T: int, where: list[int] | slice) -> Tensor:
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[::2, where] = True
    return reset


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("where", RESETS.values(), ids=list(RESETS))
def test_forward_equals_a_float64_loop(norm: Any, bias: bool, where: list[int] | slice) -> None:
    layer = make(norm=norm, bias=bias)
    (x, s0), reset = inputs(3, 6), mask(3, 6, where)
    y, s = layer(x, s0, reset)
    y_ref, s_ref = layer_loop(weights(layer), x.numpy(), s0.numpy(), reset.numpy(), norm)
    np.testing.assert_allclose(y.detach(), y_ref, atol=1e-12)
    np.testing.assert_allclose(s.detach(), s_ref[:, -1], atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_float32_at_odd_sizes_equals_a_float64_loop(norm: Any) -> None:
    layer = make(17, 31, 63, dtype=torch.float32, norm=norm)
    x, s0 = inputs(3, 65, 17, 63, dtype=torch.float32)
    y, _ = layer(x, s0)
    y_ref, _ = layer_loop(weights(layer), x.double().numpy(), s0.double().numpy(), None, norm)
    assert relative_rms(y, torch.from_numpy(y_ref)) < 1e-5


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


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_step_equals_forward(norm: Any, bias: bool) -> None:
    layer = make(norm=norm, bias=bias)
    x, s0 = inputs(3, 6)
    y, s_last = layer(x, s0)
    s: Tensor | None = s0
    for t in range(6):
        y_t, s = layer.step(x[:, t], s)
        torch.testing.assert_close(y_t, y[:, t], rtol=0, atol=1e-13)
    torch.testing.assert_close(s, s_last, rtol=0, atol=1e-13)
    torch.testing.assert_close(layer.step(x[:, 0])[0], layer(x[:, :1])[0][:, 0])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("cut", [0, 1, 5, 6])
def test_split_in_two_equals_whole(norm: Any, cut: int) -> None:
    layer = make(norm=norm)
    (x, s0), reset = inputs(3, 6), mask(3, 6, [2, 5])
    y, s_last = layer(x, s0, reset)
    y1, s1 = layer(x[:, :cut], s0, reset[:, :cut])
    y2, s2 = layer(x[:, cut:], s1, reset[:, cut:])
    torch.testing.assert_close(torch.cat([y1, y2], 1), y, rtol=0, atol=1e-13)
    torch.testing.assert_close(s2, s_last, rtol=0, atol=1e-13)


def test_an_empty_sequence_hands_the_state_on() -> None:
    layer = make()
    x, s0 = inputs(3, 0)
    y, s = layer(x, s0)
    assert y.shape == (3, 0, 5)
    torch.testing.assert_close(s, s0)
    torch.testing.assert_close(layer(x)[1], torch.zeros(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_of_every_tensor(norm: Any) -> None:
    layer = make(2, 2, 3, norm=norm)
    x, s0 = inputs(2, 4, 2, 3)
    reset = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]])
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, s0: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = functional_call(
            layer, dict(zip(names, values, strict=True)), (x, s0, reset)
        )
        return result

    leaves = [value.detach().clone() for value in (x, s0, *layer.parameters())]
    arguments = tuple(leaf.requires_grad_() for leaf in leaves)
    assert gradcheck(run, arguments)
    assert gradgradcheck(run, arguments, fast_mode=True)


def test_a_reset_cuts_the_gradient() -> None:
    layer = make()
    x, s0 = inputs(1, 4)
    x.requires_grad_()
    s0.requires_grad_()
    y, _ = layer(x, s0, torch.tensor([[0, 0, 1, 0]]))
    grad_x, grad_s0 = torch.autograd.grad(y[:, 3].sum(), (x, s0))
    assert bool((grad_x[:, :2] == 0).all())
    assert bool((grad_s0 == 0).all())
    assert bool((grad_x[:, 2:] != 0).any())


@pytest.mark.parametrize("norm", NORMS)
def test_strided_inputs_and_untouched_arguments(norm: Any) -> None:
    layer = make(norm=norm)
    x, s0 = inputs(3, 6)
    y, s = layer(x, s0)
    wide = torch.randn(6, 3, 8, dtype=torch.float64)
    wide[..., 2:5] = x.transpose(0, 1)
    strided = wide.transpose(0, 1)[..., 2:5]
    state = torch.randn(3, 8, dtype=torch.float64)
    state[:, ::2] = s0
    before = wide.clone(), state.clone()
    y2, s2 = layer(strided, state[:, ::2])
    torch.testing.assert_close(y2, y)
    torch.testing.assert_close(s2, s)
    layer.step(strided[:, 0], state[:, ::2])
    torch.testing.assert_close((wide, state), before, rtol=0, atol=0)


def test_time_major_states() -> None:
    layer = make()
    (x, s0), reset = inputs(3, 6), mask(3, 6, [2])
    s = layer.states(x, s0, reset)
    s_time_major = layer.states(x.transpose(0, 1), s0, reset.t(), batch_first=False)
    torch.testing.assert_close(s_time_major.transpose(0, 1), s)


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
