from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from ssm_fast import ops
from ssm_fast.adaptation.online import bootstrapped_returns
from ssm_fast.adaptation.policy_objective import (
    ActionDistribution,
    Experience,
    PolicyObjective,
    distribution_of,
    importance_ratios,
    policy_batch,
    traced_advantages,
)
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.core.ssm import StateSpaceModel

pytestmark = pytest.mark.isa_independent


def policy(discrete: bool = False, seed: int = 0) -> ImprovedSSM:
    torch.manual_seed(seed)
    model = ImprovedSSM(
        3, 2, 4, 8, discrete=discrete, normalize_observations=True, orthogonal_init=False
    )
    return model.double()


def experience(model: ImprovedSSM, B: int = 3, T: int = 9, temperature: float = 1.0) -> Experience:
    """Random steps with ends of both kinds, and the actions of the model."""
    torch.manual_seed(1)
    x, beyond = torch.randn(2, B, T, 3, dtype=torch.float64)
    terminated, truncated = torch.rand(2, B, T) < 0.15
    truncated &= ~terminated
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[:, 1:] = (terminated | truncated)[:, :-1]
    ends = (terminated | truncated)[:, :-1].unsqueeze(-1)
    beyond[:, :-1] = torch.where(ends, beyond[:, :-1], x[:, 1:])
    state = torch.randn(2, B, 4, dtype=torch.float64)
    tau = torch.full((B, T), temperature, dtype=torch.float64)
    with torch.no_grad():
        now, _ = distribution_of(model, {"x": x, "reset": reset, "temperature": tau}, state)
        if now.log_std is None:
            actions = Categorical(logits=now.mean).sample()
        else:
            actions = Normal(now.mean, now.log_std.exp()).sample()
        log_probs = now.log_prob(actions)
    rewards = torch.randn(B, T, dtype=torch.float64)
    return Experience(
        *(x, actions, log_probs, rewards, terminated, truncated, reset, beyond, tau, state)
    )


def values_of(model: ImprovedSSM, e: Experience) -> tuple[Tensor, Tensor]:
    """Values of the observations and of what followed, one step at a time."""
    B, T = e.rewards.shape
    values, beyond = torch.zeros(2, B, T, dtype=torch.float64)
    state = e.initial_state
    with torch.no_grad():
        for t in range(T):
            _, _, values[:, t], state = model(e.observations[:, t], state, e.reset[:, t])
            beyond[:, t] = model(e.next_observations[:, t], state)[2]
    return values, beyond


class TestActionDistribution:
    def test_equals_torch(self) -> None:
        torch.manual_seed(0)
        mean, other, log_std, other_std = torch.randn(4, 5, 3, dtype=torch.float64)
        for one, two, p, q, actions in (
            (
                ActionDistribution(mean, log_std),
                ActionDistribution(other, other_std),
                Independent(Normal(mean, log_std.exp()), 1),
                Independent(Normal(other, other_std.exp()), 1),
                torch.randn(5, 3, dtype=torch.float64),
            ),
            (
                ActionDistribution(mean, None),
                ActionDistribution(other, None),
                Categorical(logits=mean),
                Categorical(logits=other),
                torch.randint(3, (5,)),
            ),
        ):
            torch.testing.assert_close(one.log_prob(actions), p.log_prob(actions))
            torch.testing.assert_close(one.entropy(), p.entropy())
            torch.testing.assert_close(one.kl(two), kl_divergence(p, q))
            assert float(one.kl(one).abs().max()) < 1e-12

    def test_temperature(self) -> None:
        mean, log_std = torch.randn(2, 4, 3)
        tau = torch.tensor([0.5, 1.0, 2.0, 0.25])
        gaussian = ActionDistribution(mean, log_std).tempered(tau)
        assert gaussian.log_std is not None
        torch.testing.assert_close(gaussian.log_std.exp(), log_std.exp() * tau[:, None])
        torch.testing.assert_close(gaussian.mean, mean)
        logits = ActionDistribution(mean, None).tempered(tau)
        torch.testing.assert_close(logits.mean, mean / tau[:, None])


class TestAdvantages:
    @pytest.mark.parametrize("discrete", [False, True])
    def test_are_gae_on_the_policys_own_steps(self, discrete: bool) -> None:
        model = policy(discrete)
        e = experience(model, temperature=0.7)
        values, beyond = values_of(model, e)
        want, returns = ops.gae(e.rewards, values, beyond, e.terminated, e.truncated, 0.9, 0.8)
        x, y, state = policy_batch(model, e, 0.9, 0.8, normalize=False)
        torch.testing.assert_close(y["advantages"], want)
        torch.testing.assert_close(y["returns"], returns)
        torch.testing.assert_close(importance_ratios(model, e), torch.ones_like(values))
        assert x["x"] is e.observations
        assert state is e.initial_state

    def test_off_policy_traces(self) -> None:
        torch.manual_seed(3)
        e = experience(policy())
        values, beyond, ratios = torch.rand(3, *e.rewards.shape, dtype=torch.float64) * 2
        got = traced_advantages(e, values, beyond, ratios, 0.9, 0.8, reward_scale=2.0)
        for row in range(3):
            carried = 0.0
            for t in reversed(range(e.rewards.shape[1])):
                alive = 0.0 if e.terminated[row, t] else 0.9
                delta = e.rewards[row, t] / 2 + alive * beyond[row, t] - values[row, t]
                follows = t + 1 < e.rewards.shape[1] and not bool(e.ends()[row, t])
                trace = 0.9 * 0.8 * min(1.0, float(ratios[row, t + 1])) if follows else 0.0
                carried = float(delta) + trace * carried
                assert float(got[row, t]) == pytest.approx(carried, rel=1e-12)

    def test_pieces_of_different_episodes_in_a_row(self) -> None:
        """A replayed sequence may leave one episode before its end and go on with another."""
        model = policy()
        one, other = experience(model), experience(model)
        other.reset[:, 0] = True
        both = Experience(
            *(
                one.initial_state
                if f.name == "initial_state"
                else torch.cat([getattr(one, f.name), getattr(other, f.name)], 1)
                for f in fields(Experience)
            )
        )
        both.truncated[:, 8] = both.terminated[:, 8] = False
        one.truncated[:, 8] = one.terminated[:, 8] = False
        wants = [policy_batch(model, part, normalize=False)[1] for part in (one, other)]
        _, y, _ = policy_batch(model, both, normalize=False)
        for name in ("advantages", "returns"):
            want = torch.cat([part[name] for part in wants], 1)
            torch.testing.assert_close(y[name], want, rtol=1e-9, atol=1e-9)
        apart = [
            bootstrapped_returns(part, 0.9, torch.ones_like(part.rewards)) for part in (one, other)
        ]
        joined = bootstrapped_returns(both, 0.9, torch.ones_like(both.rewards))
        torch.testing.assert_close(joined, torch.cat(apart, 1))

    def test_rounding_is_not_blown_up(self) -> None:
        model = policy().float()
        e = experience(policy(), T=40)
        flat = {
            f.name: x.float() if x.is_floating_point() else x
            for f in fields(Experience)
            if (x := getattr(e, f.name)) is not None
        }
        flat["terminated"] = flat["reset"] = torch.ones_like(e.reset)
        flat["rewards"] = torch.ones_like(flat["rewards"])
        model.critic.bias.data.fill_(1.0 - 1e-7)
        model.critic.weight.data.fill_(1e-9)
        _, y, _ = policy_batch(model, Experience(**flat))
        assert float(y["advantages"].abs().max()) < 0.01

    def test_reward_scale_and_normalisation(self) -> None:
        model = policy()
        e = experience(model)
        _, one, _ = policy_batch(model, e, reward_scale=4.0)
        _, other, _ = policy_batch(model, replace(e, rewards=e.rewards / 4.0))
        torch.testing.assert_close(one["advantages"], other["advantages"])
        assert float(one["advantages"].mean()) == pytest.approx(0.0, abs=1e-12)
        assert float(one["advantages"].std(correction=0)) == pytest.approx(1.0, rel=1e-6)


class TestPolicyObjective:
    @pytest.mark.parametrize("discrete", [False, True])
    def test_equals_the_definition(self, discrete: bool) -> None:
        model, other = policy(discrete), policy(discrete, seed=4)
        e = experience(model)
        x, y, state = policy_batch(model, e)
        loss = PolicyObjective(0.1, 0.3)(other, x, y, state)
        log_probs, values, _ = other.evaluate_actions(e.observations, e.actions, state, e.reset)
        ratio = (log_probs - e.log_probs).exp()
        assert bool((ratio.log().abs() > 0.1).any()), "some ratios must be clipped"
        want = (
            -torch.min(ratio * y["advantages"], ratio.clamp(0.9, 1.1) * y["advantages"]).mean()
            + 0.3 * ((values - y["returns"]) ** 2).mean()
        )
        torch.testing.assert_close(loss, want)

    def test_gradient_is_the_policy_gradient(self) -> None:
        model = policy()
        x, y, state = policy_batch(model, experience(model))
        loss = PolicyObjective(value_coef=0.0)(model, x, y, state)
        now, _ = distribution_of(model, x, state)
        plain = -(now.log_prob(y["actions"]) * y["advantages"]).mean()
        parameters = [p for n, p in model.named_parameters() if not n.startswith("critic")]
        for got, want in zip(
            torch.autograd.grad(loss, parameters),
            torch.autograd.grad(plain, parameters),
            strict=True,
        ):
            torch.testing.assert_close(got, want)

    def test_far_actions_do_not_overflow(self) -> None:
        model = policy()
        x, y, state = policy_batch(model, experience(model))
        y["log_probs"] = y["log_probs"] - 1e4
        assert bool(torch.isfinite(PolicyObjective()(model, x, y, state)))

    def test_needs_a_policy_with_values(self) -> None:
        with pytest.raises(TypeError, match="model must be an ImprovedSSM, got StateSpaceModel"):
            distribution_of(StateSpaceModel(), torch.zeros(1, 2, 4), None)

    @pytest.mark.parametrize("arguments", [{"clip_epsilon": 0.0}, {"value_coef": -1.0}])
    def test_ranges(self, arguments: dict[str, float]) -> None:
        with pytest.raises(ValueError, match=next(iter(arguments))):
            PolicyObjective(**arguments)


class TestExperience:
    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"rewards": torch.full((3, 9), torch.nan)}, "rewards must be finite.* row 0, step 0"),
            ({"observations": torch.full((3, 9, 3), torch.inf)}, "observations must be finite"),
            ({"actions": torch.zeros(3, 8, 2)}, r"actions must have shape \[B, T, ...\]"),
            ({"rewards": torch.zeros(3, 0)}, "with a step at least"),
            ({"initial_state": torch.zeros(2, 2, 4)}, r"initial_state must have shape \[L, B, N\]"),
        ],
    )
    def test_refuses(self, change: dict[str, Any], text: str) -> None:
        with pytest.raises(ValueError, match=text):
            replace(experience(policy()), **change)

    def test_flags_are_boolean(self) -> None:
        with pytest.raises(TypeError, match=r"reset must be torch.bool, got torch.float32"):
            replace(experience(policy()), reset=torch.zeros(3, 9))
