"""What each command of the command line takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import tyro

from ssm_fast.bench import Op
from ssm_fast.cli.presets import preset_names

# Trainers draw their seeds below 2**31: no episode of an evaluation was trained on.
EVALUATION_SEED = 3_000_000_000
EVALUATION_EPISODES = 10
LARGEST_SEED = 2**63 - 1  # of torch's generators
MOST_THREADS = 1024

DEFAULTS: dict[str, dict[str, Any]] = {
    "policy_gradient": {
        "env": "CartPole-v1",
        "episodes": 1600,
        "batch_size": 16,
        "seed": 0,
        "threads": 1,
    },
    "improved": {
        "env": "HalfCheetah-v5",
        "steps": 1_000_000,
        "batch_size": 8,
        "seed": 0,
        "threads": 1,
    },
    "meta_rl": {
        "env": "ssm_fast/CartPoleFamily-v0",
        "epochs": 20,
        "batch_size": 20,
        "seed": 0,
        "threads": 1,
        "tasks_per_epoch": 8,
        "trial_episodes": 1,
        "state_dim": 64,
        "hidden_dim": 64,
        "num_layers": 1,
    },
}


ADAPT_DEFAULTS: dict[str, Any] = {
    "episodes": 5,
    "rows": 8,  # with fewer, what is learnt in a few episodes cannot be told from noise
    "adapt_every": None,  # a fifth of the time limit
    "lr": 1e-4,
    "steps": 20,
    "max_kl": 0.03,
}
HYBRID_DEFAULTS: dict[str, Any] = ADAPT_DEFAULTS | {"experience_weight": 0.5}


def _default(text: str, metavar: str | None = None) -> Any:
    """Says what an option that is not given comes to."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})", metavar=metavar)


@dataclass(frozen=True)
class Train:
    """Train a policy and evaluate it.

    Under torchrun, the processes train one policy together; see docs/distributed.md.

    The run folder receives config.json, checkpoints, TensorBoard events, curve.csv, curve.png,
    policy.safetensors (for `ssm-fast evaluate` and `ssm_fast.load_policy`) and evaluation.json.
    What is not given takes the value of the preset, the default of the mode and its trainer, or,
    with --resume, the value that the run was started with.
    """

    mode: Annotated[
        Literal["policy_gradient", "meta_rl", "improved"] | None,
        _default("improved"),
    ] = None
    """policy_gradient: REINFORCE with StateSpaceModel (discrete actions). improved: recurrent PPO
    with ImprovedSSM (any actions). meta_rl: ImprovedSSM learns to adapt to the tasks of a family,
    by gradient steps (ProMP), in its state (RL^2, --inner_steps 0 --trial_episodes 2) or both."""
    preset: Annotated[str | None, _default("none", "{" + ",".join(preset_names()) + "}")] = None
    """Settings that were measured in a task: docs/results.md, docs/meta_rl.md. Options that are given
    override them."""
    env: Annotated[
        str | None,
        _default(
            "improved: HalfCheetah-v5, policy_gradient: CartPole-v1, "
            "meta_rl: ssm_fast/CartPoleFamily-v0"
        ),
    ] = None
    """Gymnasium id. meta_rl takes CartPole-v1 and the like for the family of tasks around it."""
    epochs: Annotated[int | None, _default("meta_rl: 20")] = None
    """Stop after so many epochs; meta_rl only."""
    episodes: Annotated[int | None, _default("policy_gradient: 1600")] = None
    """Stop after so many episodes."""
    steps: Annotated[int | None, _default("improved: 1000000, where --episodes is not given")] = (
        None
    )
    """Stop after so many environment steps. Of improved, the first 2,048 at most are not learnt from:
    they give the observations their first statistics."""
    seed: Annotated[int | None, _default("0")] = None
    """Seed of the weights, the environments and the actions."""
    out: Annotated[
        Path | None, _default("runs/MODE-ENV-seedSEED, of a preset runs/PRESET-seedSEED")
    ] = None
    """Run folder."""
    resume: bool = False
    """Continue the run in the run folder exactly where its last checkpoint left it. With more --steps
    (or episodes, or epochs) the learning rate goes on as in a run of that length."""
    overwrite: bool = False
    """Replace the run in the run folder. Files that are not a run's stay."""
    device: Annotated[Literal["cpu", "cuda"] | None, _default("cpu")] = None
    """Where the policy acts and learns; the environments stay on the CPU. A run may be continued on
    another one."""
    threads: Annotated[int | None, _default("1")] = None
    """Threads of torch, the kernels and the physics. Where the cores are free, 2 make PPO 1.2 to 1.4
    times as fast; where another process has one, they are slower."""
    lr: Annotated[
        float | None, _default("improved: 2e-4, policy_gradient: 5e-3, meta_rl: 1e-3")
    ] = None
    """Learning rate at the start."""
    gamma: Annotated[float | None, _default("improved, meta_rl: 0.99, policy_gradient: 0.999")] = (
        None
    )
    """Discount factor."""
    batch_size: Annotated[int | None, _default("improved: 8, policy_gradient: 16, meta_rl: 20")] = (
        None
    )
    """Environments side by side, of all processes together; in meta_rl those of each task, the
    trajectories of a gradient step."""
    state_dim: Annotated[int | None, _default("improved, meta_rl: 64, policy_gradient: 32")] = None
    """Size of the recurrent state."""
    hidden_dim: Annotated[int | None, _default("improved: 128, policy_gradient, meta_rl: 64")] = (
        None
    )
    """Width of the network around it."""
    num_layers: Annotated[int | None, _default("improved: 2, meta_rl: 1")] = None
    """Layers, each with a state."""
    critic_dim: Annotated[int | None, _default("none; improved only")] = None
    """Width of a network of the critic's own; without one it is linear in the actor's features."""
    log_std_init: Annotated[float | None, _default("-0.5; improved, meta_rl")] = None
    """Logarithm of the standard deviation of continuous actions, at the start."""
    entropy_coef: Annotated[float | None, _default("0")] = None
    """Weight of the entropy bonus."""
    max_grad_norm: Annotated[float | None, _default("0.5, meta_rl: 1")] = None
    """Gradients are scaled down to this norm."""
    anneal_lr: Annotated[bool | None, _default("True")] = None
    """Decay the learning rate linearly to zero."""
    checkpoint_interval: Annotated[
        int | None, _default("improved: 20, policy_gradient, meta_rl: 10")
    ] = None
    """Iterations between checkpoints. In improved, all environments are reset there: at least five
    episodes of the time limit lie between two of them."""
    gae_lambda: Annotated[float | None, _default("0.95; improved and meta_rl")] = None
    """Weight of longer returns in the advantages."""
    clip_epsilon: Annotated[float | None, _default("improved: 0.2, meta_rl: 0.3")] = None
    """PPO's clipping range."""
    value_coef: Annotated[float | None, _default("0.5; improved only")] = None
    """Weight of the value loss."""
    ppo_epochs: Annotated[int | None, _default("10; improved only")] = None
    """Passes over each rollout."""
    mini_batch_size: Annotated[int | None, _default("128; improved only")] = None
    """Steps in a minibatch."""
    num_steps: Annotated[
        int | None, _default("improved: 2048 over all, meta_rl: the time limit")
    ] = None
    """Steps of each environment in a rollout, or in a round of meta_rl."""
    sequence_length: Annotated[int | None, _default("at most 8; improved only")] = None
    """Steps that are learnt from as one sequence."""
    target_kl: Annotated[float | None, _default("none; improved only")] = None
    """End an update early beyond this KL divergence."""
    desired_kl: Annotated[float | None, _default("none; improved only")] = None
    """Let the learning rate follow the KL divergence of the updates, towards this."""
    recurrent_lr_scale: Annotated[float | None, _default("0.1; not meta_rl")] = None
    """Length of the steps of the weights around the recurrent states, in learning rates."""
    staggered_resets: Annotated[bool | None, _default("False; improved only")] = None
    """Let environments with a time limit restart at different times; see the results of HalfCheetah."""
    tasks_per_epoch: Annotated[int | None, _default("8; meta_rl only")] = None
    """Tasks of an epoch, which are played and adapted to together."""
    inner_lr: Annotated[float | None, _default("0.3; meta_rl only")] = None
    """Length of the gradient steps in a task; where it is learnt, at the start."""
    outer_lr: Annotated[float | None, _default("1e-3; meta_rl only")] = None
    """Learning rate of the shared weights at the start; --lr says the same."""
    inner_steps: Annotated[int | None, _default("2; meta_rl only")] = None
    """Gradient steps in a task, each on episodes of its own."""
    outer_epochs: Annotated[int | None, _default("5; meta_rl only")] = None
    """Passes of the outer update over an epoch's episodes."""
    tasks_per_minibatch: Annotated[int | None, _default("2; meta_rl only")] = None
    """Tasks in a minibatch of the outer update."""
    first_order: Annotated[bool | None, _default("False; meta_rl only")] = None
    """Leave out the derivative of the inner gradients."""
    learn_inner_lr: Annotated[bool | None, _default("True; meta_rl only")] = None
    """Learn a rate of the inner steps for each weight (Meta-SGD)."""
    trial_episodes: Annotated[int | None, _default("1; meta_rl only")] = None
    """With 2 or more: episodes of a trial, through which the state is kept; the policy then also
    sees its last action and reward, and where an episode ended."""
    evaluation_interval: Annotated[int | None, _default("10; meta_rl only")] = None
    """Epochs between evaluations on held-out tasks, which go to curve.csv and TensorBoard."""


@dataclass(frozen=True)
class Evaluate:
    """Play a trained policy and print its returns."""

    path: Annotated[Path, tyro.conf.Positional]
    """A policy.safetensors, or a run folder. That of a meta_rl run adapts to held-out tasks."""
    episodes: Annotated[int | None, _default("10; not of a meta_rl run")] = None
    """Number of episodes; a meta_rl run plays one in each of its rows."""
    seed: int = EVALUATION_SEED
    """Seed of the first episode; the next ones count up."""
    env: str | None = None
    """Gymnasium id; by default the one that the policy was trained in."""
    task: int | None = None
    """Number of the task in the task family of the environment; by default the one that the policy
    was adapted to, or else what the environment plays anyway."""
    split: Literal["train", "test", "out_of_range"] = "test"
    """Which tasks of the family --task counts."""
    max_episode_steps: int | None = None
    """Truncate episodes here; by default where the environment does. Not of a meta_rl run."""
    deterministic: bool = True
    """Play the mode of the policy, not samples. A meta_rl run, which learns from samples, tells what
    these earn, and what the modes do."""
    video: Path | None = None
    """Also film an episode from the seed of the first, to this .mp4 file; not of a meta_rl run."""


Method: TypeAlias = Literal["standard", "hybrid", "test_time", "gradient"]


@dataclass(frozen=True)
class Adapt:
    """Adapt a trained policy to a task while it plays it.

    Prints each episode's return beside that of the policy as it was, from the same first states, and
    then the deterministic returns of both. The adapted policy is written for `ssm-fast evaluate` and
    `ssm_fast.load_policy`.
    """

    path: Annotated[Path, tyro.conf.Positional]
    """A policy.safetensors of PPO, or a run folder; for --method gradient that of a meta_rl run."""
    env: str | None = None
    """Gymnasium id; by default the one that the policy was trained in."""
    task: int | None = None
    """Number of the task in the task family of the environment; by default the one that the policy
    was adapted to. A policy of an environment that a family varies has learnt its task already, and
    takes task 0; --env plays the environment as it is."""
    split: Literal["train", "test", "out_of_range"] = "test"
    """Which tasks of the family --task counts."""
    method: Annotated[
        Method | None,
        _default("test_time, of a meta_rl run gradient"),
    ] = None
    """standard: the last stretch. hybrid: with replay of those before. test_time: value ensemble,
    exploration by uncertainty, step size by difficulty. gradient: the gradient steps that a meta_rl
    run was trained for, at its inner rates, one between any two episodes."""
    episodes: Annotated[int | None, _default("5, gradient: 4")] = None
    """Episodes to adapt in."""
    rows: Annotated[int | None, _default("8, gradient: as the run")] = None
    """Copies of the task that are played side by side and learnt from together."""
    adapt_every: Annotated[int | None, _default("a fifth of the time limit; not gradient")] = None
    """Steps of every row between two updates."""
    lr: Annotated[float | None, _default("1e-4; not gradient")] = None
    """Learning rate."""
    steps: Annotated[int | None, _default("20; not gradient")] = None
    """Gradient steps of an update; standard and hybrid take as many for the values before it."""
    max_kl: Annotated[float | None, _default("0.03; not gradient")] = None
    """Largest KL divergence of the policy after an update from that before; with test_time, from
    those that acted."""
    experience_weight: Annotated[float | None, _default("0.5; hybrid only")] = None
    """Weight of the replay in the loss, in [0, 1]; the last stretch has the rest."""
    max_episode_steps: int | None = None
    """Truncate episodes here; by default where the environment does."""
    seed: int = 0
    """Seed of the environment and of the actions."""
    out: Path = Path("adapted.safetensors")
    """File of the adapted policy; an earlier one there is replaced."""


@dataclass(frozen=True)
class App:
    """Open the web app: train, load, adapt and watch policies, and time the kernels."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in. There is no password."""
    port: int = 7860
    """Port to listen at."""


@dataclass(frozen=True)
class Bench:
    """Measure the ops and layers on this machine, beside what does the same otherwise.

    Contenders take turns; the medians go to bench.json, bench.md and bench.png. The batch of the
    larger contests grows with the threads; --device cuda takes those of a GPU.
    """

    out: Path = Path("bench")
    """Folder of the results; those of an earlier run there are replaced."""
    compare: Path | None = None
    """A bench.json of before: what has become slower since, by the clock and beside its peers, is
    named, and the exit code is 1."""
    tolerance: float = 0.25
    """What counts as slower: 0.25 is a quarter more time."""
    ops: tuple[Op, ...] = ()
    """What to measure; by default everything."""
    quick: bool = False
    """Small sizes only."""
    seconds: float = 5.0
    """After so many seconds, a contest begins no further round, but for the first three."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to measure."""
    threads: int | None = None
    """Threads of torch and the kernels; by default as many as torch takes."""


@dataclass(frozen=True)
class Info:
    """Print versions, instruction sets, threads and GPUs."""


COMMANDS: dict[str, Callable[..., Any]] = {
    "train": Train,
    "evaluate": Evaluate,
    "adapt": Adapt,
    "app": App,
    "bench": Bench,
    "info": Info,
}
