from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor
from torch.distributions import Categorical
from torchrl.collectors import Collector
from torchrl.envs import Compose, GymEnv, InitTracker, SerialEnv, TransformedEnv
from torchrl.modules import GRUModule, ProbabilisticActor, ValueOperator, set_recurrent_mode
from torchrl.modules.utils import get_primers_from_module
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from ssm_fast import SSM
from ssm_fast.integrations.torchrl import SSMModule

pytestmark = pytest.mark.isa_independent

B, T, I, H, L, N = 3, 9, 4, 6, 2, 5


def module(**options: Any) -> SSMModule:
    options = {"in_key": "observation", "out_key": "features"} | options
    return SSMModule(I, H, L, state_size=N, norm="state", residual=True, **options)


def steps(*batch: int) -> TensorDict:
    return TensorDict(
        {
            "observation": torch.randn(*batch, I),
            "recurrent_state": torch.randn(*batch, L, N),
            "is_init": torch.rand(*batch, 1) < 0.4,
        },
        batch,
    )


@pytest.mark.parametrize("batch", [(), (B,), (2, B)], ids=str)
def test_a_step(batch: tuple[int, ...]) -> None:
    memory = module()
    given = steps(*batch)
    data = memory(given.clone())
    flat = given.reshape(-1)
    state, is_init = flat["recurrent_state"].transpose(0, 1), flat["is_init"].squeeze(-1)
    y, h = memory.ssm.step(flat["observation"], state, reset=is_init)
    torch.testing.assert_close(data["features"], y.reshape(*batch, H))
    torch.testing.assert_close(
        data["next", "recurrent_state"], h.transpose(0, 1).reshape(*batch, L, N)
    )
    values = memory(*(given[key] for key in memory.in_keys))
    torch.testing.assert_close(values, (data["features"], data["next", "recurrent_state"]))


def test_a_step_without_a_state_starts_from_zeros() -> None:
    memory = module()
    data = steps(B).exclude("recurrent_state")
    torch.testing.assert_close(memory(data)["features"], memory.ssm.step(data["observation"])[0])


@pytest.mark.parametrize("batch", [(T,), (B, T), (2, B, T)], ids=str)
def test_a_sequence_restarts_from_the_states_stored_where_episodes_begin(
    batch: tuple[int, ...],
) -> None:
    memory = module()
    given = steps(*batch)
    with set_recurrent_mode(True):
        data = memory(given.clone())
    flat = given.reshape(-1, T)
    state = flat["recurrent_state"][:, 0]  # [rows, L, N]
    for t in range(T):
        state = torch.where(
            flat["is_init"][:, t, :, None], flat["recurrent_state"][:, t], state
        )  # [rows, L, N]
        y, h = memory.ssm.step(flat["observation"][:, t], state.transpose(0, 1))
        state = h.transpose(0, 1)
        torch.testing.assert_close(data["features"].reshape(-1, T, H)[:, t], y)
        after = data["next", "recurrent_state"].reshape(-1, T, L, N)
        torch.testing.assert_close(after[:, t], state)


def test_the_recurrent_mode_is_that_of_the_context_or_the_default() -> None:
    assert not module().recurrent_mode
    memory = module(default_recurrent_mode=True)
    assert memory.recurrent_mode
    with set_recurrent_mode("sequential"):
        assert not memory.recurrent_mode
    with pytest.raises(ValueError, match="must have a time dimension"):
        memory(steps())


def make_env(memory: SSMModule) -> TransformedEnv:
    env = TransformedEnv(
        SerialEnv(B, lambda: GymEnv("CartPole-v1", categorical_action_encoding=True)),
        Compose(InitTracker(), memory.make_tensordict_primer()),
    )
    env.set_seed(0)
    return env


def actor_critic() -> tuple[SSMModule, ProbabilisticActor, TensorDictSequential]:
    memory = module()
    logits = TensorDictModule(torch.nn.Linear(H, 2), ["features"], ["logits"])
    actor = ProbabilisticActor(
        TensorDictSequential(memory, logits),
        in_keys=["logits"],
        distribution_class=Categorical,
        return_log_prob=True,
    )
    value = ValueOperator(torch.nn.Linear(H, 1), in_keys=["features"])
    return memory, actor, TensorDictSequential(memory, value)


class Collected(NamedTuple):
    memory: SSMModule
    actor: ProbabilisticActor
    critic: TensorDictSequential
    data: TensorDict  # [B, 40] that begin inside episodes and hold several


@pytest.fixture(scope="module")
def collected() -> Collected:
    torch.manual_seed(0)
    memory, actor, critic = actor_critic()
    collector = Collector(make_env(memory), actor, frames_per_batch=B * 40, total_frames=B * 80)
    _, data = collector
    assert data["is_init"][:, 1:].any(1).all()
    assert not data["is_init"][:, 0].all()
    return Collected(memory, actor, critic, data)


def test_a_sequence_repeats_what_a_collector_saw(collected: Collected) -> None:
    memory, _, _, data = collected
    again = data.select(*memory.in_keys)
    with set_recurrent_mode(True):
        memory(again)
    for key in memory.out_keys:
        torch.testing.assert_close(again[key], data[key])


@pytest.mark.parametrize("deactivate_vmap", [False, True], ids=["vmap", "loop"])
def test_values_of_gae_are_those_of_the_states_seen(
    collected: Collected, deactivate_vmap: bool
) -> None:
    """A value of a next observation too, which follows a state that its sequence does not hold."""
    _, _, critic, data = collected
    data = data.clone()
    advantage = GAE(gamma=0.9, lmbda=0.9, value_network=critic, deactivate_vmap=deactivate_vmap)
    with set_recurrent_mode(True):
        advantage(data)

    def value(observation: Tensor, state: Tensor, is_init: Tensor) -> Tensor:
        seen = TensorDict(
            {"observation": observation, "recurrent_state": state, "is_init": is_init}, (B, 40)
        )
        return critic(seen)["state_value"]

    state, is_init = data["recurrent_state"], data["is_init"]
    after = data["next", "recurrent_state"]
    torch.testing.assert_close(data["state_value"], value(data["observation"], state, is_init))
    next_value = value(data["next", "observation"], after, torch.zeros_like(is_init))
    torch.testing.assert_close(data["next", "state_value"], next_value)


def test_a_loss_gives_gradients_and_the_ratio_one(collected: Collected) -> None:
    _, actor, critic, data = collected
    data = data.clone()
    with set_recurrent_mode(True):
        GAE(gamma=0.9, lmbda=0.9, value_network=critic)(data)
    loss_module = ClipPPOLoss(actor, critic)
    losses = loss_module(data)
    torch.testing.assert_close(losses["kl_approx"], torch.tensor(0.0), rtol=0, atol=1e-6)
    (losses["loss_objective"] + losses["loss_critic"]).backward()
    assert all(p.grad.abs().sum() > 0 for p in loss_module.parameters())


def test_steps_that_were_collected_without_the_primer() -> None:
    memory, actor, _ = actor_critic()
    env = SerialEnv(B, lambda: GymEnv("CartPole-v1", categorical_action_encoding=True))
    data = TransformedEnv(env, InitTracker()).rollout(5, actor, break_when_any_done=False)
    with (
        set_recurrent_mode(True),
        pytest.raises(ValueError, match=r"'recurrent_state' must be in what was collected"),
    ):
        memory(data)


def test_the_primer_is_that_of_gru_module() -> None:
    ours = SSMModule(I, H, L, in_key="x", out_key="y")
    theirs = GRUModule(I, H, L, in_key="x", out_key="y")
    assert ours.in_keys == theirs.in_keys
    assert ours.out_keys == theirs.out_keys
    specs = [m.make_tensordict_primer().primers for m in (ours, theirs)]
    assert specs[0] == specs[1]
    assert get_primers_from_module(torch.nn.Sequential(ours)).primers == specs[0]
    ours = SSMModule(I, H, L, in_keys=["x", ("memory", "s")], out_key="y")
    with pytest.raises(ValueError, match=r"must be .* for an environment to hand the state on"):
        ours.make_tensordict_primer()


def test_keys_of_ones_own() -> None:
    keys = {"in_keys": ["x", ("memory", "s"), "begins"], "out_keys": ["y", ("next", "memory", "s")]}
    memory = SSMModule(ssm=SSM(I, H, L, batch_first=True), in_key=None, **keys)
    assert ("memory", "s") in memory.make_tensordict_primer().primers.keys(True, True)
    data = TensorDict({"x": torch.randn(B, I), "begins": torch.ones(B, 1, dtype=torch.bool)}, B)
    torch.testing.assert_close(memory(data)["y"], memory.ssm.step(data["x"])[0])
    assert data["next", "memory", "s"].shape == (B, L, H)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_keys": ["x", "s"]}, "either in_key or in_keys must be given, and not both"),
        ({"out_key": None}, "either out_key or out_keys must be given"),
        ({"in_key": None, "in_keys": ["x"]}, "in_keys must be those of input, state and is_init"),
        ({"ssm": SSM(I, H, batch_first=True)}, "either ssm, or input_size and hidden_size"),
        ({"batch_first": False}, "ssm must have batch_first=True"),
    ],
)
def test_bad_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)
