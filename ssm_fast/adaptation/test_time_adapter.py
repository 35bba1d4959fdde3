"""Adaptation while a policy plays a task: replay, a bound on the change, honest uncertainty."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ssm_fast.adaptation.online import (
    Player,
    bootstrapped_returns,
    episode_means,
    features_of,
    play_episodes,
    policy_of,
)
from ssm_fast.adaptation.policy_objective import (
    Experience,
    PolicyObjective,
    boundaries,
    check_finite,
    distribution_of,
    importance_ratios,
    normalized,
    traced_advantages,
)
from ssm_fast.adaptation.standard_adapter import StandardAdaptationConfig, StandardAdapter
from ssm_fast.adaptation.value_ensemble import ValueEnsemble
from ssm_fast.checks import check_count, check_kind, check_number
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.experience.experience_buffer import ExperienceBuffer

if TYPE_CHECKING:
    from ssm_fast.env_runner.environment import AnyEnvironment

_FITS = 2  # of the value heads: the later one bootstraps with the first
_FIELDS = (
    *("log_probs", "rewards", "terminated", "truncated"),
    *("reset", "next_observations", "temperature"),
)


class TestTimeAdapter(StandardAdapter):
    """Adapts a copy of a policy to the task that it is playing.

    `adapt` goes through what the buffer holds, as it was played, from the recurrent state that was
    stored with the oldest step:

    1. The value heads (`ValueEnsemble`) are fitted to the returns: the value function is first.
    2. Advantages against the heads' mean, with traces cut by importance ratios; steps of an older
       policy count by their ratio, clipped (`PolicyObjective`).
    3. `adaptation_steps` steps on minibatches of sequences. The one that would take the policy
       further than `max_kl` from those that filled the buffer is halved, and is the last.

    **Uncertainty** is the disagreement of the heads over that of their priors, 1 where nothing is
    known and towards 0 in what was seen. It sets the temperature of the actions, from 1 down to
    `min_temperature`: exploration noise is paid for in return, and buys nothing where the value is
    known. Log-probabilities are those at the temperature.

    **Step size**: ``adaptation_lr 2^(2 d - 1)`` with the difficulty ``d`` of the task, 1 minus the
    share of the variance of its returns that the meta-critic explains: half the rate where training
    has seen the like, twice the rate where the critic is at a loss.

    Args:
        model: The policy, never changed: it is copied.
        adaptation_lr: Learning rate of Adam at difficulty 0.5.
        adaptation_steps: Gradient steps of `adapt`.
        buffer_size: Steps to remember, over the rows of `adapt_online`; of each row in a loop of
            one's own.
        batch_size: Sequences in a minibatch.
        use_uncertainty: Let the uncertainty set the temperature; without it, it is 1.
        gamma: Discount factor.
        gae_lambda: Weight of longer returns.
        clip_epsilon: Clipping range of the ratios.
        max_kl: Largest mean KL divergence of the policy from those that acted.
        sequence_length: Steps of a sequence in a minibatch.
        grad_clip_norm: Gradients are scaled down to this norm.
        num_heads: Value heads.
        min_temperature: Temperature where the heads agree, at most 1.
        seed: Of minibatches, value heads, and of the actions and the environment where
            `adapt_online` is given none; drawn from torch's global generator if None.

    Attributes:
        model: The adapted copy.
        ensemble: The value heads.
        difficulty: ``d``; 0.5 before the first `adapt`.

    Raises:
        TypeError: The model is no `ImprovedSSM`, or a count no integer.
        ValueError: A number is out of its range, or a weight is not finite.
    """

    __test__: ClassVar[bool] = False  # its name is one that pytest collects

    def __init__(
        self,
        model: ImprovedSSM,
        adaptation_lr: float = 1e-3,
        adaptation_steps: int = 10,
        buffer_size: int = 1000,
        batch_size: int = 32,
        use_uncertainty: bool = True,
        *,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_epsilon: float = 0.2,
        max_kl: float = 0.02,
        sequence_length: int = 16,
        grad_clip_norm: float | None = 0.5,
        num_heads: int = 8,
        min_temperature: float = 0.5,
        seed: int | None = None,
    ) -> None:
        check_kind(model, ImprovedSSM)
        super().__init__(
            model,
            StandardAdaptationConfig(
                learning_rate=check_number("adaptation_lr", adaptation_lr, above=0.0),
                num_steps=check_count("adaptation_steps", adaptation_steps),
                grad_clip_norm=grad_clip_norm,
                trust_region_eps=check_number("max_kl", max_kl, above=0.0),
            ),
        )
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        self.seed = check_count("seed", seed, 0)
        self.buffer_size = check_count("buffer_size", buffer_size)
        self.batch_size = check_count("batch_size", batch_size)
        self.use_uncertainty = use_uncertainty
        self.gamma = check_number("gamma", gamma, at_least=0.0, at_most=1.0)
        self.gae_lambda = check_number("gae_lambda", gae_lambda, at_least=0.0, at_most=1.0)
        self.sequence_length = check_count("sequence_length", sequence_length)
        self.num_heads = num_heads
        self.min_temperature = check_number(
            "min_temperature", min_temperature, above=0.0, at_most=1.0
        )
        self._objective = PolicyObjective(clip_epsilon, value_coef=0.0)
        self._calls = 0
        self._critic = torch.cat([model.critic.weight[0], model.critic.bias]).detach().clone()
        self._forget()

    def adapt_online(
        self,
        env: AnyEnvironment,
        num_episodes: int = 5,
        adapt_every: int = 10,
        *,
        seed: int | None = None,
        compare: bool = False,
    ) -> tuple[list[float], dict[str, Any]]:
        """Play a task and adapt to it, from the weights that the adapter has.

        Args:
            env: The task: an `Environment` of any batch size, whose rows share the adapted policy,
                or a Gymnasium environment. It is reset, and stays open.
            num_episodes: Episodes of every row.
            adapt_every: Steps of every row between two calls of `adapt`.
            seed: Of the environment and of the actions; the adapter's by default.
            compare: First play as many episodes with the policy as it is, from the same seed.

        Returns:
            Each episode's return, the mean over the rows, and a dict:

            - ``episode_returns``, ``episode_lengths``: a list a row.
            - ``losses``, ``steps``, ``kl``, ``difficulty``, ``learning_rate``: of each `adapt`.
            - ``temperature``: mean over each stretch between two of them.
            - ``episode_returns_without``, ``improvement``: the same episodes without adapting, and
                the mean difference of all; where `compare` is set.

        Raises:
            ValueError: The environment does not fit the model, or a number is less than 1.
            FloatingPointError: NaN or infinity, from the environment, the policy or an update. The
                weights are those that played the last whole stretch.
        """
        check_count("adapt_every", adapt_every)
        seed = self.seed if seed is None else seed
        stats: dict[str, Any] = {
            name: []
            for name in ("losses", "steps", "kl", "difficulty", "learning_rate", "temperature")
        }
        model = policy_of(self)
        if compare:
            stats["episode_returns_without"] = play_episodes(model, env, num_episodes, seed)
        player = Player(env, model, num_episodes, seed)
        self._forget_steps(player.env.batch_size)
        temperature_of = self._temperature if self.use_uncertainty else None
        good = self.snapshot()
        try:
            while not player.is_done:
                experience = player.play(model, adapt_every, temperature_of)
                good = self.snapshot()
                self._store(experience)
                stats["temperature"].append(float(experience.temperature.mean()))
                for name, value in self.adapt().items():
                    stats[name].append(value)
        except FloatingPointError:
            self.restore(good)
            raise
        stats["episode_returns"], stats["episode_lengths"] = player.returns, player.lengths
        if compare:
            with_it, without = episode_means(player.returns), stats["episode_returns_without"]
            stats["improvement"] = (
                math.fsum(with_it) - math.fsum(episode_means(without))
            ) / num_episodes
        return episode_means(player.returns), stats

    def adapt(self) -> dict[str, float]:
        """Learn from the buffer.

        Returns:
            ``losses`` (before the first step), ``steps`` taken, ``kl`` of the new policy from those
            that acted, ``difficulty`` and ``learning_rate``.

        Raises:
            ValueError: The buffer is empty.
            FloatingPointError: A feature, loss, gradient or weight is not finite. The weights are
                as before.
        """
        experience = self._recent()
        advantages, states = self._advantages(experience)
        L = min(self.sequence_length, experience.rewards.shape[1])
        x, y, start = _sequences(experience, advantages, states, L)
        S = len(y["advantages"])
        generator = torch.Generator().manual_seed(self.seed + self._calls)
        self._calls += 1

        def loss_of(_: int) -> Tensor:
            order = torch.randperm(S, generator=generator, device="cpu").to(start.device)
            i = order[: self.batch_size]
            return self._objective(
                self.model,
                {name: part[i] for name, part in x.items()},
                {name: part[i] for name, part in y.items()},
                start[:, i],
            )

        self.difficulty = 1.0 - self.ensemble.explained_variance
        self.learning_rate = self.config.learning_rate * 2.0 ** (2.0 * self.difficulty - 1.0)
        loss, steps = self._descend(
            loss_of,
            lambda: distribution_of(self.model, x, start)[0],
            lambda: self._kl(experience),
        )
        return {
            "losses": loss,
            "steps": steps,
            "kl": float(self._kl(experience)),
            "difficulty": self.difficulty,
            "learning_rate": self.learning_rate,
        }

    def store_transition(
        self,
        observation: Any,
        action: Any,
        reward: float,
        next_observation: Any,
        terminated: bool,
        truncated: bool = False,
        *,
        log_prob: float | None = None,
        row: int = 0,
    ) -> None:
        """Remember one step of a loop of one's own, in the order of time.

        The recurrent state and the first steps of episodes are followed here, with the weights of
        the moment.

        Args:
            observation: ``[I]``.
            action: ``[K]``, not clipped; an integer of a discrete policy.
            reward: Of the step.
            next_observation: ``[I]``, that the step led to, even where the episode ended.
            terminated: The episode ended in a terminal state.
            truncated: The episode was cut short.
            log_prob: Of the action, by the policy that chose it; by the present one if None.
            row: Which of several environments.

        Raises:
            ValueError: A shape does not fit, or a number is not finite.
            FloatingPointError: The policy is not finite there.
        """
        if not self._following:
            self._forget_steps(1)  # those of adapt_online
        model = policy_of(self)
        weight = next(model.parameters())
        x = _row("observation", observation, model.input_dim).to(weight)  # [1, 1, I]
        beyond = _row("next_observation", next_observation, model.input_dim).to(weight)
        rewards = _row("reward", reward, 1).to(weight).squeeze(-1)  # [1, 1]
        if model.discrete:
            chosen = _row("action", action, 1).to(weight.device).squeeze(-1)  # [1, 1]
        else:
            chosen = _row("action", action, model.action_dim).to(weight)  # [1, 1, K]
        state, first = self._following.get(row, (model.init_hidden(1), True))
        with torch.no_grad():
            given, _, _ = model.evaluate_actions(x[0], chosen[0], state)  # [1]
            *_, after = model(x[0], state)
        if not bool(torch.isfinite(given).all()):
            raise FloatingPointError("the policy is not finite at the observation")
        if log_prob is not None:
            given = given.new_tensor([log_prob])
        ended = bool(terminated or truncated)
        flags = torch.tensor([bool(terminated), bool(truncated), first], device=weight.device)
        flags = flags.reshape(3, 1, 1)
        self._store(
            Experience(
                observations=x,
                actions=chosen,
                log_probs=given.unsqueeze(1),
                rewards=rewards,
                terminated=flags[0],
                truncated=flags[1],
                reset=flags[2],
                next_observations=beyond,
                temperature=torch.ones_like(rewards),
                initial_state=state,
            ),
            (row,),
        )
        self._following[row] = (torch.zeros_like(after) if ended else after, ended)

    def reset_to_meta(self) -> None:
        """Go back to the weights of the start, bitwise, and forget the task."""
        super().reset_to_meta()
        self._forget()

    def _forget(self) -> None:
        self.ensemble = ValueEnsemble(self.num_heads, seed=self.seed)
        self.difficulty = 0.5
        self._calls = 0
        self._forget_steps(1)

    def _forget_steps(self, rows: int) -> None:
        """Empties the buffers: what was played before lies apart in time."""
        self._rows = rows
        self._buffers: dict[int, ExperienceBuffer] = {}
        self._following: dict[int, tuple[Tensor, bool]] = {}

    def _store(self, experience: Experience, rows: tuple[int, ...] | None = None) -> None:
        """Appends a stretch to the buffers of its rows."""
        model = policy_of(self)
        with torch.no_grad():
            _, states = model.unroll(
                experience.observations, experience.initial_state, experience.reset
            )  # [L, B, T, N]
        before = experience.states_before(states)  # [num_layers, B, T, N]
        size = max(1, self.buffer_size // self._rows)
        for i, row in enumerate(range(len(experience.rewards)) if rows is None else rows):
            if row not in self._buffers:
                device = experience.rewards.device
                self._buffers[row] = ExperienceBuffer(size, device, seed=self.seed)
            self._buffers[row].extend(
                experience.observations[i],
                experience.actions[i],
                continues=True,
                state=before[:, i].movedim(1, 0),  # [T, L, N]
                **{name: getattr(experience, name)[i] for name in _FIELDS},
            )

    def _recent(self) -> Experience:
        """All that the buffers hold, in the order of time."""
        if not self._buffers:
            raise ValueError("the buffer is empty: store transitions before adapting")
        T = min(len(buffer) for buffer in self._buffers.values())
        if any(len(buffer) != T for buffer in self._buffers.values()):
            raise ValueError("every row must have stored as many steps as the others")
        whole = [buffer.sample_sequences(1, T) for buffer in self._buffers.values()]
        fields = {name: torch.cat([row[name] for row in whole]) for name in whole[0]}
        return Experience(
            observations=fields["observations"],
            actions=fields["targets"],
            initial_state=fields["initial_state"].movedim(0, 1),  # [L, B, N]
            **{name: fields[name] for name in _FIELDS},
        )

    @torch.no_grad()
    def _advantages(self, experience: Experience) -> tuple[Tensor, Tensor]:
        """Fits the heads; normalised advantages ``[B, T]``, states after each ``[L, B, T, N]``."""
        model = policy_of(self)
        features, _ = features_of(
            model, experience.observations, experience.initial_state, experience.reset
        )  # [B, T, H]
        check_finite("the policy's features", features, FloatingPointError)
        _, states = model.unroll(
            experience.observations, experience.initial_state, experience.reset
        )
        rows, steps = boundaries(experience)
        beyond = features[:0, 0]
        if len(rows) > 0:
            last = experience.next_observations[rows, steps]  # [M, I]
            beyond, _ = features_of(model, last, states[:, rows, steps])
        values = next_values = None
        for _ in range(_FITS):
            returns = bootstrapped_returns(experience, self.gamma, next_values)
            check_finite("the returns", returns, FloatingPointError)
            self.ensemble.fit(features, returns, self._critic)
            values = self.ensemble.values(features)  # [B, T]
            next_values = torch.zeros_like(values)
            next_values[:, :-1] = values[:, 1:]
            next_values[rows, steps] = self.ensemble.values(beyond)
        assert values is not None
        assert next_values is not None
        ratios = importance_ratios(model, experience)
        advantages = traced_advantages(
            experience, values, next_values, ratios, self.gamma, self.gae_lambda
        )
        return normalized(advantages, advantages + values), states

    @torch.no_grad()
    def _kl(self, experience: Experience) -> Tensor:
        """From the policies that acted to the present one, estimated by ``ρ - 1 - log ρ``."""
        ratios = importance_ratios(policy_of(self), experience)
        return (ratios - 1.0 - ratios.log()).mean()

    def _temperature(self, features: Tensor) -> Tensor:
        return self.ensemble.uncertainty(features).clamp(min=self.min_temperature)


def _row(name: str, x: Any, size: int) -> Tensor:
    """One step of one row ``[1, 1, size]``.

    Raises:
        ValueError: There are more or less numbers, or one is not finite.
    """
    row = x if isinstance(x, Tensor) else torch.as_tensor(x, device="cpu")
    row = row.reshape(1, 1, -1)
    if row.shape[2] != size:
        raise ValueError(f"{name} must have size {size}, got {row.shape[2]}")
    if not bool(torch.isfinite(row).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return row


def _sequences(
    experience: Experience, advantages: Tensor, states: Tensor, L: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """``x``, ``y`` and states of sequences of ``L`` steps; the oldest steps that make none go."""
    T = advantages.shape[1]
    skip = T % L

    def cut(x: Tensor) -> Tensor:
        return x[:, skip:].reshape(-1, L, *x.shape[2:])  # [S, L, ...]

    before = experience.states_before(states)  # [num_layers, B, T, N]
    start = before[:, :, skip::L].flatten(1, 2)  # [num_layers, S, N]
    x = {
        "x": cut(experience.observations),
        "reset": cut(experience.reset),
        "temperature": cut(experience.temperature),
    }
    y = {
        "actions": cut(experience.actions),
        "log_probs": cut(experience.log_probs),
        "advantages": cut(advantages),
    }
    return x, y, start
