from __future__ import annotations

import copy
import math
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray
from torch import Tensor

from ssm_fast.checkpoint import load_model, read_metadata
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.env_runner.environment import Environment
from ssm_fast.meta_rl.ppo_trainer import PPOTrainer, _Minibatch
from ssm_fast.meta_rl.rollout import Rollout
from ssm_fast.meta_rl.run import RunDirectory, write_state

_Step = tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]


class Drift(gymnasium.Env[NDArray[np.float32], Any]):
    """A random walk pushed by the action, with episodes of random length that end either way."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, discrete: bool = False, nan_at: int | None = None) -> None:
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space: gymnasium.Space[Any] = (
            gymnasium.spaces.Discrete(2)
            if discrete
            else gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        )
        self.nan_at = nan_at
        self.steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 12))
        self.position = self.np_random.normal(size=3)
        return self.position.astype(np.float32), {}

    def step(self, action: Any) -> _Step:
        self.steps += 1
        self.position += 0.3 * self.np_random.normal(size=3) + 0.1 * np.mean(action)
        self.left -= 1
        over, dies = self.left == 0, bool(self.np_random.random() < 0.5)
        if self.steps == self.nan_at:
            self.position[1] = np.nan
        observation = self.position.astype(np.float32)
        return observation, float(self.position[0]), over and dies, over and not dies, {}


def _drift(
    B: int, discrete: bool = False, nan_row: int | None = None, nan_at: int = 7
) -> SyncVectorEnv:
    def make(i: int) -> Drift:
        return Drift(discrete, nan_at if i == nan_row else None)

    return SyncVectorEnv(
        [lambda i=i: make(i) for i in range(B)], autoreset_mode=AutoresetMode.SAME_STEP
    )


def _model(discrete: bool = False, **options: Any) -> ImprovedSSM:
    torch.manual_seed(3)
    model = ImprovedSSM(
        3, 2, state_dim=5, hidden_dim=8, discrete=discrete, normalize_observations=True, **options
    )
    with torch.no_grad():  # a policy and a value that depend on the state
        model.actor.weight.normal_()
        model.critic.weight.normal_()
    return model.double()


def _trainer(model: ImprovedSSM, **options: Any) -> PPOTrainer:
    return PPOTrainer(model, **{"num_steps": 24, "sequence_length": 6, "seed": 5, **options})


def _by_hand(
    model: ImprovedSSM, rollout: Rollout, env: SyncVectorEnv, seed: int, L: int = 1
) -> dict[str, Tensor]:
    """Plays the rollout's actions again, one row and one step at a time.

    No gradient flows into the state before each `L` steps.
    """
    B, T = rollout.rewards.shape
    columns: dict[str, list[list[Any]]] = {
        name: [[None] * T for _ in range(B)]
        for name in ("log_prob", "value", "next_value", "reward", "terminated", "truncated")
    }
    for b in range(B):
        single = env.envs[b]
        observation, _ = single.reset(seed=seed + b)
        state = model.init_hidden(1)
        for t in range(T):
            if t % L == 0:
                state = state.detach()
            x = torch.tensor(observation, dtype=torch.float64)[None]
            action = rollout.actions[b : b + 1, t]
            log_prob, value, _ = model.evaluate_actions(x[:, None], action[:, None], state)
            _, _, _, state = model(x, state)
            raw = action[0].numpy()
            taken = raw if model.discrete else np.clip(raw, -1.0, 1.0).astype(np.float32)
            observation, reward, terminated, truncated, _ = single.step(taken)
            x = torch.tensor(observation, dtype=torch.float64)[None]
            next_value = torch.zeros(()) if terminated else model(x, state)[2][0]
            columns["log_prob"][b][t] = log_prob[0, 0]
            columns["value"][b][t] = value[0, 0]
            columns["next_value"][b][t] = next_value.detach()
            columns["reward"][b][t] = torch.tensor(reward, dtype=torch.float64)
            columns["terminated"][b][t] = torch.tensor(terminated)
            columns["truncated"][b][t] = torch.tensor(truncated)
            if terminated or truncated:
                observation, _ = single.reset()
                state = model.init_hidden(1)
    return {name: torch.stack([torch.stack(row) for row in c]) for name, c in columns.items()}


def _gae_by_hand(x: dict[str, Tensor], gamma: float, gae_lambda: float) -> Tensor:
    x = {name: column.detach() for name, column in x.items()}
    B, T = x["reward"].shape
    advantages = torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        advantage = 0.0
        for t in reversed(range(T)):
            alive = 0.0 if x["terminated"][b, t] else 1.0
            goes_on = 0.0 if x["terminated"][b, t] or x["truncated"][b, t] else 1.0
            delta = x["reward"][b, t] + gamma * alive * x["next_value"][b, t] - x["value"][b, t]
            advantage = float(delta + gamma * gae_lambda * goes_on * advantage)
            advantages[b, t] = advantage
    return advantages


@pytest.mark.parametrize("discrete", [False, True])
class TestCollectRollout:
    def test_matches_a_loop_over_single_environments(self, discrete: bool) -> None:
        trainer = _trainer(_model(discrete))
        rollout = trainer.collect_rollout(Environment.wrap(_drift(4, discrete)))
        hand = _by_hand(trainer.model, rollout, _drift(4, discrete), trainer.seed)
        assert hand["terminated"].any()
        assert hand["truncated"].any()
        torch.testing.assert_close(rollout.log_probs, hand["log_prob"])
        torch.testing.assert_close(rollout.rewards, hand["reward"])
        assert torch.equal(rollout.terminated, hand["terminated"])
        assert torch.equal(rollout.truncated, hand["truncated"])
        done = hand["terminated"] | hand["truncated"]
        assert rollout.reset[:, 0].all()
        assert torch.equal(rollout.reset[:, 1:], done[:, :-1])
        assert len(rollout.episode_returns) == int(done.sum())

    def test_goes_on_where_it_stopped(self, discrete: bool) -> None:
        whole = _trainer(_model(discrete))
        torch.manual_seed(0)
        expected = whole.collect_rollout(Environment.wrap(_drift(3, discrete)), 24)
        halves = _trainer(_model(discrete))
        env = Environment.wrap(_drift(3, discrete))
        torch.manual_seed(0)
        parts = [halves.collect_rollout(env, 12) for _ in range(2)]
        for name in ("observations", "actions", "log_probs", "rewards", "reset"):
            joined = torch.cat([getattr(part, name) for part in parts], dim=1)
            assert torch.equal(joined, getattr(expected, name)), name
        assert halves.timesteps == whole.timesteps == 72


class TestUpdate:
    @pytest.mark.parametrize("discrete", [False, True])
    @pytest.mark.parametrize("L", [1, 6, 24])
    def test_matches_a_loop_over_single_steps(
        self, discrete: bool, L: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trainer = _trainer(
            _model(discrete),
            sequence_length=L,
            mini_batch_size=1000,
            ppo_epochs=1,
            scale_rewards=False,
            max_grad_norm=1e6,
        )
        rollout = trainer.collect_rollout(Environment.wrap(_drift(4, discrete)))
        monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
        metrics = trainer.update(rollout)

        model = _model(discrete)
        hand = _by_hand(model, rollout, _drift(4, discrete), trainer.seed, L)
        advantages = _gae_by_hand(hand, trainer.gamma, trainer.gae_lambda)
        returns = advantages + hand["value"].detach()
        scaled = (advantages - advantages.mean()) / advantages.std(correction=0)
        ratio = (hand["log_prob"] - rollout.log_probs).exp()
        value_loss = (hand["value"] - returns).square().mean()
        (0.5 * value_loss - (ratio * scaled).mean()).backward()
        expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        (vector,) = trainer.optimizer.param_groups[0]["params"]
        torch.testing.assert_close(vector.grad, expected, rtol=1e-5, atol=1e-8)
        assert metrics["approx_kl"] == pytest.approx(0.0, abs=1e-12)
        assert metrics["clip_fraction"] == 0.0
        assert metrics["value_loss"] == pytest.approx(float(value_loss.detach()), rel=1e-6)
        residual = (returns - hand["value"].detach()).var() / returns.var()
        assert metrics["explained_variance"] == pytest.approx(1.0 - float(residual), rel=1e-5)

    @pytest.mark.parametrize("clip_value_loss", [False, True])
    @pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
    def test_gradients_of_the_loss_equal_autograd(
        self, clip_value_loss: bool, entropy_coef: float
    ) -> None:
        trainer = _trainer(_model(), clip_value_loss=clip_value_loss, entropy_coef=entropy_coef)
        torch.manual_seed(0)
        old, values, returns, advantages = torch.randn(4, 9, 5).double().unbind()
        log_probs = (old + 0.3 * torch.randn_like(old)).requires_grad_()
        now = (values + 0.3 * torch.randn_like(old)).requires_grad_()
        entropies = torch.rand_like(old).requires_grad_()
        nothing = torch.empty(0)
        batch = _Minibatch(
            nothing, nothing, old, nothing, values, returns, advantages, nothing, 1.0
        )
        metrics, gradients = trainer._objective(batch, log_probs, now, entropies)

        ratio = (log_probs - old).exp()
        clipped = ratio.clamp(0.8, 1.2)
        policy_loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
        errors = (now - returns).square()
        if clip_value_loss:
            near = values + (now - values).clamp(-0.2, 0.2)
            errors = torch.maximum(errors, (near - returns).square())
        loss = policy_loss + 0.5 * errors.mean() - entropy_coef * entropies.mean()
        inputs = [log_probs, now, entropies][: len(gradients)]
        assert len(gradients) == (3 if entropy_coef else 2)
        for found, expected in zip(gradients, torch.autograd.grad(loss, inputs), strict=True):
            torch.testing.assert_close(found, expected)
        assert 0.0 < float(metrics[4]) < 1.0
        expected = torch.stack((policy_loss, errors.mean(), entropies.mean())).detach()
        torch.testing.assert_close(metrics[:3], expected)

    @pytest.mark.parametrize("discrete", [False, True])
    def test_ratio_is_one_in_float32_after_training(self, discrete: bool) -> None:
        model = _model(discrete).float()
        trainer = _trainer(model, mini_batch_size=24)
        env = Environment.wrap(_drift(4, discrete))
        trainer.train(env, 500)
        rollout = trainer.collect_rollout(env)
        assert rollout.reset[:, 1:].any()
        assert rollout.initial_state.abs().sum() > 0
        log_probs, _, _ = model.evaluate_actions(
            rollout.observations, rollout.actions, rollout.initial_state, rollout.reset
        )
        torch.testing.assert_close(log_probs, rollout.log_probs, rtol=0.0, atol=1e-5)

    def test_advantages_are_refreshed_each_epoch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for recompute, calls in ((True, 4), (False, 1)):
            trainer = _trainer(_model(), ppo_epochs=4, recompute_advantages=recompute)
            rollout = trainer.collect_rollout(Environment.wrap(_drift(2)))
            found = []
            compute_gae = trainer.compute_gae

            def spy(*x: Tensor, compute: Any = compute_gae, found: Any = found) -> Any:
                found.append(x[1])
                return compute(*x)

            monkeypatch.setattr(trainer, "compute_gae", spy)
            trainer.update(rollout)
            assert len(found) == calls
            assert all(not torch.equal(found[0], later) for later in found[1:])

    def test_minibatches_hold_every_sequence_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer = _trainer(_model(), mini_batch_size=20, ppo_epochs=1, sequence_length=6)
        rollout = trainer.collect_rollout(Environment.wrap(_drift(4)))
        seen = []
        evaluate = trainer.model.evaluate_actions

        def spy(x: Tensor, *rest: Tensor, **options: bool) -> Any:
            seen.append(x)
            return evaluate(x, *rest, **options)

        monkeypatch.setattr(trainer.model, "evaluate_actions", spy)
        inputs = trainer.model.normalize(rollout.observations)
        trainer.update(rollout)
        assert [len(x) for x in seen] == [3, 3, 3, 3, 3, 1]
        found = torch.cat(seen).reshape(16, -1)
        expected = inputs.reshape(16, -1)
        order = [int((expected == row).all(1).nonzero()) for row in found]
        assert sorted(order) == list(range(16))
        assert order != sorted(order)

    @pytest.mark.parametrize(("target_kl", "epochs"), [(None, 6), (1e3, 6), (1e-12, 1)])
    def test_target_kl_ends_the_update(
        self, target_kl: float | None, epochs: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trainer = _trainer(_model(), ppo_epochs=6, mini_batch_size=12, target_kl=target_kl)
        rollout = trainer.collect_rollout(Environment.wrap(_drift(2)))
        orders = []
        minibatches = trainer._minibatches

        def spy(S: int, L: int) -> Any:
            orders.append(S)
            return minibatches(S, L)

        monkeypatch.setattr(trainer, "_minibatches", spy)
        trainer.update(rollout)
        assert orders == [8] * epochs

    def test_learning_rate_follows_the_kl_divergence(self) -> None:
        def rates(desired_kl: float, **options: Any) -> list[float]:
            trainer = _trainer(_model(), desired_kl=desired_kl, learning_rate=1e-4, **options)
            metrics = trainer.train(_drift(2), 48 * 7).metrics  # one of them warms up
            return [row["learning_rate"] for row in metrics]

        steps = 1e-4 * 1.3 ** np.arange(6)
        np.testing.assert_allclose(rates(1e3), steps)
        np.testing.assert_allclose(rates(1e-9), 1e-4 / 1.3 ** np.arange(6))
        trainer = _trainer(_model(), desired_kl=0.01, learning_rate=1e-4)
        for left, kl in ((1.0, 0.01), (0.0, 0.001)):  # inside the band, whose middle is annealed
            trainer._follow_kl(kl, left)
            assert trainer._rate == 1e-4
        trainer._follow_kl(0.01, 0.0)
        assert trainer._rate == pytest.approx(1e-4 / 1.3)
        other = _trainer(_model(), desired_kl=0.01, learning_rate=1e-4)
        other.load_state_dict(trainer.state_dict())
        assert other._rate == trainer._rate
        with pytest.raises(ValueError, match="rate"):
            other.load_state_dict(trainer.state_dict() | {"rate": float("nan")})

    def test_native_gradients_train_as_autograd(self) -> None:
        weights = []
        for impl in ("native", "autograd"):
            model = _model(critic_dim=5)
            trainer = _trainer(model, entropy_coef=0.01, clip_value_loss=True, impl=impl)
            trainer.train(_drift(2), 96)
            assert trainer.gradients.path.startswith(impl)
            copy.deepcopy(trainer)
            weights.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
        torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-12)

    def test_value_clipping_holds_the_value_back(self) -> None:
        changes = []
        for clip_value_loss in (False, True):
            model = _model()
            model.obs_norm = None
            trainer = _trainer(
                model, learning_rate=0.01, ppo_epochs=20, clip_value_loss=clip_value_loss
            )
            rollout = trainer.collect_rollout(Environment.wrap(_drift(2)))
            x = rollout.observations, rollout.initial_state, rollout.reset
            with torch.no_grad():
                before = model(*x)[2]
            trainer.update(rollout)
            with torch.no_grad():
                changes.append(float((model(*x)[2] - before).abs().mean()))
        assert changes[1] < 0.8 * changes[0]

    def test_entropy_bonus_widens_the_policy(self) -> None:
        widths = []
        for entropy_coef in (0.0, 1.0):
            trainer = _trainer(_model(), learning_rate=0.01, entropy_coef=entropy_coef)
            trainer.update(trainer.collect_rollout(Environment.wrap(_drift(2))))
            assert trainer.model.log_std is not None
            widths.append(float(trainer.model.log_std.detach().sum()))
        assert widths[1] > widths[0] + 0.05

    def test_statistics(self) -> None:
        trainer = _trainer(_model(), gamma=0.9)
        norm = trainer.model.obs_norm
        assert norm is not None
        env = Environment.wrap(_drift(3))
        rollouts = []
        for _ in range(2):
            before = norm.mean.clone()
            rollouts.append(trainer.collect_rollout(env))
            assert torch.equal(norm.mean, before)
            trainer.update(rollouts[-1])
        x = torch.cat([r.observations.reshape(-1, 3) for r in rollouts])
        torch.testing.assert_close(norm.mean, x.mean(0))
        torch.testing.assert_close(norm.var, x.var(0, correction=0))
        discounted = []
        running = torch.zeros(3, dtype=torch.float64)
        for r in rollouts:
            for t in range(24):
                running = 0.9 * running * ~r.reset[:, t] + r.rewards[:, t]
                discounted.append(running)
        expected = torch.stack(discounted).var(correction=0)
        torch.testing.assert_close(trainer.return_norm.var[0], expected)


class TestTrain:
    def test_the_call_of_the_older_project(self) -> None:
        model = ImprovedSSM(input_dim=3, action_dim=1)
        trainer = PPOTrainer(
            model,
            learning_rate=3e-4,
            gamma=0.99,
            gae_lambda=0.95,
            clip_epsilon=0.2,
            value_coef=0.5,
            entropy_coef=0.01,
            max_grad_norm=0.5,
            ppo_epochs=2,
            mini_batch_size=64,
            device="cpu",
        )
        before = [p.clone() for p in model.parameters()]
        result = trainer.train(gymnasium.make("Pendulum-v1"), total_timesteps=300, log_interval=1)
        assert all(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
        assert result.timesteps == 300
        assert result.episode_lengths == [200]
        assert all(-2000 < x < 0 for x in result.episode_returns)

    @pytest.mark.parametrize("kind", ["env", "vector", "environment"])
    def test_kinds_of_environment(self, kind: str) -> None:
        env: Any = {
            "env": lambda: gymnasium.make("CartPole-v1"),
            "vector": lambda: gymnasium.make_vec("CartPole-v1", 3, "sync"),
            "environment": lambda: Environment("CartPole-v1", batch_size=3),
        }[kind]()
        model = ImprovedSSM(4, 2, state_dim=4, hidden_dim=8, discrete=True)
        trainer = PPOTrainer(model, num_steps=16, ppo_epochs=1, seed=0)
        metrics: list[dict[str, float]] = []
        result = trainer.train(env, 200, callback=lambda m: metrics.append(m) and None)
        assert result.timesteps == (200 if kind == "env" else 201)  # whole steps of 3 rows
        assert metrics == result.metrics
        assert metrics[0]["learning_rate"] == trainer.learning_rate
        assert metrics[-1]["learning_rate"] == pytest.approx(trainer.learning_rate / len(metrics))
        env.close()

    def test_returns_are_those_of_whole_episodes(self) -> None:
        env = Environment("CartPole-v1", batch_size=2)
        model = ImprovedSSM(4, 2, state_dim=4, hidden_dim=8, discrete=True)
        result = PPOTrainer(model, num_steps=64, seed=0).train(env, 400)
        assert result.episode_returns == [float(n) for n in result.episode_lengths]
        assert len(result.episode_returns) > 5

    @pytest.mark.parametrize(
        ("options", "B", "limit", "expected"),
        [
            ({}, 8, 1000, 20),  # the defaults
            ({}, 64, 1000, 157),  # 20 iterations would be 640 steps: no episode would end
            ({"checkpoint_interval": 200}, 64, 1000, 200),
            ({"num_steps": 40}, 2, 200, 25),
        ],
    )
    def test_reset_interval(
        self, options: dict[str, Any], B: int, limit: int, expected: int
    ) -> None:
        trainer = PPOTrainer(ImprovedSSM(3, 1), **options)
        with Environment("Pendulum-v1", B, max_episode_steps=limit) as env:
            assert trainer.reset_interval(env) == expected
        with Environment.wrap(_drift(2)) as env:  # without a limit
            assert trainer.reset_interval(env) == trainer.checkpoint_interval

    def test_episodes_end_between_resets(self) -> None:
        model = ImprovedSSM(3, 1, state_dim=4, hidden_dim=8)
        trainer = PPOTrainer(model, num_steps=8, ppo_epochs=1, checkpoint_interval=2, seed=0)
        with Environment("Pendulum-v1", 2, max_episode_steps=20) as env:
            resets: list[int] = []
            begin = trainer._begin

            def spy(env: Environment, seed: int) -> None:
                resets.append(trainer.iteration)
                begin(env, seed)

            trainer._begin = spy
            # 13 iterations of 8 steps an interval: 5 episodes a row and 4 steps left over
            assert trainer.timesteps_for(env, 10) == 13 * 16
            assert trainer.timesteps_for(env, 11) == (13 + 3) * 16
            result = trainer.train(env, trainer.timesteps_for(env, 23))
        assert resets == [0, 13, 26]
        assert len(result.episode_returns) == 24
        assert len(result.episode_returns) - result.metrics[-1]["episodes"] < 23

    def test_episodes_after_the_ones_of_an_ended_run(self) -> None:
        trainer = PPOTrainer(ImprovedSSM(3, 1), num_steps=8, checkpoint_interval=2)
        with Environment("Pendulum-v1", 2, max_episode_steps=20) as env:
            trainer.iteration = 13  # at a reset: nothing is lost
            assert trainer.timesteps_for(env, 23, ended=10) == trainer.timesteps_for(env, 23)
            assert trainer.timesteps_for(env, 23, ended=0) == (13 + 31) * 16
            trainer.iteration = 3  # until the next reset 4 episodes a row
            assert trainer.timesteps_for(env, 10, ended=2) == (3 + 10) * 16
            assert trainer.timesteps_for(env, 10, ended=1) == (13 + 3) * 16

    def test_a_flag_of_numpy_is_one_of_python(self, tmp_path: Path) -> None:
        _, trainer = _resumable("CartPole-v1", anneal_lr=np.bool_(True))
        trainer.save(tmp_path / "state.pt")
        _resumable("CartPole-v1")[1].load(tmp_path / "state.pt")
        with pytest.raises(TypeError, match="scale_rewards must be a bool, got str"):
            PPOTrainer(trainer.model, scale_rewards="False")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        with pytest.raises(TypeError, match=f"float32 or float64 to train, got {dtype}"):
            PPOTrainer(ImprovedSSM(3, 1).to(dtype))

    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    def test_a_model_that_is_wrapped(self) -> None:
        for wrapped in (torch.compile(_model()), torch.nn.DataParallel(_model())):
            with pytest.raises(TypeError, match=r"an ImprovedSSM, got .*: give the model"):
                PPOTrainer(wrapped)

    @pytest.mark.parametrize("part", ["model", "optimizer"])
    def test_a_part_that_is_replaced(self, part: str) -> None:
        env, trainer = _resumable("Pendulum-v1")
        rollout = trainer.collect_rollout(env)
        if part == "model":
            trainer.model = copy.deepcopy(trainer.model)
        else:
            trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
        with pytest.raises(ValueError, match="must keep the optimizer, the model"):
            trainer.train(env, 64)
        with pytest.raises(ValueError, match="must keep the optimizer, the model"):
            trainer.update(rollout)

    def test_frozen_parameters(self) -> None:
        env, trainer = _resumable("Pendulum-v1")
        model = trainer.model
        model.log_std.requires_grad_(False)
        before = model.log_std.clone(), model.actor.weight.clone()
        PPOTrainer(model, entropy_coef=0.01, num_steps=32, seed=0).train(env, 64)
        assert torch.equal(model.log_std, before[0])
        assert not torch.equal(model.actor.weight, before[1])
        with pytest.raises(ValueError, match="must have parameters that require gradients"):
            PPOTrainer(model.requires_grad_(False))

    @pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
    def test_learns_where_no_gradients_are_recorded(self, env_id: str) -> None:
        env, trainer = _resumable(env_id)
        with torch.no_grad():
            trainer.train(env, 64)
        env, other = _resumable(env_id)
        other.train(env, 64)
        _assert_same(other.model.state_dict(), trainer.model.state_dict())

    @pytest.mark.parametrize(
        ("options", "B"), [({"mini_batch_size": 1}, 2), ({"num_steps": 1, "sequence_length": 1}, 1)]
    )
    def test_minibatches_of_one_step(self, options: dict[str, Any], B: int) -> None:
        with pytest.raises(ValueError, match="a minibatch must have 2 steps or more"):
            PPOTrainer(ImprovedSSM(3, 1), **options).train(Environment("Pendulum-v1", B), 64)

    def test_staggered_resets(self) -> None:
        trainer = PPOTrainer(ImprovedSSM(3, 1), staggered_resets=True)
        with Environment("Pendulum-v1", 4, max_episode_steps=20) as env:
            ends = trainer.collect_rollout(env, 40).truncated.nonzero().tolist()
        assert ends == [
            [row, t] for row, first in enumerate((19, 14, 9, 4)) for t in (first, first + 20)
        ]
        with pytest.raises(ValueError, match="staggered_resets needs a time limit"):
            trainer.collect_rollout(Environment.wrap(_drift(2)))

    def test_counts_steps_exactly(self, monkeypatch: pytest.MonkeyPatch) -> None:
        taken, learnt, rates, rows = {}, {}, {}, {}
        for total in (158, 192):  # the last rollout has 7 steps, or is whole
            trainer = _trainer(_model(), mini_batch_size=12)
            sequences: list[tuple[int, int]] = []
            minibatches = trainer._minibatches

            def spy(S: int, L: int, seen: Any = sequences, minibatches: Any = minibatches) -> Any:
                seen.append((S, L))
                return minibatches(S, L)

            monkeypatch.setattr(trainer, "_minibatches", spy)
            metrics = trainer.train(_drift(2), total).metrics
            taken[total] = [row["timesteps"] for row in metrics]
            learnt[total] = sequences[:: trainer.ppo_epochs]
            rates[total] = [row["learning_rate"] / trainer.learning_rate for row in metrics]
            rows[total] = [{k: x for k, x in m.items() if "second" not in k} for m in metrics]
        assert taken == {158: [96, 144, 158], 192: [96, 144, 192]}
        assert learnt == {158: [(8, 6), (8, 6), (2, 6)], 192: [(8, 6)] * 3}
        assert rates[158] == rates[192] == [1.0, 0.75, 0.5]
        _assert_same(rows[158][:2], rows[192][:2])
        assert rows[158][2]["policy_loss"] != rows[192][2]["policy_loss"]

    def test_one_step_of_each_environment(self) -> None:
        result = _trainer(_model()).train(_drift(2), 1)
        assert (result.timesteps, result.iterations) == (2, 1)

    def test_a_second_call_goes_on(self) -> None:
        trainer = _trainer(_model())
        for timesteps in (96, 192):  # the first call warms the norm up
            result = trainer.train(_drift(2), 96)
            assert result.timesteps == timesteps
        assert result.iterations == 3
        assert result.metrics[0]["learning_rate"] == trainer.learning_rate

    def test_same_seed_same_weights(self) -> None:
        models = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed + 10)  # of no influence
            model = _model()
            before = torch.get_rng_state()
            _trainer(model, seed=seed).train(_drift(2), 96)
            assert torch.equal(torch.get_rng_state(), before)
            models.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert torch.equal(models[0], models[1])
        assert not torch.equal(models[0], models[2])

    def test_a_seed_determines_a_run_beside_others(self) -> None:
        alone = _trainer(_model(), seed=1)
        alone.train(_drift(2), 192)
        trainers = [_trainer(_model(), seed=seed) for seed in (1, 2)]
        turn = threading.Barrier(2, timeout=60.0)

        def train(trainer: PPOTrainer) -> None:
            def draw(metrics: dict[str, float]) -> None:
                torch.rand(3)  # as whoever else uses torch's global generator
                turn.wait()

            trainer.train(_drift(2), 192, callback=draw)

        with ThreadPoolExecutor() as pool:
            list(pool.map(train, trainers))
        _assert_same(trainers[0].model.state_dict(), alone.model.state_dict())

    def test_learns_cart_pole(self) -> None:
        torch.manual_seed(0)
        model = ImprovedSSM(4, 2, state_dim=16, hidden_dim=32, num_layers=1, discrete=True)
        trainer = PPOTrainer(model, learning_rate=2e-3, num_steps=64, mini_batch_size=256, seed=0)
        result = trainer.train(Environment("CartPole-v1", batch_size=16), 25_000)
        assert np.mean(result.episode_returns[:20]) < 40
        assert np.mean(result.episode_returns[-20:]) >= 200

    @pytest.mark.parametrize(
        ("model", "match"),
        [
            (
                ImprovedSSM(4, 2),
                "SyncVectorEnv has 3 observations and 2 continuous actions, the model is for 4",
            ),
            (ImprovedSSM(3, 3), "2 continuous actions, the model is for .* 3 continuous actions"),
            (ImprovedSSM(3, 2, discrete=True), "the model is for 3 observations and 2 discrete"),
        ],
    )
    def test_another_model(self, model: ImprovedSSM, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            PPOTrainer(model).train(_drift(2), 100)

    @pytest.mark.parametrize(
        ("rows", "length", "steps"),
        [
            *((1, None, 2048), (3, None, 680), (5, None, 408), (64, None, 32), (300, None, 6)),
            *((12, 16, 160), (300, 16, 16)),
        ],
    )
    def test_usual_rollouts_hold_whole_sequences(
        self, rows: int, length: int | None, steps: int
    ) -> None:
        trainer = PPOTrainer(ImprovedSSM(3, 2, 4, 8), sequence_length=length)
        with Environment("ssm_fast/CartPoleFamily-v0", rows) as env:
            assert trainer._steps_of(env) == steps
        assert trainer._sequence_length_for(steps) == (length or min(8, steps))

    def test_ranges(self) -> None:
        for options, match in (
            ({"gamma": 1.1}, r"gamma must be finite and in \[0, 1\], got 1.1"),
            ({"learning_rate": 0.0}, "learning_rate must be finite and positive, got 0.0"),
            ({"learning_rate": math.nan}, "learning_rate must be finite and positive, got nan"),
            ({"ppo_epochs": 0}, "ppo_epochs must be at least 1, got 0"),
            ({"sequence_length": 0}, "sequence_length must be at least 1, got 0"),
        ):
            with pytest.raises(ValueError, match=match):
                PPOTrainer(_model(), **options)
        with pytest.raises(ValueError, match="num_steps must be a multiple of sequence_length = 5"):
            _trainer(_model(), sequence_length=5).train(_drift(2), 100)


class TestFailures:
    def test_warns_of_actions_far_from_its_own(self) -> None:
        env = _drift(2)
        env.single_action_space = gymnasium.spaces.Box(0.0, 1000.0, (2,))
        env.envs[0].action_space = env.single_action_space
        with pytest.warns(UserWarning, match=r"actions lies in \[0, 1000\].*RescaleAction"):
            _trainer(_model()).train(env, 48)

    def test_nan_from_an_environment(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path)
        trainer = _trainer(_model().float(), checkpoint_interval=1)
        trainer.model.obs_norm.update(torch.zeros(2, 3))
        env = Environment.wrap(_drift(3, nan_row=1, nan_at=24 * 2 + 4))
        with pytest.raises(
            FloatingPointError, match=r"iteration 2: rollout step 3: .*environment 1.*observation"
        ):
            trainer.train(env, 10_000, run=run)
        checkpoint = run.latest_checkpoint()
        assert checkpoint is not None
        assert checkpoint.iteration == 2
        assert load_model(run.model_path, ImprovedSSM).obs_norm is not None

    def test_a_gradient_that_overflows(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path)
        trainer = _trainer(_model().float(), checkpoint_interval=1)

        def spoil(metrics: dict[str, float]) -> None:
            if metrics["iteration"] == 2:
                with torch.no_grad():
                    trainer.model.critic.weight.fill_(1e25)

        with pytest.raises(FloatingPointError, match=r"iteration 2: epoch 0: loss inf"):
            trainer.train(_drift(2), 10_000, run=run, callback=spoil)
        trainer.load_state_dict(run.latest_checkpoint().state)
        assert trainer.iteration == 2

    @pytest.mark.parametrize("discrete", [False, True])
    @pytest.mark.parametrize("part", ["actor", "critic"])
    def test_a_policy_that_is_not_finite(self, discrete: bool, part: str) -> None:
        trainer = _trainer(_model(discrete))

        def spoil(metrics: dict[str, float]) -> None:
            with torch.no_grad():
                getattr(trainer.model, part).weight.fill_(math.nan)

        with pytest.raises(
            FloatingPointError,
            match=r"iteration 1: rollout step 0: SyncVectorEnv: the policy of environment 0 is not",
        ):
            trainer.train(_drift(2, discrete), 10_000, callback=spoil)

    def test_a_state_that_overflowed_does_not_outlive_its_episode(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trainer = _trainer(_model())
        get_action = trainer.model.get_action
        states: list[Tensor] = []

        def overflow(x: Tensor, state: Tensor, noise: Tensor) -> Any:
            states.append(state)
            action, log_prob, value, after = get_action(x, torch.zeros_like(state), noise=noise)
            return action, log_prob, value, torch.full_like(after, math.inf)

        monkeypatch.setattr(trainer.model, "get_action", overflow)
        rollout = trainer.collect_rollout(Environment.wrap(_drift(2)))
        assert rollout.reset[:, 1:].any()
        for t, state in enumerate(states):
            assert torch.equal(state[0, :, 0] == 0.0, rollout.reset[:, t])

    def test_a_weight_that_overflows(self) -> None:
        trainer = _trainer(_model().float(), learning_rate=1e39)
        with pytest.raises(FloatingPointError, match=r"after the update|gradient norm"):
            trainer.train(_drift(2), 10_000)


_STEPS = 488  # of the trainers below: a warm-up of 64, 6 rollouts of 64, and a last one of 40
_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_ppo_trainer import _resumable
from ssm_fast.meta_rl.run import RunDirectory, write_state
env, trainer = _resumable(sys.argv[2])
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[4] == "write":
    import ssm_fast.meta_rl.run as run
    replace = os.replace
    def killed(source, target):
        if "iteration_00000004" in str(target):
            kill()
        replace(source, target)
    run.os.replace = killed
def callback(metrics):
    if metrics["iteration"] == 5:
        kill()
trainer.train(env, 488, run=RunDirectory(sys.argv[3]), callback=callback)
"""


def _resumable(env_id: str, **more: Any) -> tuple[Environment, PPOTrainer]:
    # five episodes of 12 steps fit into the two iterations between checkpoints
    env = Environment(env_id, batch_size=2, max_episode_steps=12)
    torch.manual_seed(7)
    model = ImprovedSSM(
        env.input_dim,
        env.action_dim,
        state_dim=8,
        hidden_dim=16,
        discrete=env.discrete,
        normalize_observations=True,
    )
    options = {"num_steps": 32, "checkpoint_interval": 2, "seed": 11, **more}
    return env, PPOTrainer(model, ppo_epochs=2, mini_batch_size=32, **options)


def _outcome(trainer: PPOTrainer, run: RunDirectory) -> dict[str, Any]:
    """All that must not depend on an interruption."""
    state = trainer.state_dict()
    del state["seconds"]
    rows = run.read_rows()
    for row in rows:
        del row["seconds"], row["steps_per_second"]
    return {"state": state, "rows": rows}


def _assert_same(x: Any, y: Any, path: str = "") -> None:
    assert type(x) is type(y), path
    if isinstance(x, Tensor):
        assert torch.equal(x, y), path
    elif isinstance(x, dict):
        assert list(x) == list(y), path
        for key in x:
            _assert_same(x[key], y[key], f"{path}/{key}")
    elif isinstance(x, list):
        assert len(x) == len(y), path
        for i in range(len(x)):
            _assert_same(x[i], y[i], f"{path}/{i}")
    elif isinstance(x, float):
        np.testing.assert_equal(x, y)  # NaN equals NaN
    else:
        assert x == y, path


class TestResume:
    @pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "InvertedPendulum-v5"])
    def test_equals_the_uninterrupted_run(self, env_id: str, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path / "whole")
        env, trainer = _resumable(env_id)
        trainer.train(env, _STEPS, run=run)
        assert trainer.iteration == 7
        whole = _outcome(trainer, run)

        run = RunDirectory(tmp_path / "parts")
        for stop_at, starts_at in ((1, 0), (3, 1), (4, 3), (5, 4), (99, 5)):
            env, trainer = _resumable(env_id)
            metrics: list[dict[str, float]] = []

            def callback(
                m: dict[str, float], stop_at: int = stop_at, metrics: Any = metrics
            ) -> None:
                metrics.append(m)
                torch.rand(1)  # as a policy does that is watched
                if m["iteration"] == stop_at:
                    raise KeyboardInterrupt

            with suppress(KeyboardInterrupt):
                trainer.train(env, _STEPS, run=run, resume=True, callback=callback)
            assert metrics[0]["iteration"] == starts_at + 1
        _assert_same(_outcome(trainer, run), whole)

    @pytest.mark.parametrize("moment", ["iteration", "write"])
    @pytest.mark.parametrize("env_id", ["CartPole-v1", "InvertedPendulum-v5"])
    def test_after_a_kill(self, env_id: str, moment: str, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path / "whole")
        env, trainer = _resumable(env_id)
        trainer.train(env, _STEPS, run=run)
        whole = _outcome(trainer, run)

        folder = str(Path(__file__).parent)
        arguments = [folder, env_id, str(tmp_path / "killed"), moment]
        killed = subprocess.run(
            [sys.executable, "-c", _KILLED, *arguments],
            capture_output=True,
            check=False,
            cwd=tmp_path,  # not the source tree, which a child would import instead of the package
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        run = RunDirectory(tmp_path / "killed", resume=True)
        checkpoint = run.latest_checkpoint()
        assert checkpoint is not None
        assert checkpoint.iteration == (4 if moment == "iteration" else 2)
        env, trainer = _resumable(env_id)
        trainer.train(env, _STEPS, run=run, resume=True)
        _assert_same(_outcome(trainer, run), whole)

    def test_other_settings(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path)
        env, trainer = _resumable("CartPole-v1")
        trainer.train(env, 64, run=run)
        trainer = PPOTrainer(trainer.model, seed=12)
        with pytest.raises(ValueError, match=r"iteration_.*ppo_epochs must be 2 as in the run"):
            trainer.train(env, 64, run=run, resume=True)

    def test_another_batch_size(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path)
        env, trainer = _resumable("CartPole-v1")
        trainer.train(env, 64, run=run)
        with pytest.raises(ValueError, match=r"batch_size must be 2 as in the run .* got 3"):
            trainer.train(Environment("CartPole-v1", batch_size=3), 64, run=run, resume=True)

    def test_a_file_that_a_callback_saves(self, tmp_path: Path) -> None:
        env, trainer = _resumable("Pendulum-v1")

        def callback(metrics: dict[str, float]) -> None:
            if metrics["iteration"] == 4:  # where a checkpoint is due
                trainer.save(tmp_path / "state.pt")

        trainer.train(env, 5 * 64, callback=callback)  # one of them warms up
        trainer.train(env, 2 * 64)
        env, other = _resumable("Pendulum-v1")
        other.load(tmp_path / "state.pt")
        other.train(env, 2 * 64)
        _assert_same(other.model.state_dict(), trainer.model.state_dict())

    @pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda trainer: pickle.loads(pickle.dumps(trainer))]
    )
    def test_a_copy_learns_on_its_own(self, env_id: str, copied: Any, tmp_path: Path) -> None:
        env, trainer = _resumable(env_id)
        trainer.train(env, 64)
        trainer.save(tmp_path / "state.pt")
        other = copied(trainer)
        before = copy.deepcopy(trainer.model.state_dict())
        other.train(_resumable(env_id)[0], 128)
        _assert_same(trainer.model.state_dict(), before)
        trainer.train(env, 128)
        _assert_same(other.model.state_dict(), trainer.model.state_dict())
        with pytest.raises(AssertionError):
            _assert_same(other.model.state_dict(), before)
        other.load(tmp_path / "state.pt")
        other.train(env, 128)
        _assert_same(other.model.state_dict(), trainer.model.state_dict())

    def test_a_file_goes_on_with_any_number_of_environments(self, tmp_path: Path) -> None:
        env, trainer = _resumable("CartPole-v1")
        trainer.train(env, 64)
        trainer.save(tmp_path / "state.pt")
        trainer.train(Environment("CartPole-v1", batch_size=3), 96)
        trainer.load(tmp_path / "state.pt")
        assert trainer.iteration == 1
        assert trainer.train(Environment("CartPole-v1", batch_size=3), 96).iterations == 2

    def test_a_file_of_an_older_version(self, tmp_path: Path) -> None:
        env, trainer = _resumable("CartPole-v1")
        trainer.train(env, 64)
        state = trainer.state_dict()
        assert state.pop("batch_size") == 2
        assert state["settings"].pop("staggered_resets") is False
        write_state(tmp_path / "state.pt", state)
        trainer.train(env, 64)
        trainer.load(tmp_path / "state.pt")
        assert trainer.iteration == 1
        trainer.load_state_dict(state)
        assert trainer.train(env, 64).iterations == 2

    def test_another_model(self, tmp_path: Path) -> None:
        _, trainer = _resumable("CartPole-v1")
        trainer.save(tmp_path / "state.pt")
        trainer.model.add_module("more", torch.nn.Linear(2, 2))
        with pytest.raises(ValueError, match=r"training state does not fit: .*more\.weight"):
            trainer.load(tmp_path / "state.pt")

    @pytest.mark.parametrize("key", ["model", "optimizer", "settings", "shuffle", "timesteps"])
    def test_an_incomplete_state(self, key: str) -> None:
        _, trainer = _resumable("CartPole-v1")
        for value in (None, {}, "x"):
            with pytest.raises(ValueError, match="training state does not fit"):
                trainer.load_state_dict({**trainer.state_dict(), key: value})

    def test_resume_needs_a_run(self) -> None:
        env, trainer = _resumable("CartPole-v1")
        with pytest.raises(ValueError, match="resume needs the run to continue"):
            trainer.train(env, 64, resume=True)

    def test_the_saved_model_knows_its_environment(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path)
        env, trainer = _resumable("Pendulum-v1")
        trainer.train(env, 64, run=run)
        assert read_metadata(run.model_path) == {
            "env_id": "Pendulum-v1",
            "action_low": "[-2.0]",
            "action_high": "[2.0]",
        }
        _assert_same(
            dict(load_model(run.model_path, ImprovedSSM).state_dict()),
            dict(trainer.model.state_dict()),
        )
