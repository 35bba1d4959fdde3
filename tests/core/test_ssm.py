from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from layer_references import weights
from numpy.typing import NDArray
from references import relative_rms
from scipy import signal
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call, grad, hessian, jacfwd, vmap

from ssm_fast.core.ssm import StateSpaceModel
from ssm_fast.nn import fused

N, IN, OUT, HIDDEN = 5, 3, 2, 7


def make(seed: int = 0, dtype: torch.dtype = torch.float64) -> StateSpaceModel:
    torch.manual_seed(seed)
    model = StateSpaceModel(N, IN, OUT, HIDDEN).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs(B: int = 4, T: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, IN, dtype=torch.float64, generator=generator)
    h = torch.randn(B, N, dtype=torch.float64, generator=generator)
    return x, h, torch.rand(B, T, generator=generator) < 0.3


def output(w: dict[str, NDArray[np.float64]], s: Any, x: Any) -> NDArray[np.float64]:
    hidden = np.tanh(s @ w["C.0.weight"].T + w["C.0.bias"])
    return np.asarray(hidden @ w["C.2.weight"].T + w["C.2.bias"] + x @ w["D"].T)


def loop(
    model: StateSpaceModel, x: Any, h: Any, reset: Any
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    w = weights(model)
    x, s, reset = x.numpy(), h.numpy(), reset.numpy()
    outputs = []
    for t in range(x.shape[1]):
        s = np.where(reset[:, t, None], 0.0, s)
        s = s @ w["A"].T + x[:, t] @ w["B"].T
        outputs.append(output(w, s, x[:, t]))
    return np.stack(outputs, 1), s


def test_forward_equals_a_float64_loop_over_its_own_parameters() -> None:
    model = make()
    x, h, reset = inputs()
    y, h_next = model(x, h, reset)
    y_ref, h_ref = loop(model, x, h, reset)
    np.testing.assert_allclose(y.detach(), y_ref, atol=1e-12)
    np.testing.assert_allclose(h_next.detach(), h_ref, atol=1e-12)
    single = make(dtype=torch.float32)
    y, _ = single(x.float(), h.float(), reset)
    assert relative_rms(y, torch.from_numpy(loop(single, x, h, reset)[0])) < 1e-5


def test_recurrence_equals_scipy_dlsim() -> None:
    # SciPy's x_k is our s_{k-1}; reading A x_k + B u_k gives s_k.
    model = make()
    w = weights(model)
    x, h, _ = inputs(B=1, T=50)
    system = signal.StateSpace(w["A"], w["B"], w["A"], w["B"], dt=1.0)
    _, s, _ = signal.dlsim(system, x[0].numpy(), x0=h[0].numpy())
    y, h_next = model(x, h)
    np.testing.assert_allclose(h_next[0].detach(), s[-1], atol=1e-12)
    np.testing.assert_allclose(y[0].detach(), output(w, s, x[0].numpy()), atol=1e-12)


def test_steps_equal_the_sequence() -> None:
    model = make()
    x, h, reset = inputs()
    y, h_next = model(x, h, reset)
    state = h
    for t in range(8):
        y_t, state = model(x[:, t], state, reset[:, t])
        torch.testing.assert_close(y_t, y[:, t])
    torch.testing.assert_close(state, h_next)
    torch.testing.assert_close(model(x[:, 0])[0], model(x)[0][:, 0])
    torch.testing.assert_close(model(x[:, 0])[0], model(x[:, 0], model.init_hidden(4))[0])


@pytest.mark.parametrize("cut", [0, 1, 5, 8])
def test_split_in_two_equals_whole(cut: int) -> None:
    model = make()
    x, h, reset = inputs()
    y, h_next = model(x, h, reset)
    y1, h1 = model(x[:, :cut], h, reset[:, :cut])
    y2, h2 = model(x[:, cut:], h1, reset[:, cut:])
    torch.testing.assert_close(torch.cat([y1, y2], 1), y)
    torch.testing.assert_close(h2, h_next)


def test_a_reset_forgets_even_a_state_of_nan() -> None:
    model = make()
    x, h, _ = inputs()
    y, h_next = model(x[:, 0], torch.full_like(h, float("nan")), torch.ones(4))
    torch.testing.assert_close((y, h_next), model(x[:, 0]))


def test_gradients() -> None:
    torch.manual_seed(0)
    model = StateSpaceModel(3, 2, 2, 2).double()
    x = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    h = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    reset = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 1]])
    names = [name for name, _ in model.named_parameters()]

    def run(x: Tensor, h: Tensor, *values: Tensor) -> Any:
        return functional_call(model, dict(zip(names, values, strict=True)), (x, h, reset))

    values = [value.detach().clone().requires_grad_() for value in model.parameters()]
    assert gradcheck(run, (x, h, *values))


@pytest.mark.parametrize("one_step", [True, False])
def test_vmap_of_grad_over_task_parameters_equals_a_loop(one_step: bool) -> None:
    model = make()
    x, h, reset = inputs()
    if one_step:
        x, reset = x[:, 0], reset[:, 0]
    tasks = {
        name: torch.stack([value.detach() * (1.0 + 0.1 * g) for g in range(3)])
        for name, value in model.named_parameters()
    }

    def loss(w: dict[str, Tensor]) -> Tensor:
        y, h_next = functional_call(model, w, (x, h, reset))
        result: Tensor = y.square().mean() + h_next.sin().mean()
        return result

    together = vmap(grad(loss))(tasks)
    for g in range(3):
        alone = grad(loss)({name: value[g] for name, value in tasks.items()})
        for name, expected in alone.items():
            torch.testing.assert_close(together[name][g], expected, rtol=1e-9, atol=1e-12)


def test_inner_step_of_maml_has_a_second_order() -> None:
    model = make()
    x, h, _ = inputs()
    target = torch.randn(4, 8, OUT, dtype=torch.float64)

    def loss(w: dict[str, Tensor]) -> Tensor:
        result: Tensor = (functional_call(model, w, (x, h))[0] - target).square().mean()
        return result

    def adapted(w: dict[str, Tensor]) -> Tensor:
        inner = grad(loss)(w)
        return loss({name: value - 0.1 * inner[name] for name, value in w.items()})

    w = {name: value.detach().clone() for name, value in model.named_parameters()}
    slope = grad(adapted)(w)["A"]
    shift = torch.randn_like(slope)
    ahead, behind = ({**w, "A": w["A"] + sign * 1e-6 * shift} for sign in (1, -1))
    numeric = (adapted(ahead) - adapted(behind)) / 2e-6
    torch.testing.assert_close((slope * shift).sum(), numeric, rtol=1e-6, atol=1e-9)


def test_defaults_shapes_and_start() -> None:
    torch.manual_seed(0)
    model = StateSpaceModel()
    assert model.config() == {"state_dim": 32, "input_dim": 4, "output_dim": 2, "hidden_dim": 64}
    assert model.init_hidden(6).shape == (6, 32)
    assert model.double().init_hidden(1).dtype == torch.float64
    torch.testing.assert_close(
        model.A @ model.A.T, 0.81 * torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-5
    )
    y, _ = model(torch.randn(64, 20, 4, dtype=torch.float64))
    assert 0.02 < float(y.detach().std()) < 0.5
    y, h = model(torch.zeros(3, 0, 4, dtype=torch.float64))
    assert (y.shape, h.shape) == ((3, 0, 2), (3, 32))


def test_deepcopy_pickle_and_state_dict() -> None:
    model, other = make(), make(seed=5)
    x, h, _ = inputs()
    expected = model(x, h)[0]
    assert not torch.equal(other(x, h)[0], expected)
    other.load_state_dict(model.state_dict())
    for copied in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(x, h)[0], expected, rtol=0, atol=0)


def test_arguments_are_never_modified() -> None:
    model = make()
    x, h, reset = inputs()
    before = x.clone(), h.clone(), reset.clone()
    model(x, h, reset)
    model(x[:, 0], h, reset[:, 0])
    torch.testing.assert_close((x, h, reset), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["state_dim", "input_dim", "output_dim", "hidden_dim"])
def test_bad_construction(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        StateSpaceModel(**{name: 0})
    with pytest.raises(TypeError, match=f"{name} must be an int, got str"):
        StateSpaceModel(**{name: "4"})


def test_bad_input() -> None:
    model = make()
    x, h, reset = inputs()
    with pytest.raises(ValueError, match=r"x must have shape \[B, I\] or \[B, T, I\] with I = 3"):
        model(x[..., :2], h)
    with pytest.raises(ValueError, match=r"got \[3\]"):
        model(x[0, 0])
    with pytest.raises(ValueError, match=r"hidden_state must have shape \[B, N\] = \[4, 5\], got"):
        model(x, h[:3])
    with pytest.raises(ValueError, match=r"got \[1, 4, 5\]"):
        model(x, h[None])
    with pytest.raises(ValueError, match=r"reset must have shape \[4\], .*, got \[4, 8\]"):
        model(x[:, 0], h, reset)
    with pytest.raises(TypeError, match="x must have the parameters' dtype"):
        model(x.float(), h)
    with pytest.raises(TypeError, match="hidden_state must have the parameters' dtype"):
        model(x, h.float())
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        model.init_hidden(0)


@pytest.fixture(params=[1, 10**9], ids=["fused", "torch"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which sequences are projected."""
    monkeypatch.setattr(fused, "ROWS", request.param)


def test_fused_and_not_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, h, reset) = make(), inputs()
    results = []
    for least in (1, 10**9):
        monkeypatch.setattr(fused, "ROWS", least)
        y, h_next = model(x, h, reset)
        loss = y.pow(3).sum() + h_next.sum()
        results.append([y, h_next, *torch.autograd.grad(loss, list(model.parameters()))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("rows")
def test_hooks_of_the_output_network_run() -> None:
    model, (x, *_) = make(), inputs()
    model.C[2].register_full_backward_hook(lambda *_: (torch.zeros(4, 8, HIDDEN).double(),))
    model(x)[0].sum().backward()
    assert not model.A.grad.any()


@pytest.mark.usefixtures("rows")
def test_an_output_network_of_another_kind() -> None:
    model, (x, *_) = make(), inputs()
    model.C = torch.nn.Linear(N, 1).double()  # broadcasts
    assert model(x)[0].shape == (4, 8, OUT)
    model.C = torch.nn.Sequential(torch.nn.Linear(N, OUT).double(), torch.nn.Tanh())
    assert model(x)[0].shape == (4, 8, OUT)


@pytest.mark.usefixtures("rows")
def test_forward_mode_twice() -> None:
    model, (x, *_) = make(), inputs(2, 3)

    def loss(bias: Tensor) -> Tensor:
        return functional_call(model, {"C.0.bias": bias}, (x,))[0].pow(2).sum()

    bias = model.C[0].bias.detach()
    torch.testing.assert_close(jacfwd(jacfwd(loss))(bias), hessian(loss)(bias))


def test_many_inputs_take_no_square_workspace() -> None:
    model = StateSpaceModel(2, 100_000, 2, 4)
    assert model(torch.zeros(1, 256, 100_000))[0].shape == (1, 256, 2)
