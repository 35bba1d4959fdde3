"""Recurrent PPO in one file, in the manner of CleanRL: an SSM for memory, ssm_fast.ops.gae.

pip install ".[rl]"
python examples/ppo_ssm.py
python examples/ppo_ssm.py --hide-velocities
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn
from torch.distributions import Categorical

from ssm_fast import SSM
from ssm_fast.nn import RunningNorm
from ssm_fast.ops import gae


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    hide_velocities: bool = False  # show every second number of an observation only, as of CartPole
    seed: int = 0
    total_steps: int = 30_000
    num_envs: int = 8
    num_steps: int = 32  # of each environment, between two updates
    update_epochs: int = 20
    num_minibatches: int = 1  # each of whole sequences of some of the environments
    learning_rate: float = 1e-3
    gamma: float = 0.98
    gae_lambda: float = 0.8
    clip_coef: float = 0.2
    vf_coef: float = 0.1
    ent_coef: float = 0.0
    max_grad_norm: float = 0.5
    eval_episodes: int = 20


class Agent(nn.Module):
    def __init__(self, num_features: int, num_actions: int, hidden_size: int = 64) -> None:
        super().__init__()
        self.norm = RunningNorm(num_features)
        self.encoder = nn.Sequential(nn.Linear(num_features, hidden_size), nn.Tanh())
        self.memory = SSM(hidden_size, hidden_size, norm="state", residual=True)
        self.actor = nn.Sequential(nn.Tanh(), nn.Linear(hidden_size, num_actions))
        self.critic = nn.Sequential(nn.Tanh(), nn.Linear(hidden_size, 1))
        nn.init.orthogonal_(self.actor[1].weight, 0.01)

    def forward(
        self, obs: Tensor, state: Tensor, start: Tensor
    ) -> tuple[Categorical, Tensor, Tensor]:
        """Sequences `[T, B, I]`, or one step `[B, I]`; `start` marks first observations."""
        run = self.memory if obs.ndim == 3 else self.memory.step
        y, state = run(self.encoder(self.norm(obs)), state, reset=start)
        return Categorical(logits=self.actor(y)), self.critic(y).squeeze(-1), state

    def first_state(self, num_envs: int) -> Tensor:
        return torch.zeros(self.memory.num_layers, num_envs, self.memory.state_size)


def make_envs(args: Args) -> gym.vector.VectorEnv:
    def make() -> gym.Env:
        env = gym.make(args.env_id)
        if args.hide_velocities:
            box = env.observation_space
            box = gym.spaces.Box(box.low[::2], box.high[::2], dtype=box.dtype)
            env = gym.wrappers.TransformObservation(env, lambda obs: obs[::2], box)
        return env

    return gym.vector.SyncVectorEnv([make] * args.num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


@torch.no_grad()
def evaluate(agent: Agent, args: Args) -> float:
    """Mean return of the most likely actions, over as many episodes of each environment."""
    envs = make_envs(args)
    quota = -(-args.eval_episodes // args.num_envs)  # the first to end are the short ones
    obs, _ = envs.reset(seed=args.seed + 1000)
    state, start = agent.first_state(args.num_envs), torch.ones(args.num_envs)
    running, returns = np.zeros(args.num_envs), [[] for _ in range(args.num_envs)]
    while min(map(len, returns)) < quota:
        policy, _, state = agent(torch.as_tensor(obs), state, start)
        obs, reward, terminated, truncated, _ = envs.step(policy.logits.argmax(1).numpy())
        running += reward
        done = terminated | truncated
        for i in np.flatnonzero(done):
            returns[i].append(running[i])
        running[done] = 0.0
        start = torch.as_tensor(done)
    return float(np.mean([episodes[:quota] for episodes in returns]))


def main(args: Args) -> float:
    """Train; return the mean return of the most likely actions."""
    torch.manual_seed(args.seed)
    envs = make_envs(args)
    agent = Agent(envs.single_observation_space.shape[0], int(envs.single_action_space.n))
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)

    T, B = args.num_steps, args.num_envs
    obs = torch.zeros(T, B, *envs.single_observation_space.shape)
    starts = torch.zeros(T, B, dtype=torch.bool)
    actions = torch.zeros(T, B, dtype=torch.long)
    log_probs, rewards, values, next_values = torch.zeros(4, T, B)
    terminated, truncated = torch.zeros(2, T, B, dtype=torch.bool)

    next_obs = torch.as_tensor(envs.reset(seed=args.seed)[0])
    start = torch.ones(B, dtype=torch.bool)
    state = agent.first_state(B)
    running, returns = np.zeros(B), []
    num_updates = args.total_steps // (T * B)
    begin = time.perf_counter()

    for update in range(1, num_updates + 1):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (update - 1) / num_updates)

        # Play: where a step ends an episode, next_obs is the first of the next one.
        first_state = state  # [L, B, N]
        for t in range(T):
            obs[t], starts[t] = next_obs, start
            with torch.no_grad():
                policy, values[t], state = agent(next_obs, state, start)
                actions[t] = policy.sample()
                log_probs[t] = policy.log_prob(actions[t])
            step_obs, reward, ended, cut, info = envs.step(actions[t].numpy())
            next_obs = torch.as_tensor(step_obs)
            rewards[t] = torch.as_tensor(reward)
            terminated[t], truncated[t] = torch.as_tensor(ended), torch.as_tensor(cut)
            start = terminated[t] | truncated[t]
            if cut.any():  # an episode that was cut is worth what its last observation promises
                last_obs = next_obs.clone()
                last_obs[cut] = torch.as_tensor(np.stack(info["final_obs"][cut]))
                with torch.no_grad():
                    next_values[t] = agent(last_obs, state, torch.zeros(B))[1]
            running += reward
            returns.extend(running[start.numpy()])
            running[start.numpy()] = 0.0

        # Advantages: inside an episode, the next value is that of the next step.
        with torch.no_grad():
            bootstrap = agent(next_obs, state, start)[1]  # [B]
        following = torch.cat([values[1:], bootstrap.unsqueeze(0)])  # [T, B]
        next_values = torch.where(truncated, next_values, following)
        advantages, targets = gae(
            rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda, dim=0
        )

        # Learn: sequences in one call, whether or not episodes begin inside them.
        for _ in range(args.update_epochs):
            for rows in torch.randperm(B).chunk(args.num_minibatches):
                policy, value, _ = agent(obs[:, rows], first_state[:, rows], starts[:, rows])
                ratio = (policy.log_prob(actions[:, rows]) - log_probs[:, rows]).exp()
                advantage = advantages[:, rows]
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
                value_loss = 0.5 * (value - targets[:, rows]).square().mean()
                entropy = policy.entropy().mean()
                loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()

        agent.norm.update(obs)  # after learning, which needs the policy as it played

        if update % 16 == 0 or update == num_updates:
            steps, seconds = update * T * B, time.perf_counter() - begin
            print(
                f"{steps:7} steps {steps / seconds:7.0f}/s  return {np.mean(returns[-20:]):6.1f}  "
                f"value loss {value_loss.item():.3f}  entropy {entropy.item():.3f}"
            )
    envs.close()
    return evaluate(agent, args)


if __name__ == "__main__":
    print(f"return after training: {main(tyro.cli(Args)):.1f}")
