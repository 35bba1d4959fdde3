from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layer_references import layer_loop, weights
from numpy.typing import NDArray
from references import relative_rms
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import gradcheck
from torch.distributions import Categorical, Independent, Normal
from torch.func import functional_call, grad, vmap
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from ssm_fast.checkpoint import load_model, save_model
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.native.step import step_plan
from ssm_fast.nn import RunningNorm, SSMLayer, fused

IN, ACTIONS, N, H, L = 5, 3, 6, 8, 2

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no_norm": {"use_layer_norm": False},
    "norm_state": {"norm": "state"},
    "no_residual": {"use_residual": False},
    "three_layers": {"num_layers": 3},
    "discrete": {"discrete": True},
    "obs_norm": {"normalize_observations": True},
    "critic_network": {"critic_dim": 7, "normalize_observations": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))


def make(*, dtype: torch.dtype = torch.float64, seed: int = 0, **kwargs: Any) -> ImprovedSSM:
    """A model with random biases, heads and statistics, so that nothing vanishes by its start."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"state_dim": N, "hidden_dim": H, "num_layers": L}
    model = ImprovedSSM(IN, ACTIONS, **options | kwargs).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    if model.obs_norm is not None:
        model.obs_norm.update(torch.randn(50, IN) * 3.0 + 1.0)
    return model


def inputs(model: ImprovedSSM, B: int = 4, T: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Observations, state, resets and actions."""
    generator = torch.Generator().manual_seed(1)
    dtype = model.encoder.weight.dtype
    x = torch.randn(B, T, IN, generator=generator, dtype=torch.float64)
    h = torch.randn(model.num_layers, B, N, generator=generator, dtype=torch.float64)
    reset = torch.rand(B, T, generator=generator) < 0.3
    if model.discrete:
        actions = torch.randint(0, ACTIONS, (B, T), generator=generator)
    else:
        actions = torch.randn(B, T, ACTIONS, generator=generator, dtype=torch.float64).to(dtype)
    return x.to(dtype), h.to(dtype), reset, actions


def loop(
    model: ImprovedSSM, x: Tensor, hidden: Tensor | None, reset: Tensor | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Actor's output, value and next state in NumPy."""
    w = weights(model)
    z = x.detach().double().numpy()
    if model.obs_norm is not None:
        mean, var = model.obs_norm.mean.numpy(), model.obs_norm.var.numpy()
        z = np.clip((z - mean) / np.sqrt(var + 1e-8), -10, 10)
    observed = z
    z = np.tanh(z @ w["encoder.weight"].T + w["encoder.bias"])
    norm = model.norm if model.use_layer_norm else None
    states = []
    for i in range(model.num_layers):
        s0 = None if hidden is None else hidden[i].detach().double().numpy()
        y, s = layer_loop(w, z, s0, reset, norm, f"layers.{i}.")
        z = np.tanh(y) + (z if model.use_residual else 0.0)
        states.append(s[:, -1])
    actor = z @ w["actor.weight"].T + w["actor.bias"]
    if model.critic_network is not None:
        v = observed @ w["critic_network.observations.weight"].T
        v = v + w["critic_network.observations.bias"] + z @ w["critic_network.features.weight"].T
        v = np.tanh(v) @ w["critic_network.hidden.weight"].T
        z = np.tanh(v + w["critic_network.hidden.bias"])
    value = z @ w["critic.weight"].T + w["critic.bias"]
    return actor, value[..., 0], np.stack(states)


@every_option
def test_forward_equals_a_float64_loop_over_its_own_parameters(options: dict[str, Any]) -> None:
    model = make(**options)
    x, h, reset, _ = inputs(model)
    mean, log_std, value, h_next = model(x, h, reset)
    for actual, expected in zip((mean, value, h_next), loop(model, x, h, reset), strict=True):
        np.testing.assert_allclose(actual.detach(), expected, atol=1e-11)
    if model.discrete:
        assert log_std is None
    else:
        assert model.log_std is not None
        torch.testing.assert_close(log_std, model.log_std.expand(4, 7, ACTIONS))
    np.testing.assert_allclose(model(x)[0].detach(), loop(model, x, None, None)[0], atol=1e-11)


def test_float32_equals_a_float64_loop() -> None:
    model = ImprovedSSM(17, 6)
    torch.manual_seed(0)
    x = torch.randn(3, 33, 17)
    mean, _, value, h_next = model(x)
    for actual, expected in zip((mean, value, h_next), loop(model, x, None, None), strict=True):
        assert relative_rms(actual, torch.from_numpy(expected)) < 1e-5


@every_option
def test_steps_equal_the_sequence(options: dict[str, Any]) -> None:
    model = make(**options)
    x, h, reset, _ = inputs(model)
    mean, _, value, h_next = model(x, h, reset)
    state = h
    for t in range(7):
        mean_t, log_std, value_t, state = model(x[:, t], state, reset[:, t])
        torch.testing.assert_close(mean_t, mean[:, t])
        torch.testing.assert_close(value_t, value[:, t])
        assert log_std is None or log_std.shape == (4, ACTIONS)
    torch.testing.assert_close(state, h_next)
    for given in (None, model.init_hidden(4)):
        torch.testing.assert_close(model(x[:, 0], given)[0], model(x)[0][:, 0])


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_split_in_two_equals_whole(cut: int) -> None:
    model = make()
    x, h, reset, _ = inputs(model)
    mean, _, value, h_next = model(x, h, reset)
    mean1, _, value1, h1 = model(x[:, :cut], h, reset[:, :cut])
    mean2, _, value2, h2 = model(x[:, cut:], h1, reset[:, cut:])
    torch.testing.assert_close(torch.cat([mean1, mean2], 1), mean)
    torch.testing.assert_close(torch.cat([value1, value2], 1), value)
    torch.testing.assert_close(h2, h_next)


def test_each_layer_owns_its_state() -> None:
    model = make()
    x, h, _, _ = inputs(model)
    base = model(x[:, 0], h)[3]
    changed = h.clone()
    changed[1] += 1.0
    after = model(x[:, 0], changed)[3]
    torch.testing.assert_close(after[0], base[0], rtol=0, atol=0)
    assert not torch.equal(after[1], base[1])


def test_a_reset_forgets_even_a_state_of_nan() -> None:
    model = make()
    x, h, _, _ = inputs(model)
    bad = torch.full_like(h, float("nan"))
    torch.testing.assert_close(model(x[:, 0], bad, torch.ones(4)), model(x[:, 0]))
    reset = torch.zeros(4, 7, dtype=torch.int64)
    reset[:, 3] = 1
    mean, _, _, h_next = model(x, h, reset)
    torch.testing.assert_close(mean[:, 3:], model(x[:, 3:])[0])
    torch.testing.assert_close(h_next, model(x[:, 3:])[3])


@pytest.mark.parametrize("one_step", [True, False])
@pytest.mark.parametrize("discrete", [True, False])
def test_evaluate_actions_equals_torch_distributions(discrete: bool, one_step: bool) -> None:
    model = make(discrete=discrete)
    x, h, reset, actions = inputs(model)
    if one_step:
        x, reset, actions = x[:, 0], reset[:, 0], actions[:, 0]
    log_prob, value, entropy = model.evaluate_actions(x, actions, h, reset)
    out, log_std, expected_value, _ = model(x, h, reset)
    distribution: Any = (
        Categorical(logits=out) if discrete else Independent(Normal(out, log_std.exp()), 1)
    )
    torch.testing.assert_close(log_prob, distribution.log_prob(actions))
    torch.testing.assert_close(entropy, distribution.entropy())
    torch.testing.assert_close(value, expected_value)
    assert log_prob.shape == value.shape == entropy.shape == x.shape[:-1]


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("deterministic", [True, False])
def test_get_action_agrees_with_evaluate_actions(discrete: bool, deterministic: bool) -> None:
    model = make(discrete=discrete)
    x, h, reset, _ = inputs(model)
    for x_, reset_ in ((x, reset), (x[:, 0], reset[:, 0])):
        action, log_prob, value, h_next = model.get_action(x_, h, deterministic, reset_)
        assert action.shape == x_.shape[:-1] + (() if discrete else (ACTIONS,))
        assert action.dtype == (torch.int64 if discrete else torch.float64)
        expected, expected_value, _ = model.evaluate_actions(x_, action, h, reset_)
        torch.testing.assert_close(log_prob, expected)
        torch.testing.assert_close(value, expected_value)
        mean, _, _, expected_h = model(x_, h, reset_)
        torch.testing.assert_close(h_next, expected_h)
        if deterministic:
            torch.testing.assert_close(action, mean.argmax(-1) if discrete else mean.detach())


def test_continuous_samples_follow_the_distribution() -> None:
    model = make()
    x = torch.randn(1, IN, dtype=torch.float64).expand(20_000, -1)
    with torch.no_grad():
        mean, log_std, _, _ = model(x)
        action, _, _, _ = model.get_action(x)
        z = (action - mean) / log_std.exp()
    assert float(z.mean(0).abs().max()) < 0.04
    torch.testing.assert_close(
        torch.cov(z.T), torch.eye(ACTIONS, dtype=torch.float64), rtol=0, atol=0.05
    )


def test_discrete_samples_follow_the_distribution() -> None:
    model = make(discrete=True)
    x = torch.randn(1, IN, dtype=torch.float64).expand(20_000, -1)
    with torch.no_grad():
        probabilities = model(x)[0][0].softmax(-1)
        action = model.get_action(x)[0]
    frequencies = torch.bincount(action, minlength=ACTIONS) / 20_000
    assert float((frequencies - probabilities).abs().max()) < 0.02
    assert float(probabilities.min()) > 0.02


def test_samples_are_seeded() -> None:
    for model in (make(), make(discrete=True)):
        x, h, _, _ = inputs(model)
        drawn = []
        for _ in range(2):
            torch.manual_seed(3)
            drawn.append(model.get_action(x, h)[0])
        assert torch.equal(*drawn)
        assert not torch.equal(model.get_action(x, h)[0], drawn[0])


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_noise_of_some_rows_gives_the_actions_that_they_take_among_all(
    discrete: bool, grad: bool
) -> None:
    model = make(discrete=discrete)
    x, state, *_ = inputs(model)
    with torch.set_grad_enabled(grad):  # the modules, and the native step
        torch.manual_seed(5)
        whole = model.get_action(x[:, 0], state)
        torch.manual_seed(5)
        noise = model.draw_noise(len(x))
        part = model.get_action(x[1:3, 0], state[:, 1:3], noise=noise[1:3])
        every_second = model.get_action(x[::2, 0], state[:, ::2], noise=noise[::2])
        alike = model.get_action(x[:, 0], state, True, noise=noise)
        mode = model.get_action(x[:, 0], state, True)
    for i in range(3):
        torch.testing.assert_close(part[i], whole[i][1:3])
        torch.testing.assert_close(every_second[i], whole[i][::2])
        assert torch.equal(alike[i], mode[i])
    with pytest.raises(ValueError, match=r"noise must have shape \[4, \d\], got \[2, \d\]"):
        model.get_action(x[:, 0], state, noise=noise[:2])
    with pytest.raises(TypeError, match="noise"):
        model.get_action(x[:, 0], state, noise=noise.float())


@pytest.mark.parametrize("discrete", [False, True])
def test_noise_is_drawn_into_the_memory_of_an_earlier_draw(discrete: bool) -> None:
    model = make(discrete=discrete)
    torch.manual_seed(5)
    draws = [model.draw_noise(4) for _ in range(2)]
    torch.manual_seed(5)
    out = model.draw_noise(4)
    assert torch.equal(out, draws[0])
    assert model.draw_noise(4, out) is out
    assert torch.equal(out, draws[1])
    before = torch.get_rng_state()
    assert torch.equal(model.draw_noise(4, None, torch.Generator().manual_seed(5)), draws[0])
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(
        ValueError, match=r"out must have shape \[B, K\] = \[3, \d\], got \[4, \d\]"
    ):
        model.draw_noise(3, out)
    with pytest.raises(TypeError, match="out"):
        model.draw_noise(4, out.float())


@every_option
def test_stepper_acts_as_get_action(options: dict[str, Any]) -> None:
    model = make(**options)
    x, state, *_ = inputs(model)
    with torch.no_grad():
        step = model.stepper(x[:, 0], state)
        for t in range(3):
            noise = model.draw_noise(len(x)).repeat_interleave(2, 1)[:, ::2]  # not contiguous
            expected = model.get_action(x[:, t], state, noise=noise)
            found = step(x[:, t], state, noise)
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one, other)
            state = found[3]
        with pytest.raises(TypeError, match="noise"):
            step(x[:, 0], state, noise.float())
        with pytest.raises(ValueError, match="noise must have shape"):
            step(x[:, 0], state, noise[:2])


def test_stepper_calls_another_get_action() -> None:
    class Still(ImprovedSSM):
        def get_action(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            action, *rest = super().get_action(*args, **kwargs)
            return torch.zeros_like(action), *rest

    model = Still(IN, ACTIONS, N, H, L).double()
    x, state, *_ = inputs(model)
    with torch.no_grad():
        action, *_ = model.stepper(x[:, 0], state)(x[:, 0], state, model.draw_noise(len(x)))
    assert not action.any()


@pytest.mark.parametrize("discrete", [True, False])
def test_log_prob_of_a_sample_has_the_policy_gradient(discrete: bool) -> None:
    # REINFORCE: the action is a constant; a reparametrised sample would have no gradient of mean.
    model = make(discrete=discrete)
    x, h, _, _ = inputs(model)
    action, log_prob, _, _ = model.get_action(x, h)
    assert not action.requires_grad
    actual = torch.autograd.grad(log_prob.sum(), model.actor.bias)[0]
    out, log_std, _, _ = model(x, h)
    if discrete:
        expected = (nn.functional.one_hot(action, ACTIONS) - out.softmax(-1)).sum((0, 1))
    else:
        expected = ((action - out) / (2 * log_std).exp()).sum((0, 1))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("discrete", [True, False])
def test_gradients_of_evaluate_actions(discrete: bool) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"state_dim": 2, "hidden_dim": 2, "num_layers": 2}
    model = ImprovedSSM(2, 2, discrete=discrete, **options).double()
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    h = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    actions = torch.tensor([[0, 1, 1], [1, 0, 0]])
    if not discrete:
        actions = torch.randn(2, 3, 2, dtype=torch.float64)
    reset = torch.tensor([[0, 1, 0], [0, 0, 1]])
    evaluate = Evaluate(model)
    names = [name for name, _ in evaluate.named_parameters()]

    def run(x: Tensor, h: Tensor, *values: Tensor) -> Any:
        w = dict(zip(names, values, strict=True))
        return functional_call(evaluate, w, (x, actions, h, reset))

    values = [
        (value.detach() + 0.1 * torch.randn_like(value)).requires_grad_()
        for value in evaluate.parameters()
    ]
    assert gradcheck(run, (x, h, *values), fast_mode=True)  # in full in test_ssm_layer.py


class Evaluate(nn.Module):
    """`evaluate_actions` as a forward, for functional_call."""

    def __init__(self, model: ImprovedSSM) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.model.evaluate_actions(*args)


@every_option
def test_vmap_of_grad_over_task_parameters_equals_a_loop(options: dict[str, Any]) -> None:
    evaluate = Evaluate(make(**options))
    x, h, reset, actions = inputs(evaluate.model)
    tasks = {
        name: torch.stack([value.detach() * (1.0 + 0.1 * g) for g in range(3)])
        for name, value in evaluate.named_parameters()
    }

    def loss(w: dict[str, Tensor], x: Tensor, one_step: bool) -> Tensor:
        arguments = (x[:, 0], actions[:, 0], h, reset[:, 0])
        if not one_step:
            arguments = (x, actions, h, reset)
        log_prob, value, entropy = functional_call(evaluate, w, arguments)
        result: Tensor = (log_prob + value.square() + entropy).mean()
        return result

    data = torch.stack([x, x * 1.1, x + 0.1])
    for one_step in (False, True):
        together = vmap(grad(loss), in_dims=(0, 0, None))(tasks, data, one_step)
        for g in range(3):
            w = {name: value[g] for name, value in tasks.items()}
            alone = grad(loss)(w, data[g], one_step)
            for name, expected in alone.items():
                torch.testing.assert_close(together[name][g], expected, rtol=1e-9, atol=1e-12)


def test_compiles_to_one_graph() -> None:
    model = make(normalize_observations=True)
    x, h, reset, actions = inputs(model)
    compiled = torch.compile(model.evaluate_actions, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(x, actions, h, reset), model.evaluate_actions(x, actions, h, reset)
    )


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = ImprovedSSM(17, 6)
    encoder, actor, critic = model.encoder.weight, model.actor.weight, model.critic.weight
    torch.testing.assert_close(encoder.T @ encoder, 2.0 * torch.eye(17), rtol=0, atol=1e-5)
    torch.testing.assert_close(actor @ actor.T, 1e-4 * torch.eye(6), rtol=0, atol=1e-8)
    torch.testing.assert_close(critic @ critic.T, torch.eye(1), rtol=0, atol=1e-5)
    assert all(bool((m.bias == 0).all()) for m in (model.encoder, model.actor, model.critic))
    assert model.log_std is not None
    assert model.log_std.tolist() == [-0.5] * 6
    mean, _, _, h = model(torch.randn(32, 20, 17))
    assert float(mean.detach().abs().max()) < 0.2
    assert h.shape == (2, 32, 64)
    assert ImprovedSSM(3, 2, log_std_init=0.25).log_std.tolist() == [0.25] * 2
    plain = ImprovedSSM(17, 6, orthogonal_init=False)
    assert float((plain.actor.weight @ plain.actor.weight.T).detach().diagonal().min()) > 0.1


def test_parameters_and_options() -> None:
    model = ImprovedSSM(17, 6)
    assert sum(value.numel() for value in model.parameters()) == (
        17 * 128 + 128 + 2 * (64 * 64 + 2 * 64 * 128 + 128 * 128 + 64 + 256) + 7 * 128 + 7 + 6
    )
    assert model.obs_norm is None
    assert ImprovedSSM(17, 6, discrete=True).log_std is None
    assert isinstance(make(normalize_observations=True).obs_norm, RunningNorm)
    assert "obs_norm.mean" in make(normalize_observations=True).state_dict()
    assert all(layer.norm is None for layer in make(use_layer_norm=False).layers)
    assert model.init_hidden(5).shape == (2, 5, 64)
    assert model.double().init_hidden(5).dtype == torch.float64


def test_config_rebuilds_the_model() -> None:
    for options in OPTIONS.values():
        model = make(log_std_init=-1.0, orthogonal_init=False, **options)
        again = ImprovedSSM(**model.config()).double()
        again.load_state_dict(model.state_dict())
        assert again.config() == model.config()
        x, h, reset, _ = inputs(model)
        torch.testing.assert_close(again(x, h, reset), model(x, h, reset), rtol=0, atol=0)


@every_option
def test_deepcopy_pickle_and_state_dict(options: dict[str, Any]) -> None:
    model, other = make(**options), make(seed=5, **options)
    x, h, _, _ = inputs(model)
    expected = model(x, h)[0]
    assert not torch.equal(other(x, h)[0], expected)
    other.load_state_dict(model.state_dict())
    for copied in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(x, h)[0], expected, rtol=0, atol=0)


@every_option
def test_arguments_are_never_modified(options: dict[str, Any]) -> None:
    model = make(**options)
    x, h, reset, actions = inputs(model)
    before = x.clone(), h.clone(), reset.clone(), actions.clone()
    model(x, h, reset)
    model.get_action(x[:, 0], h, reset=reset[:, 0])
    model.evaluate_actions(x, actions, h, reset)
    torch.testing.assert_close((x, h, reset, actions), before, rtol=0, atol=0)


def test_forward_leaves_the_statistics_alone() -> None:
    model = make(normalize_observations=True)
    before = copy.deepcopy(model.state_dict())
    x, h, _, _ = inputs(model)
    model.train()
    model(x, h)
    model.get_action(x[:, 0], h)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"input_dim": 0}, ValueError, "input_dim must be at least 1, got 0"),
        ({"action_dim": -1}, ValueError, "action_dim must be at least 1, got -1"),
        ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
        ({"hidden_dim": 8.0}, TypeError, "hidden_dim must be an int, got float"),
        ({"state_dim": None}, TypeError, "state_dim must be an int, got NoneType"),
        ({"discrete": 1}, TypeError, "discrete must be a bool, got int"),
        ({"norm": None}, ValueError, "norm must be 'output' or 'state', got None"),
        ({"log_std_init": math.inf}, ValueError, "log_std_init must be finite, got inf"),
    ],
)
def test_bad_construction(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ImprovedSSM(**{"input_dim": 4, "action_dim": 2} | kwargs)


def test_numbers_of_numpy_are_those_of_python(tmp_path: Path) -> None:
    sizes = {"input_dim": np.int64(4), "action_dim": np.int32(2), "critic_dim": np.int64(3)}
    model = ImprovedSSM(**sizes, discrete=np.bool_(True), log_std_init=np.float32(-1.0))
    save_model(tmp_path / "model.safetensors", model)
    assert load_model(tmp_path / "model.safetensors").config() == model.config()


def test_bad_input() -> None:
    model, discrete = make(), make(discrete=True)
    x, h, reset, actions = inputs(model)
    with pytest.raises(ValueError, match=r"x must have shape \[B, I\] or \[B, T, I\] with I = 5"):
        model(x[..., :4], h)
    with pytest.raises(ValueError, match=r"got \[5\]"):
        model.get_action(x[0, 0])
    with pytest.raises(ValueError, match=r"hidden_state must have shape \[L, B, N\] = \[2, 4, 6\]"):
        model(x, h[:, :3])
    with pytest.raises(ValueError, match=r"got \[4, 6\]"):
        model.get_action(x[:, 0], h[0])
    with pytest.raises(ValueError, match=r"reset must have shape \[4, 7\], .*, got \[4\]"):
        model(x, h, reset[:, 0])
    with pytest.raises(ValueError, match=r"actions must have shape \[4, 7, 3\], got \[4, 7\]"):
        model.evaluate_actions(x, actions[..., 0], h)
    with pytest.raises(ValueError, match=r"actions must have shape \[4, 7\], got \[4, 7, 3\]"):
        discrete.evaluate_actions(x, actions, h)
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(TypeError, match="actions must be integers, got"):
            discrete.evaluate_actions(x, actions[..., 0].to(dtype), h)
    with pytest.raises(TypeError, match="actions must have the parameters' dtype"):
        model.evaluate_actions(x, actions.float(), h)
    with pytest.raises(TypeError, match="x must have the parameters' dtype"):
        model(x.float())
    with pytest.raises(TypeError, match="hidden_state must have the parameters' dtype"):
        model(x, h.float())
    with pytest.raises(TypeError, match="x must have the parameters' dtype"):
        model(x.long())


@pytest.mark.parametrize("action", [-1, 2])
def test_evaluate_actions_refuses_an_action_out_of_range(action: int) -> None:
    model = ImprovedSSM(3, 2, 4, 8, discrete=True)
    actions = torch.tensor([[0, 1], [action, 1]])
    with pytest.raises(ValueError, match=r"actions must lie in \[0, 2\), got"):
        model.evaluate_actions(torch.zeros(2, 2, 3), actions)


class TestNativeStep:
    """`get_action` without gradients runs one native call: the same numbers, never stale ones."""

    @staticmethod
    def results(model: ImprovedSSM, **kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Of the native step, and of the modules one after the other."""
        x, h, reset, _ = inputs(model)
        arguments = x[:, 0], h, True, reset[:, 0]
        with torch.no_grad():
            assert step_plan(model, *arguments[:2])
            native = model.get_action(*arguments, **kwargs)
        modules = model.get_action(*arguments, **kwargs)
        return list(native), [result.detach() for result in modules]

    @every_option
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_same_numbers_as_the_modules(self, options: dict[str, Any], dtype: torch.dtype) -> None:
        native, modules = self.results(make(dtype=dtype, **options))
        tolerance = 1e-6 if dtype == torch.float32 else 1e-12
        for one, other in zip(native, modules, strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)

    @every_option
    def test_same_draws_as_the_modules(self, options: dict[str, Any]) -> None:
        model = make(**options)
        x, h, _, _ = inputs(model)
        torch.manual_seed(3)
        with torch.no_grad():
            native = model.get_action(x[:, 0], h)
        torch.manual_seed(3)
        for one, other in zip(native, model.get_action(x[:, 0], h), strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-12)

    def test_follows_every_change_of_the_weights(self) -> None:
        model, other = make(), make(seed=5)
        x, h, reset, actions = inputs(model)

        def optimise() -> None:
            optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
            log_probs, values, _ = model.evaluate_actions(x, actions, h, reset)
            (log_probs.sum() + values.sum()).backward()
            optimizer.step()

        def edit_in_place() -> None:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)

        def edit_data() -> None:
            for parameter in model.parameters():
                parameter.data.add_(0.1)

        def replace_data() -> None:
            for parameter in model.parameters():
                parameter.data = parameter.data * 0.9

        def replace_parameter() -> None:
            model.layers[1].A = nn.Parameter(torch.eye(N, dtype=torch.float64))

        def transpose_in_place() -> None:
            model.layers[0].A.data = model.layers[0].A.data.T

        before, _ = self.results(model)
        for change in (
            optimise,
            lambda: model.load_state_dict(other.state_dict()),
            edit_in_place,
            edit_data,
            replace_data,
            replace_parameter,
        ):
            change()
            native, modules = self.results(model)
            assert not torch.allclose(native[2], before[2], rtol=1e-6)
            for one, two in zip(native, modules, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
            before = native
        transpose_in_place()  # no kernel for it: the modules run
        with torch.no_grad():
            native = model.get_action(x[:, 0], h, True)
        modules = model.get_action(x[:, 0], h, True)
        torch.testing.assert_close(native[2], modules[2].detach(), rtol=1e-12, atol=1e-12)

    def test_leaves_changed_models_to_the_modules(self) -> None:
        x, h, _, _ = inputs(make())

        def hooked(model: ImprovedSSM) -> None:
            model.actor.register_forward_hook(lambda module, args, output: output + 1.0)

        def wrapped(model: ImprovedSSM) -> None:
            model.critic = nn.Sequential(model.critic, nn.Tanh())

        def other_eps(model: ImprovedSSM) -> None:
            model.layers[0].norm.eps = 0.5

        def without_affine(model: ImprovedSSM) -> None:
            model.layers[0].norm = nn.LayerNorm(H, elementwise_affine=False, dtype=torch.float64)

        def without_norm_bias(model: ImprovedSSM) -> None:
            model.layers[0].norm = nn.LayerNorm(H, bias=False, dtype=torch.float64)

        def other_norm(model: ImprovedSSM) -> None:
            model.layers[0] = SSMLayer(H, H, N, norm="state", dtype=torch.float64)

        def pruned(model: ImprovedSSM) -> None:
            prune.l1_unstructured(model.layers[0], "A", 0.3)

        def other_forward(model: ImprovedSSM) -> None:
            model.encoder.forward = lambda x: torch.ones(4, H, dtype=x.dtype)

        def single_statistics(model: ImprovedSSM) -> None:
            state = model.state_dict()
            assert model.obs_norm is not None
            model.obs_norm.mean = state["obs_norm.mean"].float()
            model.obs_norm.var = state["obs_norm.var"].float()

        changes = (
            hooked,
            wrapped,
            other_eps,
            without_affine,
            without_norm_bias,
            other_norm,
            pruned,
            other_forward,
            single_statistics,
        )
        for change in changes:
            torch.manual_seed(0)
            model = make(normalize_observations=change is single_statistics)
            change(model)
            with torch.no_grad():
                assert bool(step_plan(model, x[:, 0], h)) == (change in (other_eps, other_norm))
                without = model.get_action(x[:, 0], h, True)
            for one, other in zip(without, model.get_action(x[:, 0], h, True), strict=True):
                torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("every_state", [True, False])
    def test_hooks_on_layers_run(self, every_state: bool) -> None:
        model, other = make(), make()
        x, h, reset, _ = inputs(model)
        calls = []
        for layer in model.layers:
            layer.register_forward_hook(lambda *_: calls.append(1))
        run = ImprovedSSM.unroll if every_state else ImprovedSSM.forward
        torch.testing.assert_close(run(model, x, h, reset), run(other, x, h, reset))
        assert len(calls) == L
        torch.testing.assert_close(model(x[:, 0], h), other(x[:, 0], h))
        assert len(calls) == 2 * L

    def test_actions_under_autocast(self) -> None:
        model = make(dtype=torch.float32)
        x, h, _, _ = inputs(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            action, log_prob, _, h_next = model.get_action(x[:, 0], h)
            again, _, _ = model.evaluate_actions(x[:, 0], action, h)
        assert action.dtype == log_prob.dtype == h_next.dtype == torch.float32
        torch.testing.assert_close(again, log_prob, rtol=0, atol=0)

    def test_reads_the_weights_of_functional_call(self) -> None:
        model, other = make(), make(seed=5)
        x, h, _, _ = inputs(model)

        class Act(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self) -> Tensor:
                return self.model.get_action(x[:, 0], h, True)[0]

        with torch.no_grad():
            weights = {f"model.{name}": p.detach() for name, p in other.named_parameters()}
            actions = functional_call(Act(), weights, ())
            torch.testing.assert_close(actions, other.get_action(x[:, 0], h, True)[0])

    def test_a_negated_view_is_read_as_it_is(self) -> None:
        model = make()
        _, h, _, _ = inputs(model)
        x = torch.randn(4, IN, dtype=torch.complex128).conj().imag
        assert x.is_neg()
        with torch.no_grad():
            actions = model.get_action(x, h, True)[0]
            torch.testing.assert_close(actions, model.get_action(x.resolve_neg(), h, True)[0])

    def test_modes_of_torch_see_the_modules(self) -> None:
        model = make(dtype=torch.float32)
        x, h, _, _ = inputs(model)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.get_action(x[:, 0], h)
        heads = IN * H + H * (ACTIONS + 1)
        assert counter.get_total_flops() >= 2 * 4 * (heads + L * (N * H + H * N + H * H))
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            actions = model.get_action(torch.empty(4, IN), None)[0]
            assert isinstance(actions, FakeTensor)
        with torch.no_grad(), torch.device("meta"):  # moves what is new, not what is given
            drawn = model.get_action(x[:, 0], h)[0]
        assert drawn.device.type == "cpu"

    def test_wrong_shapes_raise_before_the_kernel(self) -> None:
        model = make()
        x, h, reset, _ = inputs(model)
        with torch.no_grad():
            with pytest.raises(ValueError, match="x must have shape"):
                model.get_action(x[:, 0, :-1], h)
            with pytest.raises(ValueError, match="hidden_state must have shape"):
                model.get_action(x[:, 0], h[:, :-1])
            with pytest.raises(ValueError, match="reset must have shape"):
                model.get_action(x[:, 0], h, reset=reset[:-1, 0])
            with pytest.raises(TypeError, match="hidden_state"):
                model.get_action(x[:, 0], h.float())
            model.encoder.weight.data = model.encoder.weight.data[:, :-1].contiguous()
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                model.get_action(x[:, 0], h)


@pytest.mark.parametrize("critic_dim", [None, 6])
def test_fused_and_not_give_the_same(
    critic_dim: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = ImprovedSSM(3, 2, 5, 7, critic_dim=critic_dim).double()
    x, results = torch.randn(4, 6, 3).double(), []
    for least in (1, 10**9):
        monkeypatch.setattr(fused, "ROWS", least)
        mean, log_std, value, state = model(x)
        loss = mean.pow(3).sum() + log_std.sum() + value.square().sum()
        results.append([mean, value, state, *torch.autograd.grad(loss, list(model.parameters()))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("least", [1, 10**9])
@pytest.mark.parametrize("name", ["encoder", "critic_network.hidden"])
def test_backward_hooks_run(name: str, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "ROWS", least)
    model, seen = ImprovedSSM(3, 2, 5, 7, critic_dim=6), []
    model.get_submodule(name).register_full_backward_hook(lambda *_: seen.append(1))
    mean, _, value, _ = model(torch.randn(4, 6, 3, requires_grad=True))
    (mean.sum() + value.sum()).backward()
    assert seen
