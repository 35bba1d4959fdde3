"""PPO of TorchRL with an SSM as memory, on CartPole.

pip install ".[rl]" torchrl
python examples/torchrl_cartpole.py
"""

from __future__ import annotations

import time

import torch
import tyro
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch.distributions import Categorical
from torchrl.collectors import Collector
from torchrl.envs import Compose, GymEnv, InitTracker, RewardSum, SerialEnv, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, ProbabilisticActor, ValueOperator, set_recurrent_mode
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from ssm_fast.integrations.torchrl import SSMModule

ENVS = 8


def make_env(memory: SSMModule, seed: int) -> TransformedEnv:
    """Environments that mark where episodes begin and carry the state of `memory`."""
    env = TransformedEnv(
        SerialEnv(ENVS, lambda: GymEnv("CartPole-v1", categorical_action_encoding=True)),
        Compose(InitTracker(), memory.make_tensordict_primer(), RewardSum()),
    )
    env.set_seed(seed)
    return env


def main(frames: int = 24_576, steps: int = 32, epochs: int = 20, seed: int = 0) -> float:
    """Train, then return the mean return of the most likely actions."""
    torch.manual_seed(seed)
    memory = SSMModule(4, 64, norm="state", in_key="observation", out_key="features")
    logits = TensorDictModule(MLP(64, 2, num_cells=[64]), ["features"], ["logits"])
    value = ValueOperator(MLP(64, 1, num_cells=[64]), in_keys=["features"])
    actor = ProbabilisticActor(
        TensorDictSequential(memory, logits),
        in_keys=["logits"],
        distribution_class=Categorical,
        return_log_prob=True,
    )
    critic = TensorDictSequential(memory, value)
    advantage = GAE(gamma=0.98, lmbda=0.8, value_network=critic)
    ppo = ClipPPOLoss(actor, critic, entropy_coeff=0.0, critic_coeff=0.1, normalize_advantage=True)
    optimizer = torch.optim.Adam(ppo.parameters(), lr=1e-3)
    batch = ENVS * steps
    collector = Collector(
        make_env(memory, seed), actor, frames_per_batch=batch, total_frames=frames
    )
    returns: list[float] = []
    begin = time.perf_counter()
    for i, data in enumerate(collector):  # [ENVS, steps]
        with set_recurrent_mode(True), torch.no_grad():
            advantage(data)
        for _ in range(epochs):
            losses = ppo(data)  # in recurrent mode by itself
            optimizer.zero_grad()
            (losses["loss_objective"] + losses["loss_critic"]).backward()
            torch.nn.utils.clip_grad_norm_(ppo.parameters(), 0.5)
            optimizer.step()
        returns += data["next", "episode_reward"][data["next", "done"]].tolist()
        if i % 16 == 15:
            print(f"{(i + 1) * batch:6} frames: return {sum(returns[-20:]) / 20:.1f}")
    print(f"{time.perf_counter() - begin:.1f} s")

    with set_exploration_type(ExplorationType.MODE), torch.no_grad():
        played = make_env(memory, seed + 1).rollout(500, actor, break_when_any_done=False)
    first = played["is_init"].cumsum(1) == 1  # episode of each environment
    return float((played["next", "reward"] * first).sum((1, 2)).mean())


if __name__ == "__main__":
    print(f"return after training: {tyro.cli(main):.1f}")
