from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor

from ssm_fast.checkpoint import load_model, read_metadata
from ssm_fast.core.ssm import StateSpaceModel
from ssm_fast.env_runner.environment import Environment
from ssm_fast.meta_rl import policy_gradient_trainer
from ssm_fast.meta_rl.policy_gradient_trainer import Episodes, PolicyGradientTrainer
from ssm_fast.meta_rl.run import RunDirectory

pytestmark = [pytest.mark.isa_independent, pytest.mark.usefixtures("one_thread")]


def _model(**options: Any) -> StateSpaceModel:
    torch.manual_seed(1)
    model = StateSpaceModel(**{"state_dim": 6, "hidden_dim": 8, **options})
    with torch.no_grad():  # a policy that depends on the state
        model.C[2].weight.normal_()
    return model


def _episodes(trainer: PolicyGradientTrainer, B: int = 5, count: int | None = None) -> Episodes:
    with Environment("CartPole-v1", B) as env:
        return trainer.collect_episodes(env, count)


class TestCollectEpisodes:
    def test_rows_are_episodes_of_gymnasium(self) -> None:
        trainer = PolicyGradientTrainer(_model(), seed=4)
        episodes = _episodes(trainer)
        lengths = episodes.valid.sum(1).tolist()
        assert len(set(lengths)) > 1, "the episodes must differ in length"
        assert episodes.valid.shape == (5, max(lengths))
        seed = int(np.random.SeedSequence((4, 0)).generate_state(2)[0] >> 1)
        for b, length in enumerate(lengths):
            env = gymnasium.make("CartPole-v1")
            x, _ = env.reset(seed=seed + b)
            for t in range(length):
                torch.testing.assert_close(episodes.observations[b, t], torch.tensor(x))
                x, reward, terminated, truncated, _ = env.step(int(episodes.actions[b, t]))
                assert float(episodes.rewards[b, t]) == reward
                assert bool(episodes.terminated[b, t]) == terminated == (t == length - 1)
                assert bool(episodes.truncated[b, t]) == truncated is False
            env.close()
            assert episodes.valid[b].tolist() == [t < length for t in range(max(lengths))]
            assert not episodes.rewards[b, length:].any()
            assert not episodes.terminated[b, length:].any()

    def test_time_limit_is_a_truncation(self) -> None:
        trainer = PolicyGradientTrainer(_model(), seed=4)
        with Environment("CartPole-v1", 3, max_episode_steps=5) as env:
            episodes = trainer.collect_episodes(env)
        assert episodes.truncated.sum(1).tolist() == [1, 1, 1]
        assert episodes.truncated[:, -1].all()
        assert not episodes.terminated.any()

    def test_without_a_time_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(policy_gradient_trainer, "_LONGEST_EPISODE", 30)
        trainer = PolicyGradientTrainer(_model(), seed=4)
        limited = _episodes(trainer, 8)
        env = SyncVectorEnv([CartPoleEnv] * 8, autoreset_mode=AutoresetMode.SAME_STEP)
        with pytest.warns(UserWarning, match="has no time limit: episodes end after 30 steps"):
            episodes = trainer.collect_episodes(Environment.wrap(env))
        lengths = limited.valid.sum(1)
        assert (lengths > 30).any()
        assert (lengths < 30).any()
        assert torch.equal(episodes.valid.sum(1), lengths.clamp(max=30))
        assert torch.equal(episodes.truncated.sum(1), (lengths > 30).long())
        assert torch.equal(episodes.observations, limited.observations[:, :30])

    def test_episodes_follow_from_seed_and_iteration(self) -> None:
        trainer = PolicyGradientTrainer(_model(), seed=4)
        first, again = _episodes(trainer), _episodes(trainer)
        torch.testing.assert_close(first.observations, again.observations, rtol=0, atol=0)
        assert torch.equal(first.actions, again.actions)
        trainer.iteration = 1
        assert not torch.equal(first.observations[:, 0], _episodes(trainer).observations[:, 0])

    def test_fewer_episodes_than_environments(self) -> None:
        trainer = PolicyGradientTrainer(_model(), seed=4)
        few, all_of_them = _episodes(trainer, count=2), _episodes(trainer)
        T = few.valid.shape[1]
        assert few.valid.shape[0] == 2
        assert torch.equal(few.valid, all_of_them.valid[:2, :T])
        assert torch.equal(few.actions[few.valid], all_of_them.actions[:2, :T][few.valid])

    def test_actions_have_the_probabilities_of_the_policy(self) -> None:
        model = _model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model.C[2].bias.copy_(torch.tensor([0.0, math.log(3.0)]))
        trainer = PolicyGradientTrainer(model, seed=0)
        taken: list[Tensor] = []
        with Environment("CartPole-v1", 64) as env:
            for trainer.iteration in range(4):
                episodes = trainer.collect_episodes(env)
                taken.append(episodes.actions[episodes.valid])
        share = torch.cat(taken).double()
        error = 4.0 * math.sqrt(0.25 * 0.75 / len(share))
        assert float(share.mean()) == pytest.approx(0.75, abs=error)


class TestUpdate:
    def test_advantages_match_a_loop(self) -> None:
        trainer = PolicyGradientTrainer(_model().double(), gamma=0.9, seed=4)
        episodes = _episodes(trainer)
        lengths = episodes.valid.sum(1).tolist()
        returns: list[list[float]] = []
        for b, length in enumerate(lengths):
            row = [0.0] * length
            later = 0.0
            for t in reversed(range(length)):
                row[t] = later = float(episodes.rewards[b, t]) + 0.9 * later
            returns.append(row)
        every = np.concatenate(returns)
        got = trainer.compute_advantages(episodes)
        alone = 0
        for b, row in enumerate(returns):
            for t in range(max(lengths)):
                if t >= len(row):
                    assert float(got[b, t]) == 0.0
                    continue
                others = [r[t] for c, r in enumerate(returns) if c != b and t < len(r)]
                alone += not others
                baseline = np.mean(others) if others else row[t]
                want = (row[t] - baseline) / every.std()
                assert float(got[b, t]) == pytest.approx(want, rel=1e-6, abs=1e-6)
        assert alone, "the longest episode must be alone at its end"

    def test_one_episode_is_measured_by_its_mean(self) -> None:
        trainer = PolicyGradientTrainer(_model().double(), gamma=1.0, seed=4)
        advantages = trainer.compute_advantages(_episodes(trainer, 1))
        T = advantages.shape[1]
        returns = np.arange(T, 0, -1.0)
        want = (returns - returns.mean()) / returns.std()
        np.testing.assert_allclose(advantages[0], want, rtol=1e-6)

    def test_equal_episodes_teach_nothing(self) -> None:
        trainer = PolicyGradientTrainer(_model(), seed=4)
        with Environment("CartPole-v1", 3, max_episode_steps=5) as env:
            advantages = trainer.compute_advantages(trainer.collect_episodes(env))
        torch.testing.assert_close(advantages, torch.zeros(3, 5), rtol=0, atol=1e-6)

    def test_gradient_matches_a_loop_over_single_steps(self) -> None:
        model = _model().double()
        trainer = PolicyGradientTrainer(model, max_grad_norm=1e9, entropy_coef=0.3, seed=4)
        episodes = _episodes(trainer)
        advantages = trainer.compute_advantages(episodes)
        loss = torch.zeros((), dtype=torch.float64)
        entropy = torch.zeros((), dtype=torch.float64)
        for b, length in enumerate(episodes.valid.sum(1).tolist()):
            state = model.init_hidden(1)
            for t in range(length):
                logits, state = model(episodes.observations[b : b + 1, t], state)
                policy = torch.distributions.Categorical(logits=logits[0])
                loss = loss - policy.log_prob(episodes.actions[b, t]) * advantages[b, t]
                entropy = entropy + policy.entropy()
        steps = episodes.valid.sum()
        want = torch.autograd.grad((loss - 0.3 * entropy) / steps, list(model.parameters()))
        metrics = trainer.update(episodes)
        for parameter, gradient in zip(model.parameters(), want, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-10)
        assert metrics["policy_loss"] == pytest.approx(float(loss.detach() / steps))
        assert metrics["entropy"] == pytest.approx(float(entropy.detach() / steps))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in want))
        assert metrics["grad_norm"] == pytest.approx(norm)

    def test_transition_matrix_learns_more_slowly(self) -> None:
        model = _model().double()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = PolicyGradientTrainer(model, 1e-2, recurrent_lr_scale=0.05, seed=4)
        with Environment("CartPole-v1", 4) as env:
            trainer.train(env, 4)
        moved = {
            name: float((p.detach() - before[name]).abs().max())
            for name, p in model.named_parameters()
        }
        # the first step of Adam moves an entry by the learning rate
        assert moved["A"] == pytest.approx(5e-4, rel=1e-3)
        assert moved["B"] == pytest.approx(1e-2, rel=1e-3)


class TestTrain:
    def test_counts_episodes(self) -> None:
        trainer = PolicyGradientTrainer(_model(), seed=4)
        with Environment("CartPole-v1", 4) as env:
            result = trainer.train(env, 10)
            assert [m["episodes"] for m in result.metrics] == [4.0, 4.0, 2.0]
            assert len(result.episode_returns) == len(result.episode_lengths) == 10
            assert result.episode_returns == result.episode_lengths  # CartPole pays 1 a step
            assert result.timesteps == sum(result.episode_lengths)
            last = result.metrics[-1]
            assert last["episode_return"] == np.mean(result.episode_returns[-2:])
            assert last["timesteps"] == result.timesteps
            rates = [m["learning_rate"] for m in result.metrics]
            assert rates == pytest.approx([5e-3, 3e-3, 1e-3])
            more = trainer.train(env, 3)
        assert (more.iterations, trainer.episodes) == (4, 13)
        assert more.metrics[0]["learning_rate"] == 5e-3

    def test_a_single_gymnasium_environment(self) -> None:
        trainer = PolicyGradientTrainer(_model(), anneal_lr=False, seed=4)
        env = gymnasium.make("CartPole-v1")
        result = trainer.train(env, 3)
        env.close()
        assert result.iterations == 3
        assert [m["learning_rate"] for m in result.metrics] == [5e-3] * 3

    def test_callback_stops(self, tmp_path: Path) -> None:
        trainer = PolicyGradientTrainer(_model(), seed=4)
        with Environment("CartPole-v1", 2) as env, RunDirectory(tmp_path / "run") as run:
            trainer.train(env, 20, callback=lambda m: m["iteration"] < 3, run=run)
            checkpoint = run.latest_checkpoint()
        assert trainer.episodes == 6
        assert checkpoint is not None
        assert checkpoint.iteration == 3

    def test_learns_cart_pole(self) -> None:
        torch.manual_seed(0)
        trainer = PolicyGradientTrainer(StateSpaceModel(), seed=0)
        with Environment("CartPole-v1", 8) as env:
            result = trainer.train(env, 160)
        first, last = result.metrics[0]["episode_return"], result.metrics[-1]["episode_return"]
        assert first < 40
        assert last > 80
        assert float(torch.linalg.eigvals(trainer.model.A.detach()).abs().max()) < 1.0


class Picture(gymnasium.Env[Any, Any]):
    observation_space = gymnasium.spaces.Box(0, 255, (32, 32, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        return np.zeros((32, 32, 3), np.uint8), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.reset()[0], 1.0, True, False, {}


class TestFailures:
    def test_warns_of_pictures(self) -> None:
        trainer = PolicyGradientTrainer(_model(input_dim=3072, output_dim=2))
        with pytest.warns(UserWarning, match=r"Picture: .*\[32, 32, 3\] are flattened to 3,072"):
            trainer.train(Picture(), 2)

    @pytest.mark.parametrize(
        ("env_id", "options", "match"),
        [
            ("Pendulum-v1", {"input_dim": 3, "output_dim": 1}, r"Discrete action .*Box\(-2"),
            ("CartPole-v1", {"input_dim": 3}, "CartPole-v1 has 4 observations .* is for 3"),
            ("CartPole-v1", {"output_dim": 3}, "has .* 2 discrete actions, .* and 3 discrete"),
        ],
    )
    def test_another_environment(self, env_id: str, options: dict[str, int], match: str) -> None:
        with Environment(env_id) as env, pytest.raises(ValueError, match=match):
            PolicyGradientTrainer(_model(**options)).train(env, 1)

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("learning_rate", 0.0),
            ("learning_rate", math.nan),
            ("learning_rate", math.inf),
            ("gamma", 1.1),
            ("gamma", -0.1),
            ("entropy_coef", -1.0),
            ("max_grad_norm", 0.0),
            ("recurrent_lr_scale", -0.1),
            ("checkpoint_interval", 0),
            ("seed", -1),
        ],
    )
    def test_ranges(self, option: str, value: float) -> None:
        with pytest.raises(
            ValueError, match=f"{option} must be (finite and|at least) .*, got {value}"
        ):
            PolicyGradientTrainer(_model(), **{option: value})

    def test_numbers_of_train(self) -> None:
        trainer = PolicyGradientTrainer(_model())
        with Environment("CartPole-v1") as env:
            with pytest.raises(ValueError, match="total_episodes must be at least 1, got 0"):
                trainer.train(env, 0)
            with pytest.raises(ValueError, match="log_interval must be at least 1, got 0"):
                trainer.train(env, 1, log_interval=0)
            with pytest.raises(ValueError, match="resume needs the run"):
                trainer.train(env, 1, resume=True)

    def test_nan_leaves_the_last_checkpoint(self, tmp_path: Path) -> None:
        class Poisoned(gymnasium.Wrapper[Any, Any, Any, Any]):
            steps = 0

            def step(self, action: Any) -> Any:
                obs, *rest = super().step(action)
                self.steps += 1
                return (obs * np.nan if self.steps == 120 else obs, *rest)

        trainer = PolicyGradientTrainer(_model(), checkpoint_interval=1, seed=4)
        env = Poisoned(gymnasium.make("CartPole-v1"))
        with RunDirectory(tmp_path / "run") as run:
            with pytest.raises(
                FloatingPointError, match=r"iteration \d+: CartPole-v1: environment 0 .*step"
            ):
                trainer.train(env, 50, run=run)
            checkpoint = run.latest_checkpoint()
            assert checkpoint is not None
            assert checkpoint.iteration == trainer.iteration > 0
            load_model(run.model_path, StateSpaceModel)

    def test_a_step_that_overflows(self) -> None:
        trainer = PolicyGradientTrainer(_model(), learning_rate=1e39, seed=4)
        with pytest.raises(
            FloatingPointError, match=r"parameter .* is not finite after the update"
        ):
            trainer.update(_episodes(trainer))

    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    def test_models(self) -> None:
        with pytest.raises(TypeError, match="model must be a StateSpaceModel, got Linear"):
            PolicyGradientTrainer(torch.nn.Linear(2, 2))
        for wrapped in (torch.compile(_model()), torch.nn.DataParallel(_model())):
            with pytest.raises(TypeError, match=r"got .*: give the model inside"):
                PolicyGradientTrainer(wrapped)

    @pytest.mark.parametrize("part", ["model", "optimizer", "parameters"])
    def test_a_part_that_is_replaced(self, part: str) -> None:
        trainer = PolicyGradientTrainer(_model(), seed=4)
        if part == "model":
            trainer.model = _model()
        elif part == "optimizer":
            trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
        else:
            trainer.model.load_state_dict(_model().state_dict(), assign=True)
        with pytest.raises(ValueError, match="must keep the optimizer, the model"):
            trainer.train(gymnasium.make("CartPole-v1"), 2)
        with pytest.raises(ValueError, match="must keep the optimizer, the model"):
            trainer.update(_episodes(trainer))

    def test_a_gradient_that_overflows(self) -> None:
        model = _model()
        trainer = PolicyGradientTrainer(model, seed=4)
        episodes = _episodes(trainer)
        with torch.no_grad():
            model.C[0].weight.fill_(1e38)
            model.C[2].weight.fill_(3e38)
        before = model.B.detach().clone()
        with pytest.raises(FloatingPointError, match="loss"):
            trainer.update(episodes)
        assert torch.equal(model.B, before)

    def test_logits_that_are_not_finite(self) -> None:
        model = _model()
        with torch.no_grad():
            model.C[2].bias.fill_(math.nan)
        trainer = PolicyGradientTrainer(model, seed=4)
        with (
            Environment("CartPole-v1", 4) as env,
            pytest.raises(
                FloatingPointError,
                match=r"iteration 0: step 0: CartPole-v1: the logits of environment 0 .*nan",
            ),
        ):
            trainer.train(env, 8)


class TestResume:
    def _train(
        self, run: RunDirectory, stop: int | None = None, resume: bool = False
    ) -> tuple[PolicyGradientTrainer, list[dict[str, float]]]:
        trainer = PolicyGradientTrainer(_model(), entropy_coef=0.01, checkpoint_interval=3, seed=7)
        with Environment("CartPole-v1", 4, seed=3) as env, run:

            def callback(metrics: dict[str, float]) -> None:
                if metrics["iteration"] == stop:
                    raise KeyboardInterrupt

            try:
                trainer.train(env, 30, run=run, resume=resume, callback=callback)
            except KeyboardInterrupt:
                assert stop is not None
        return trainer, run.read_rows()

    @pytest.mark.parametrize("stop", [2, 3, 5, 7])  # before, at and after a checkpoint
    def test_equals_the_uninterrupted_run(self, stop: int, tmp_path: Path) -> None:
        whole, rows = self._train(RunDirectory(tmp_path / "whole"))
        self._train(RunDirectory(tmp_path / "part"), stop)
        resumed, resumed_rows = self._train(
            RunDirectory(tmp_path / "part", resume=True), resume=True
        )
        assert resumed.iteration == whole.iteration == 8
        assert resumed.timesteps == whole.timesteps
        for name, parameter in whole.model.state_dict().items():
            assert torch.equal(parameter, resumed.model.state_dict()[name]), name
        state, resumed_state = whole.optimizer.state_dict(), resumed.optimizer.state_dict()
        for i, moments in state["state"].items():
            for name, moment in moments.items():
                assert torch.equal(moment, resumed_state["state"][i][name])
        timed = ("seconds", "steps_per_second")
        assert [{k: v for k, v in row.items() if k not in timed} for row in rows] == [
            {k: v for k, v in row.items() if k not in timed} for row in resumed_rows
        ]

    def test_other_settings(self, tmp_path: Path) -> None:
        self._train(RunDirectory(tmp_path / "run"))
        run = RunDirectory(tmp_path / "run", resume=True)
        with Environment("CartPole-v1", 4) as env:
            trainer = PolicyGradientTrainer(_model(), 1e-3, entropy_coef=0.01, seed=7)
            with pytest.raises(
                ValueError, match=r"iteration_.*learning_rate must be 0.005 .*0.001"
            ):
                trainer.train(env, 30, run=run, resume=True)
        trainer = PolicyGradientTrainer(_model(), entropy_coef=0.01, checkpoint_interval=3, seed=7)
        with (
            Environment("CartPole-v1", 5) as env,
            pytest.raises(ValueError, match=r"batch_size must be 4 .*got 5"),
        ):
            trainer.train(env, 30, run=run, resume=True)

    @pytest.mark.parametrize("key", ["version", "settings", "model", "optimizer", "episodes"])
    def test_an_incomplete_state(self, key: str) -> None:
        trainer = PolicyGradientTrainer(_model(), seed=7)
        state = trainer.state_dict()
        del state[key]
        with pytest.raises(ValueError, match=f"does not fit: it lacks '{key}'"):
            PolicyGradientTrainer(_model(), seed=7).load_state_dict(state)

    def test_another_model_or_nan(self) -> None:
        state = PolicyGradientTrainer(_model(), seed=7).state_dict()
        with pytest.raises(ValueError, match="does not fit"):
            PolicyGradientTrainer(_model(state_dim=7), seed=7).load_state_dict(state)
        state["model"]["B"] = state["model"]["B"] * math.nan
        with pytest.raises(ValueError, match="model tensor B is not finite"):
            PolicyGradientTrainer(_model(), seed=7).load_state_dict(state)

    def test_the_saved_model_knows_its_environment(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path / "run")
        trainer, _ = self._train(run)
        assert read_metadata(run.model_path) == {"env_id": "CartPole-v1"}
        torch.testing.assert_close(
            dict(load_model(run.model_path, StateSpaceModel).state_dict()),
            dict(trainer.model.state_dict()),
            rtol=0,
            atol=0,
        )
