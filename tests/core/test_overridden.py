"""Methods that a subclass or an object overrides, and modules in another's place: no fast path goes around them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ssm_fast import SSM
from ssm_fast.core import ImprovedSSM, StateSpaceModel
from ssm_fast.core.rollout_policy import RolloutPolicy
from ssm_fast.core.task_policies import TaskPolicies
from ssm_fast.env_runner import Environment
from ssm_fast.meta_rl.meta_maml import MetaMAML
from ssm_fast.meta_rl.ppo_trainer import PPOTrainer
from ssm_fast.nn.ssm_layer import SSMLayer

IN, ACTIONS, N, HIDDEN, B, T = 3, 1, 6, 8, 5, 4


def _normalize(self: Any, x: Tensor) -> Tensor:
    return 10.0 * ImprovedSSM.normalize(self, x)


def _features(self: Any, *arguments: Any, **options: Any) -> Any:
    features, states = ImprovedSSM._features(self, *arguments, **options)
    return 2.0 * features, states


def _value(self: Any, x: Tensor, features: Tensor) -> Tensor:
    return ImprovedSSM._value(self, x, features) + 1.0


def _readout(self: Any, s: Tensor, x: Tensor, **options: Any) -> Tensor:
    return SSMLayer.readout(self, 2.0 * s, x, **options)


def _states(self: Any, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return SSMLayer.states(self, x.flip(-1), *arguments, **options)


def _layer_forward(self: Any, x: Tensor, *arguments: Any, **options: Any) -> Any:
    return SSMLayer.forward(self, x.flip(-1), *arguments, **options)


def _layer_step(self: Any, x: Tensor, s: Tensor | None = None) -> Any:
    return SSMLayer.step(self, x.flip(-1), s)


OF_MODEL = {"normalize": _normalize, "_features": _features, "_value": _value}
OF_LAYER = {"readout": _readout, "states": _states, "forward": _layer_forward}
NAMES = [*OF_MODEL, *(f"layer {name}" for name in OF_LAYER), "layer step and forward"]


def override(module: nn.Module, in_class: bool, **methods: Callable[..., Any]) -> None:
    """Puts other methods into an object, or into a subclass that becomes its class."""
    if in_class:
        module.__class__ = type("Mine", (type(module),), methods)
        return
    for name, method in methods.items():
        module.__dict__[name] = MethodType(method, module)


def overridden(name: str, in_class: bool) -> ImprovedSSM:
    torch.manual_seed(0)
    model = ImprovedSSM(IN, ACTIONS, N, HIDDEN, normalize_observations=True)
    with torch.no_grad():
        model.actor.weight.mul_(100.0)
    if name in OF_MODEL:
        override(model, in_class, **{name: OF_MODEL[name]})
    elif name == "layer step and forward":
        override(model.layers[1], in_class, step=_layer_step, forward=_layer_forward)
    elif name:
        name = name.removeprefix("layer ")
        override(model.layers[1], in_class, **{name: OF_LAYER[name]})
    return model


@contextmanager
def without_fast_paths(model: nn.Module) -> Iterator[None]:
    """A hook, with which the modules themselves have to run."""
    hooks = [m.register_forward_hook(lambda *_: None) for m in model.modules()]
    yield
    for hook in hooks:
        hook.remove()


@pytest.fixture(params=["class", "object"])
def in_class(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "class")


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest, in_class: bool) -> ImprovedSSM:
    return overridden(request.param, in_class)


X, STATE = torch.randn(B, IN), torch.randn(2, B, N)


@torch.no_grad()
def test_get_action(model: ImprovedSSM) -> None:
    noise = model.draw_noise(B)
    found = model.get_action(X, STATE, noise=noise)
    with without_fast_paths(model):
        expected = model.get_action(X, STATE, noise=noise)
    torch.testing.assert_close(found, expected)
    plain = overridden("", True).get_action(X, STATE, noise=noise)
    assert not all(torch.allclose(x, y) for x, y in zip(found, plain, strict=True))


@torch.no_grad()
def test_a_step_is_a_sequence_of_one(model: ImprovedSSM) -> None:
    mean, _, value, state = model(X, STATE)
    sequence = model(X[:, None], STATE)
    for x, y in ((mean, sequence[0][:, 0]), (value, sequence[2][:, 0]), (state, sequence[3])):
        torch.testing.assert_close(x, y)


@torch.no_grad()
def test_rollouts(model: ImprovedSSM) -> None:
    rollout, state = RolloutPolicy.of(model, X, STATE, T), STATE
    for _ in range(T):
        noise = model.draw_noise(B)
        with without_fast_paths(model):
            action, _, _, state = model.get_action(X, state, noise=noise)
        torch.testing.assert_close(torch.from_numpy(rollout.act(X, noise)[0]), action)


def _get_action(self: Any, *arguments: Any, **options: Any) -> Any:
    action, *rest = ImprovedSSM.get_action(self, *arguments, **options)
    return action + 1.0, *rest


@torch.no_grad()
def test_rollouts_of_another_get_action(in_class: bool) -> None:
    model = overridden("", True)
    noise = model.draw_noise(B)
    plain, _ = RolloutPolicy.of(model, X, STATE, T).act(X, noise)
    override(model, in_class, get_action=_get_action)
    moved, _ = RolloutPolicy.of(model, X, STATE, T).act(X, noise)
    torch.testing.assert_close(moved, plain + 1.0)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("shape", [(B,), (B, T)])
def test_draw_noise(in_class: bool, discrete: bool, shape: tuple[int, ...]) -> None:
    model = ImprovedSSM(IN, 2, N, HIDDEN, discrete=discrete)
    x = torch.randn(*shape, IN)
    plain = model.get_action(x, deterministic=True)[0]
    # No noise at all, or so much for action 0 that the other one is taken.
    draws = torch.tensor([1e30, 1e-30]) if discrete else torch.zeros(2)
    override(model, in_class, draw_noise=lambda _, batch_size: draws.expand(batch_size, 2).clone())
    for native in (True, False):
        with torch.set_grad_enabled(not native):
            action = model.get_action(x)[0]
        expected = torch.ones_like(plain) if discrete else plain
        torch.testing.assert_close(action, expected)


def trained(model: ImprovedSSM) -> list[Tensor]:
    with Environment("Pendulum-v1", 2, max_episode_steps=12) as env:
        PPOTrainer(model, num_steps=16, seed=0, ppo_epochs=2, learning_rate=1e-3).train(env, 64)
    return [p.detach() for p in model.parameters()]


def _evaluate_actions(self: Any, *arguments: Any, **options: Any) -> Any:
    log_prob, value, entropy = ImprovedSSM.evaluate_actions(self, *arguments, **options)
    return log_prob, 2.0 * value, entropy


def test_ppo(model: ImprovedSSM) -> None:
    with without_fast_paths(model):
        expected = trained(copy.deepcopy(model))
    torch.testing.assert_close(trained(model), expected, rtol=1e-3, atol=1e-4)
    plain = trained(overridden("", True))
    assert not all(torch.allclose(x, y, atol=1e-3) for x, y in zip(expected, plain, strict=True))


def test_ppo_of_another_evaluate_actions(in_class: bool) -> None:
    model = overridden("", True)
    override(model, in_class, evaluate_actions=_evaluate_actions)
    with without_fast_paths(model):
        expected = trained(copy.deepcopy(model))
    torch.testing.assert_close(trained(model), expected, rtol=1e-3, atol=1e-4)


def _forward(self: Any, *arguments: Any) -> Any:
    mean, log_std, value, state = ImprovedSSM.forward(self, *arguments)
    return mean + 1.0, log_std, value, state


@torch.no_grad()
@pytest.mark.parametrize("name", [*NAMES, "forward"])
def test_task_policies(name: str, in_class: bool) -> None:
    model = overridden("" if name == "forward" else name, in_class)
    if name == "forward":
        override(model, in_class, forward=_forward)
    weights = {n: torch.stack((p, 0.5 * p)) for n, p in model.named_parameters()}
    x, state = torch.randn(2, B, IN), torch.randn(2, 2, B, N)
    action, _, value, _ = TaskPolicies(model, weights).get_action(x, state, deterministic=True)
    for g in range(2):
        of_task = {n: w[g] for n, w in weights.items()}
        mean, _, expected, _ = functional_call(model, of_task, (x[g], state[:, g]))
        torch.testing.assert_close(action[g], mean)
        torch.testing.assert_close(value[g], expected)


@pytest.mark.parametrize("name", [*NAMES, "forward"])
def test_meta_maml(name: str, in_class: bool) -> None:
    model = overridden("" if name == "forward" else name, in_class)
    if name == "forward":
        override(model, in_class, forward=_forward)
    torch.manual_seed(0)
    x, y = torch.randn(2, 2, B, T, IN), torch.randn(2, 2, B, T, ACTIONS)
    tasks = [(x[g, 0], y[g, 0], x[g, 1], y[g, 1]) for g in range(2)]
    found = MetaMAML(model).meta_gradient(tasks)
    with without_fast_paths(model):
        expected = MetaMAML(model).meta_gradient(tasks)
    torch.testing.assert_close(found.losses, expected.losses)
    for key, gradient in expected.weights.items():
        torch.testing.assert_close(found.weights[key], gradient, rtol=1e-3, atol=1e-5)


def test_meta_maml_of_another_state_space_model(in_class: bool) -> None:
    def forward(self: Any, x: Tensor, *arguments: Any) -> Any:
        return StateSpaceModel.forward(self, 2.0 * x, *arguments)

    model = StateSpaceModel(N, IN, 2)
    override(model, in_class, forward=forward)
    x, y = torch.randn(2, B, T, IN), torch.randn(2, B, T, 2)
    found = MetaMAML(model).meta_gradient([(x[0], y[0], x[1], y[1])])
    with without_fast_paths(model):
        expected = MetaMAML(model).meta_gradient([(x[0], y[0], x[1], y[1])])
    torch.testing.assert_close(found.losses, expected.losses)


@pytest.mark.parametrize("name", [*OF_LAYER, "step and forward"])
def test_the_steps_of_a_layer(name: str, in_class: bool) -> None:
    ssm = SSM(IN, IN, 2, batch_first=True)
    methods = {"step": _layer_step, "forward": _layer_forward}
    override(ssm.layers[0], in_class, **({name: OF_LAYER[name]} if name in OF_LAYER else methods))
    x, state = torch.randn(B, T, IN), None
    expected, last = ssm(x)
    for t in range(T):
        y, state = ssm.step(x[:, t], state)
        torch.testing.assert_close(y, expected[:, t])
    torch.testing.assert_close(state, last)


class LoRA(nn.Module):
    """A linear layer with a low-rank term beside it (Hu et al. 2021), without a ``weight``."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result


ENCODERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "LoRA": LoRA,
    "Sequential": lambda linear: nn.Sequential(linear, nn.Tanh()),
    "quantized": lambda linear: torch.ao.quantization.quantize_dynamic(
        nn.Sequential(linear), {nn.Linear}
    )[0],
}


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_replaced_encoder(encoder: str) -> None:
    torch.manual_seed(0)
    model = ImprovedSSM(IN, ACTIONS, N, HIDDEN)
    model.encoder = ENCODERS[encoder](model.encoder)  # type: ignore[assignment]
    x, state = torch.randn(B, IN), torch.randn(2, B, N)
    mean, _, value, _ = model(x, state)
    with torch.no_grad():
        action, _, v, after = model.get_action(x, state, deterministic=True)
    torch.testing.assert_close(action, mean)
    torch.testing.assert_close(v, value)
    assert after.shape == model.init_hidden(B).shape
    assert model.draw_noise(B).shape == (B, ACTIONS)
    weights = {n: p[None] for n, p in model.named_parameters()}
    policies = TaskPolicies(model, weights)
    action, *_ = policies.get_action(x[None], state[:, None], deterministic=True)
    torch.testing.assert_close(action[0], mean)


@pytest.mark.parametrize("encoder", ["LoRA", "Sequential"])
def test_ppo_of_a_replaced_encoder(encoder: str) -> None:
    torch.manual_seed(0)
    model = ImprovedSSM(IN, ACTIONS, N, HIDDEN)
    model.encoder = ENCODERS[encoder](model.encoder)  # type: ignore[assignment]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
