from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from torch import Tensor, nn

from ssm_fast import SSM
from ssm_fast.integrations.sb3 import CnnSSMPolicy, MlpSSMPolicy, MultiInputSSMPolicy

pytestmark = pytest.mark.isa_independent

SHARED = {"shared_lstm": True, "enable_critic_lstm": False}
B, T, I, L, N = 3, 7, 4, 2, 8


def policy(**options: Any) -> MlpSSMPolicy:
    options = {"lstm_hidden_size": N, "n_lstm_layers": L, "net_arch": []} | options
    box = spaces.Box(-10.0, 10.0, (I,), np.float32)
    return MlpSSMPolicy(box, spaces.Discrete(3), lambda _: 1e-3, **options)


def states() -> RNNStates:
    h = torch.randn(L, B, N)
    return RNNStates((h, torch.zeros_like(h)), (h, torch.zeros_like(h)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lstm_kwargs": {"norm": "output", "residual": True, "activation": "gelu"}},
        SHARED,
        {"enable_critic_lstm": False},
    ],
    ids=["default", "lstm_kwargs", "shared", "no_critic"],
)
def test_sequences_equal_steps_where_episodes_begin_inside(options: dict[str, Any]) -> None:
    model = policy(**options)
    obs = torch.randn(B, T, I)
    actions = torch.randint(3, (B, T))
    starts = (torch.rand(B, T) < 0.4).float()
    assert starts[:, 1:].any()
    h = states()
    flat = obs.flatten(0, 1), actions.flatten(), h, starts.flatten()
    values, log_probs, _ = model.evaluate_actions(*flat)
    for t in range(T):
        kept = (1.0 - starts[:, t]).view(1, B, 1)
        cleared = RNNStates(*(tuple(x * kept for x in pair) for pair in h))
        distribution, _ = model.get_distribution(obs[:, t], cleared.pi, torch.zeros(B))
        log_prob = distribution.log_prob(actions[:, t])
        torch.testing.assert_close(log_probs.view(B, T)[:, t], log_prob)
        value = model.predict_values(obs[:, t], h.vf, starts[:, t])
        torch.testing.assert_close(values.view(B, T)[:, t], value[:, 0])
        h = model(obs[:, t], h, starts[:, t])[3]


def test_no_lstm_is_left_and_the_optimizer_has_every_parameter() -> None:
    model = policy()
    assert not any(isinstance(module, nn.LSTM) for module in model.modules())
    assert isinstance(model.lstm_actor, SSM)
    assert isinstance(model.lstm_critic, SSM)
    (group,) = model.optimizer.param_groups
    assert group["lr"] == 1e-3
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}


def test_save_and_load(tmp_path: Any) -> None:
    options = {"lstm_hidden_size": N, "lstm_kwargs": {"norm": "output"}} | SHARED
    algorithm = RecurrentPPO(
        MlpSSMPolicy, "CartPole-v1", n_steps=16, batch_size=16, policy_kwargs=options, device="cpu"
    )
    algorithm.learn(32)
    obs = np.random.default_rng(0).normal(size=(5, B, 4)).astype(np.float32)

    def play(model: Any) -> list[Any]:
        state, played = None, []
        for t in range(5):
            starts = np.array([t == 0, t == 3, False])
            action, state = model.predict(obs[t], state, starts, deterministic=True)
            played.append((action, state))
        return played

    expected = play(algorithm)
    assert expected[0][1][0].shape == (1, B, N)
    algorithm.save(tmp_path / "model")
    algorithm.policy.save(tmp_path / "policy")
    again = RecurrentPPO.load(tmp_path / "model", env=gymnasium.make("CartPole-v1"))
    for model in (again, MlpSSMPolicy.load(tmp_path / "policy", device="cpu")):
        np.testing.assert_equal(play(model), expected)
    again.learn(32)


class Pictures(gymnasium.Env[Any, Any]):
    observation_space = spaces.Box(0, 255, (1, 36, 36), np.uint8)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 0.0, False, bool(self.np_random.random() < 0.2), {}


class Parts(Pictures):
    observation_space: Any = spaces.Dict(
        {"picture": Pictures.observation_space, "x": spaces.Box(-1.0, 1.0, (3,), np.float32)}
    )


@pytest.mark.parametrize(("kind", "env"), [(CnnSSMPolicy, Pictures), (MultiInputSSMPolicy, Parts)])
def test_pictures_and_dictionaries(kind: type[MlpSSMPolicy], env: type[Pictures]) -> None:
    algorithm = RecurrentPPO(
        kind, env(), n_steps=16, batch_size=16, n_epochs=1, policy_kwargs={"lstm_hidden_size": N}
    )
    before = [p.clone() for p in algorithm.policy.lstm_actor.parameters()]
    algorithm.learn(16)
    after: list[Tensor] = list(algorithm.policy.lstm_actor.parameters())
    assert not any(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_feature_extractors_that_are_not_shared_are_loaded_so(tmp_path: Any) -> None:
    options = {"lstm_hidden_size": N, "share_features_extractor": False}
    algorithm = RecurrentPPO(CnnSSMPolicy, Pictures(), n_steps=16, policy_kwargs=options)
    algorithm.policy.save(tmp_path / "policy")
    loaded = CnnSSMPolicy.load(tmp_path / "policy", device="cpu")
    wanted = algorithm.policy.state_dict()
    assert loaded.pi_features_extractor is not loaded.vf_features_extractor
    torch.testing.assert_close(loaded.state_dict(), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["batch_first", "state_size"])
def test_bad_lstm_kwargs(name: str) -> None:
    with pytest.raises(ValueError, match=f"lstm_kwargs must leave {name} to the policy"):
        policy(lstm_kwargs={name: 1})
