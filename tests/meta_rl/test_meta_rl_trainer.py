from __future__ import annotations

import copy
import math
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.func import functional_call

from ssm_fast.checkpoint import load_inner_rates, save_model
from ssm_fast.core import ImprovedSSM, StateSpaceModel
from ssm_fast.env_runner import Environment, TrialEnvironment, get_family
from ssm_fast.meta_rl import meta_rl_trainer
from ssm_fast.meta_rl.meta_maml import inner_update
from ssm_fast.meta_rl.meta_rl_trainer import MetaRLTrainer, PolicyBreakdown
from ssm_fast.meta_rl.run import RunDirectory
from ssm_fast.meta_rl.training_state import save_policy

pytestmark = [pytest.mark.isa_independent, pytest.mark.usefixtures("one_thread")]

CARTPOLE = "ssm_fast/CartPoleFamily-v0"
CHEETAH = "ssm_fast/HalfCheetahDir-v0"
G, R = 3, 4


def environment(name=CARTPOLE, trial=1, rows=G * R, limit=None):
    env = Environment(name, rows, limit, seed=0)
    return env if trial == 1 else TrialEnvironment(env, trial)


def trainer_for(env, dtype=torch.float32, normalize=True, **options):
    torch.manual_seed(0)
    model = ImprovedSSM(
        env.input_dim,
        env.action_dim,
        state_dim=8,
        hidden_dim=12,
        num_layers=1,
        discrete=env.discrete,
        normalize_observations=normalize,
    ).to(dtype)
    settings = {"tasks_per_epoch": G, "num_steps": 20, "seed": 5, "evaluation_interval": 2}
    return MetaRLTrainer(model, **(settings | options))


def tasks_of(env, count=G):
    return env.family.sample(count, 0)


# Playing


@pytest.mark.parametrize(("name", "trial"), [(CARTPOLE, 1), (CARTPOLE, 2), (CHEETAH, 1)])
def test_collect(name, trial):
    env = environment(name, trial, limit=None if name == CARTPOLE else 12)
    trainer = trainer_for(env, torch.float64, num_steps=60)
    env.set_tasks([task for task in tasks_of(env) for _ in range(R)])
    weights = {name: w + 0.3 * torch.randn_like(w) for name, w in trainer.shared_weights(G).items()}
    played = trainer.collect(env, weights, seed=7)
    E = trial
    assert played.observations.shape == (G, R, 60, env.input_dim)
    assert played.episode_returns.shape == (G, R, E)
    assert trainer.timesteps == G * R * 60
    ends = played.terminated | played.truncated
    assert torch.equal(played.reset[..., 1:], ends[..., :-1])
    assert played.reset[..., 0].all()
    for g in range(G):
        model = copy.deepcopy(trainer.model)
        model.load_state_dict({n: w[g] for n, w in weights.items()}, strict=False)
        with torch.no_grad():
            log_probs, _, _ = model.evaluate_actions(
                played.observations[g], played.actions[g], reset=played.reset[g]
            )
        torch.testing.assert_close(played.log_probs[g], log_probs, rtol=1e-9, atol=1e-9)
        for r in range(R):
            stops = [-1, *np.flatnonzero(ends[g, r]), 59]
            if trial == 1:
                expected = [played.rewards[g, r, : stops[1] + 1].sum()]
            else:  # a trial of two episodes: the input says where the first one ended
                first = played.rewards[g, r, : stops[1] + 1]
                over = played.observations[g, r, : stops[1] + 1, -1].nonzero().flatten().tolist()
                cut = over[0] if over else len(first)
                expected = [first[:cut].sum(), first[cut:].sum()]
            np.testing.assert_allclose(played.episode_returns[g, r], expected, rtol=1e-9)


def test_collect_is_seeded():
    env = environment()
    trainer = trainer_for(env)
    env.set_tasks([task for task in tasks_of(env) for _ in range(R)])
    rounds = []
    for seed in (1, 1, 2):
        rounds.append(trainer.collect(env, trainer.shared_weights(G), seed))
    assert torch.equal(rounds[0].observations, rounds[1].observations)
    assert torch.equal(rounds[0].actions, rounds[1].actions)
    assert not torch.equal(rounds[0].observations, rounds[2].observations)


def policy_gradient_loss(model, weights, batch, g):
    """The inner loss of task g, written out."""
    inputs = batch["observations"][g], None, batch["reset"][g]
    mean, log_std, _, _ = functional_call(model, weights, inputs)
    if log_std is None:
        log_prob = torch.distributions.Categorical(logits=mean).log_prob(batch["actions"][g])
    else:
        normal = torch.distributions.Normal(mean, log_std.exp())
        log_prob = normal.log_prob(batch["actions"][g]).sum(-1)
    return (log_prob - batch["log_probs"][g]).exp(), batch["advantages"][g]


def adapted_by_hand(model, rates, rounds, g, weights):
    """Weights of task g after a step on each of the rounds, and the graph to the shared ones."""
    for batch in rounds:
        ratio, advantages = policy_gradient_loss(model, weights, batch, g)
        loss = -(ratio * advantages).mean()
        names = list(weights)
        found = torch.autograd.grad(
            loss, [weights[n] for n in names], create_graph=True, allow_unused=True
        )
        weights = {
            n: weights[n] if d is None else weights[n] - rates[n] * d
            for n, d in zip(names, found, strict=True)
        }
    return weights


@pytest.mark.parametrize("name", [CARTPOLE, CHEETAH])
def test_adapt(name):
    env = environment(name)
    trainer = trainer_for(env, torch.float64)
    before = copy.deepcopy(trainer.model.state_dict())
    adaptation = trainer.adapt(env, tasks_of(env), 2, seed=3)
    assert adaptation.returns.shape == (3, G, R, 1)
    shared = {n: p for n, p in trainer.model.named_parameters() if not n.startswith("critic.")}
    for g in range(G):
        expected = adapted_by_hand(trainer.model, trainer.rates, adaptation.rounds[:2], g, shared)
        for n, weight in expected.items():
            torch.testing.assert_close(adaptation.weights[n][g], weight, rtol=1e-8, atol=1e-10)
    assert all(torch.equal(x, before[n]) for n, x in trainer.model.state_dict().items())


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(("name", "K"), [(CARTPOLE, 1), (CARTPOLE, 2), (CHEETAH, 1), (CHEETAH, 0)])
def test_update(name, K, first_order):
    """One step of plain gradient descent, against a loop over tasks."""
    env = environment(name)
    trainer = trainer_for(
        env,
        torch.float64,
        inner_steps=K,
        first_order=first_order,
        learn_inner_lr=not first_order,
        outer_epochs=1,
        tasks_per_minibatch=G,
        max_grad_norm=1e9,
    )
    rounds = trainer.adapt(env, tasks_of(env), K, seed=3).rounds
    shared = {n: p for n, p in trainer.model.named_parameters() if not n.startswith("critic.")}
    losses = []
    for g in range(G):
        for k in range(K + 1):
            weights = adapted_by_hand(trainer.model, trainer.rates, rounds[:k], g, shared)
            if first_order:
                weights = {n: shared[n] + (w - shared[n]).detach() for n, w in weights.items()}
            ratio, advantages = policy_gradient_loss(trainer.model, weights, rounds[k], g)
            clipped = ratio.clamp(0.7, 1.3)
            losses.append(-torch.minimum(ratio * advantages, clipped * advantages).mean())
    learnt = list(shared.values()) + ([] if first_order else list(trainer.rates.values()))
    loss = torch.stack(losses).mean()
    expected = torch.autograd.grad(loss, learnt, allow_unused=True, materialize_grads=True)
    before = [p.detach().clone() for p in learnt]
    trainer.optimizer = torch.optim.SGD(learnt, lr=1e-3)
    metrics = trainer.update(rounds)
    for p, start, gradient in zip(learnt, before, expected, strict=True):
        moved = (start - p.detach()) / 1e-3
        torch.testing.assert_close(moved, gradient, rtol=1e-7, atol=1e-9)
    norm = math.sqrt(sum(float(d.square().sum()) for d in expected))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)


def test_learnt_rates():
    env = environment()
    trainer = trainer_for(env, outer_lr=0.05)
    assert float(trainer.rates["layers.0.A"].detach().mean()) == pytest.approx(0.03)
    assert float(trainer.rates["actor.weight"].detach().mean()) == pytest.approx(0.3)
    before = {n: rate.detach().clone() for n, rate in trainer.rates.items()}
    trainer.update(trainer.adapt(env, tasks_of(env), 1, seed=0).rounds)
    moved = [n for n, rate in trainer.rates.items() if not torch.equal(rate.detach(), before[n])]
    assert {"actor.weight", "layers.0.A", "encoder.weight"} <= set(moved)
    assert all(bool((rate >= 0).all()) for rate in trainer.rates.values())


def test_evaluate():
    env = environment()
    trainer = trainer_for(env, num_steps=500)
    before = copy.deepcopy(trainer.model.state_dict())
    tasks = tasks_of(env, 5)  # three and two
    returns = trainer.evaluate(env, tasks, 1, seed=9)
    assert returns.shape == (2, 5, R, 1)
    assert trainer.timesteps == 0
    assert all(torch.equal(x, before[n]) for n, x in trainer.model.state_dict().items())
    modes = trainer.evaluate(env, tasks[:3], 0, seed=9, deterministic=True)
    assert np.array_equal(modes, trainer.evaluate(env, tasks[:3], 0, seed=9, deterministic=True))
    again = [trainer.evaluate(env, tasks, 1, seed=8) for _ in range(2)]  # sampled, and seeded
    assert np.array_equal(*again)
    with pytest.raises(ValueError, match="tasks must not be empty"):
        trainer.evaluate(env, ())


def test_every_round_starts_elsewhere():
    env = environment()
    rounds = trainer_for(env).adapt(env, [env.family.default_task] * G, 2, seed=3).rounds
    first = np.concatenate([x["observations"][:, :, 0].reshape(G * R, -1) for x in rounds])
    assert len(np.unique(first, axis=0)) == 3 * G * R


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_ratio_beyond_floats(sign):
    """A policy far from the one that acted has a gradient, or none; it is not NaN."""
    env = environment()
    trainer = trainer_for(env)
    rounds = trainer.adapt(env, tasks_of(env), 1, seed=0).rounds
    for batch in rounds:
        batch["log_probs"] = batch["log_probs"] + sign * 200.0
    assert math.isfinite(trainer.update(rounds)["grad_norm"])


@pytest.fixture
def third_step_breaks(monkeypatch):
    """The third inner step in a row leads to NaN in task 1."""
    steps = 0

    def update(loss, weights, batch, rates, first_order=False):
        nonlocal steps
        adapted, losses = inner_update(loss, weights, batch, rates, first_order)
        steps += 1
        if steps % 3 == 0:
            adapted["actor.bias"][1] = math.nan
        return adapted, losses

    monkeypatch.setattr(meta_rl_trainer, "inner_update", update)


def test_evaluation_that_diverges(third_step_breaks):
    """The other tasks still have metrics."""
    env = environment()
    trainer = trainer_for(env)
    reason = "task 1: inner step 2 leads to a actor.bias that is not finite"
    with pytest.warns(UserWarning, match=f"1 of 4 tasks broke down, .* {reason}"):
        returns = trainer.evaluate(env, tasks_of(env, 4), steps=3)  # three and one
    assert np.isnan(returns[3, 1]).all()
    assert np.isfinite(returns[:3]).all()
    assert np.isfinite(returns[3, [0, 2, 3]]).all()
    with pytest.raises(PolicyBreakdown, match=reason) as raised:
        trainer.adapt(env, tasks_of(env), 3, seed=0)
    assert raised.value.task == 1
    copied = pickle.loads(pickle.dumps(raised.value))
    assert (copied.task, str(copied)) == (1, str(raised.value))


def test_policy_that_breaks_down_while_it_plays(monkeypatch):
    """Finite weights may still overflow; the shared policy may not."""
    env = environment()
    trainer = trainer_for(env)

    def update(loss, weights, batch, rates, first_order=False):
        adapted, losses = inner_update(loss, weights, batch, rates, first_order)
        adapted["layers.0.A"][2] = 1e30
        return adapted, losses

    monkeypatch.setattr(meta_rl_trainer, "inner_update", update)
    adaptation = trainer.adapt(env, tasks_of(env), 2, seed=0, keep_going=True)
    assert list(adaptation.breakdowns) == [2]
    assert torch.isfinite(adaptation.returns[:, :2]).all()
    assert torch.isnan(adaptation.returns[:, 2]).all(-1).all(-1).tolist() == [False, True, True]
    assert torch.equal(adaptation.weights["layers.0.A"][2], trainer.model.layers[0].A)
    with torch.no_grad():
        trainer.model.layers[0].A.fill_(1e30)
    with pytest.raises(PolicyBreakdown):
        trainer.adapt(env, tasks_of(env), 1, seed=0, keep_going=True)


# Training


def test_learns_to_adapt():
    """The sign of the force is known to no policy before it has played."""
    env = environment(rows=8 * 10)
    trainer = trainer_for(env, tasks_per_epoch=8, num_steps=100)
    trainer.train(env, 6, test_tasks=())
    before, after = trainer.evaluate(env, env.family.test_tasks[:16], 1).mean((1, 2, 3))
    assert before < 60
    assert after > 80


@pytest.mark.parametrize("trial", [1, 2])
def test_resumed_equals_uninterrupted(trial, tmp_path):
    def train(folder, epochs, resume=False):
        with environment(trial=trial) as env, RunDirectory(folder, resume=resume) as run:
            trainer = trainer_for(env, anneal_lr=False)
            result = trainer.train(env, epochs, run=run, resume=resume)
            return trainer, result, run.read_rows()

    whole, result, rows = train(tmp_path / "whole", 4)
    assert len(result.metrics) == result.iterations == 4
    assert result.timesteps == whole.timesteps == (4 * 3 + 1) * G * R * 20
    assert len(result.episode_returns) == 4 * G * R
    train(tmp_path / "parts", 2)
    resumed, result, again = train(tmp_path / "parts", 4, resume=True)
    assert result.iterations == 4
    again_weights = resumed.model.state_dict()
    for n, x in whole.model.state_dict().items():
        assert torch.equal(x, again_weights[n])
    timing = {"seconds", "steps_per_second", "playing"}
    for a, b in zip(rows, again, strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == pytest.approx(
            {k: v for k, v in b.items() if k not in timing}, rel=0, abs=0, nan_ok=True
        )
    assert math.isnan(rows[0]["test_return_1"])
    assert rows[1]["test_return_1"] > 0
    policy = ImprovedSSM.load(tmp_path / "parts" / "policy.safetensors")
    assert torch.equal(policy.encoder.weight, resumed.model.encoder.weight)
    rates = load_inner_rates(tmp_path / "parts" / "policy.safetensors")
    assert torch.equal(rates["encoder.weight"], resumed.rates["encoder.weight"])


def test_rl2_takes_no_gradient_steps():
    env = environment(trial=2)
    trainer = trainer_for(env, inner_steps=0, normalize=False)
    result = trainer.train(env, 2)
    assert "test_return_0" in result.metrics[0]
    assert "test_return_1" not in result.metrics[0]
    assert result.metrics[0]["return_0"] == result.metrics[0]["episode_return"]
    assert result.metrics[0]["grad_norm"] > 0


def test_callback_stops():
    env = environment()
    trainer = trainer_for(env)
    seen = []
    trainer.train(env, 5, test_tasks=(), callback=lambda metrics: seen.append(metrics) or False)
    assert len(seen) == 1
    assert trainer.iteration == 1


def test_global_generator_is_left_alone():
    env = environment()
    trainer = trainer_for(env)
    before = torch.get_rng_state()
    trainer.train(env, 1, test_tasks=())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_determines_a_run_beside_others():
    alone = trainer_for(environment())
    alone.train(environment(), 2)
    trainers = [trainer_for(environment()) for _ in range(2)]
    turn = threading.Barrier(2, timeout=60.0)

    def train(trainer):
        def draw(metrics):
            torch.rand(3)  # as whoever else uses torch's global generator
            turn.wait()

        trainer.train(environment(), 2, callback=draw)

    with ThreadPoolExecutor() as pool:
        list(pool.map(train, trainers))
    for trainer in trainers:
        for n, x in trainer.model.state_dict().items():
            assert torch.equal(x, alone.model.state_dict()[n])


def test_adapts_to_what_an_environment_plays():
    """One task alone takes the step that it takes beside others."""
    env = environment()
    task = tasks_of(env)[1]
    played, model = [], None
    for tasks in (None, [task]):
        with Environment(CARTPOLE, R, tasks=[task] * R) as alone:
            trainer = trainer_for(env, num_steps=None)
            adaptation = trainer.adapt(alone, tasks, 2, seed=7)
        assert adaptation.returns.shape == (3, 1, R, 1)
        played.append(adaptation)
        model = trainer.adapted_model(adaptation.weights)
    for name, weight in played[0].weights.items():
        assert torch.equal(weight, played[1].weights[name])
        assert torch.equal(model.state_dict()[name], weight[0])
    assert not torch.equal(model.actor.weight, trainer.model.actor.weight)
    assert torch.equal(model.critic.weight, trainer.model.critic.weight)
    with Environment("CartPole-v1", R) as plain:
        returns = trainer.adapt(plain, None, 1, seed=7).returns
    assert returns.shape == (2, 1, R, 1)
    assert (returns > 1.0).all()


def test_from_policy_takes_the_same_steps(tmp_path):
    """Everything that a gradient step needs is in the policy's file."""
    path = tmp_path / "policy.safetensors"
    env = environment()
    task = tasks_of(env)[1]
    trainer = trainer_for(env, gamma=0.9, gae_lambda=0.8, inner_steps=1, num_steps=30)
    trainer.model.encoder.bias.requires_grad_(False)
    trainer = MetaRLTrainer(trainer.model, **trainer._settings())
    trainer.train(env, 1, test_tasks=())
    save_policy(path, trainer, env)
    downloaded = MetaRLTrainer.from_policy(path)
    assert downloaded.rows_per_task == trainer.rows_per_task == R
    assert downloaded.policy_metadata == trainer.policy_metadata
    for found in (trainer, downloaded):
        torch.manual_seed(3)
        found.adaptation = found.adapt(env, [task], 2, seed=7)
    expected = trainer.adaptation
    assert torch.equal(downloaded.adaptation.returns, expected.returns)
    assert downloaded.adaptation.weights.keys() == expected.weights.keys()
    assert "encoder.bias" not in expected.weights
    for name, weight in downloaded.adaptation.weights.items():
        assert torch.equal(weight, expected.weights[name])


# Mistakes


@pytest.mark.parametrize("inner_loop", [None, "{", "[]", "{}", '{"inner_steps": "2"}', "gamma"])
def test_from_policy_of_a_file_without_steps(inner_loop, tmp_path):
    path = tmp_path / "policy.safetensors"
    trainer = trainer_for(environment())
    trainer.model.save(path)
    with pytest.raises(ValueError, match=r"policy.safetensors must hold inner rates"):
        MetaRLTrainer.from_policy(path)
    metadata = dict(trainer.policy_metadata)
    if inner_loop is None:
        del metadata["inner_loop"]
    elif inner_loop == "gamma":
        metadata["inner_loop"] = metadata["inner_loop"].replace("0.99", "1e999")
    else:
        metadata["inner_loop"] = inner_loop
    save_model(path, trainer.model, metadata, trainer.rates)
    message = "must hold inner rates" if inner_loop is None else "inner_loop in the header"
    with pytest.raises(ValueError, match=rf"policy.safetensors.*{message}"):
        MetaRLTrainer.from_policy(path)


def test_inner_steps_that_diverge():
    env = environment(CHEETAH)
    trainer = trainer_for(env, inner_lr=1e38)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(FloatingPointError, match=r"epoch 0: HalfCheetahDirTask\("):
        trainer.train(env, 1)
    norm = "obs_norm"
    for n, x in trainer.model.state_dict().items():
        assert n.startswith(norm) or torch.equal(x, before[n])


@pytest.mark.parametrize("what", ["reward", "observation"])
def test_nan_of_an_environment(what, monkeypatch):
    env = environment()
    trainer = trainer_for(env)
    step = env._vector.step

    def broken(actions):
        obs, rewards, *rest = step(actions)
        (rewards if what == "reward" else obs)[2] = math.nan
        return obs, rewards, *rest

    monkeypatch.setattr(env._vector, "step", broken)
    with pytest.raises(FloatingPointError, match=f"epoch 0: step 0: .*environment 2.*{what}"):
        trainer.train(env, 1)


def test_nan_of_an_environment_in_an_evaluation(monkeypatch):
    """It ends the training, as everywhere."""
    env = environment()
    trainer = trainer_for(env)
    step, evaluate = env._vector.step, trainer.evaluate

    def broken(actions):
        obs, rewards, *rest = step(actions)
        return obs, rewards * math.nan, *rest

    def evaluates(*arguments):
        monkeypatch.setattr(env._vector, "step", broken)
        return evaluate(*arguments)

    trainer.evaluate = evaluates
    with pytest.raises(FloatingPointError, match=r"epoch 2: step 0: .*reward"):
        trainer.train(env, 2)


def test_outer_step_that_is_not_finite():
    env = environment()
    trainer = trainer_for(env)
    rounds = trainer.adapt(env, tasks_of(env), 1, seed=0).rounds
    before = copy.deepcopy(trainer.model.state_dict())
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e39
    with pytest.raises(FloatingPointError, match="the step of the optimizer leads to"):
        trainer.update(rounds)
    assert all(torch.equal(x, before[n]) for n, x in trainer.model.state_dict().items())


@pytest.mark.parametrize("count", [2, 5])
def test_update_takes_any_number_of_tasks(count):
    env = environment(rows=count * R)
    trainer = trainer_for(env, outer_epochs=1)
    rounds = trainer.adapt(env, tasks_of(env, count), 1, seed=0).rounds
    rounds[0]["advantages"][count - 1] = math.nan
    with pytest.raises(FloatingPointError, match="meta-loss nan"):
        trainer.update(rounds)


def test_frozen_parameters_stay():
    env = environment()
    trainer_for(env)
    model = ImprovedSSM(4, 2, 8, 12, 1, discrete=True)
    model.encoder.requires_grad_(False)
    trainer = MetaRLTrainer(model, tasks_per_epoch=G, num_steps=20, evaluation_interval=9)
    before = copy.deepcopy(model.encoder.state_dict())
    trainer.train(env, 1, test_tasks=())
    assert all(torch.equal(x, before[n]) for n, x in model.encoder.state_dict().items())
    assert "encoder.weight" not in trainer.rates


def test_changes_of_the_model_after_construction():
    env = environment()
    trainer = trainer_for(env, outer_epochs=1)
    rounds = trainer.adapt(env, tasks_of(env), 1, seed=0).rounds
    encoder, kept = trainer.model.encoder, copy.deepcopy(trainer.state_dict()["model"])

    def refuses(error, match):
        for call in (
            lambda: trainer.train(env, 1, test_tasks=()),
            lambda: trainer.adapt(env, tasks_of(env), 1, seed=0),
            lambda: trainer.update(rounds),
        ):
            with pytest.raises(error, match=match):
                call()

    encoder.bias.requires_grad_(False)
    refuses(ValueError, r"encoder\.bias of the model must be trained exactly if")
    encoder.bias.requires_grad_(True)
    bias = encoder.bias
    encoder.bias = torch.nn.Parameter(bias.detach().clone())
    refuses(ValueError, r"encoder\.bias of the model must be trained exactly if")
    encoder.bias = bias
    trainer.model.double()
    refuses(TypeError, r"must stay torch\.float32 on cpu, .* got .* of torch\.float64")
    trainer.model.float()
    assert all(torch.equal(x, kept[n]) for n, x in trainer.model.state_dict().items())
    trainer.update(rounds)


def test_layers_that_are_one():
    """Rolled out and differentiated as what they are; the model keeps its parameters."""
    env = environment()
    torch.manual_seed(0)
    model = ImprovedSSM(4, 2, 8, 12, 2, discrete=True)
    model.layers[1] = model.layers[0]
    before = dict(model.named_parameters(remove_duplicate=False))
    trainer = MetaRLTrainer(model, tasks_per_epoch=G, num_steps=20, seed=5)
    trainer.train(env, 1, test_tasks=())
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in before.items())


def test_learns_from_the_training_tasks_alone(monkeypatch):
    env = environment()
    trainer = trainer_for(env, evaluation_interval=1)
    played = []
    monkeypatch.setattr(trainer, "_set_tasks", lambda env, tasks: played.append(list(tasks)))
    trainer.train(env, 2)
    family = env.family
    assert len(played) == 5  # normalisation, then an epoch and an evaluation, twice
    for i, tasks in enumerate(played):
        assert set(tasks) <= set(family.test_tasks if i in (2, 4) else family.train_tasks)


def test_another_model():
    with pytest.raises(TypeError, match="model must be an ImprovedSSM, got StateSpaceModel"):
        MetaRLTrainer(StateSpaceModel())


def test_weights_that_are_not_finite():
    env = environment()
    trainer = trainer_for(env, tasks_per_minibatch=G)
    weights = trainer.shared_weights(G)
    weights["actor.bias"] = weights["actor.bias"].clone()
    weights["actor.bias"][1] = math.nan
    with pytest.raises(
        FloatingPointError, match=r"task 1: the policy is not .* step 0 .* its row 0"
    ):
        trainer.collect(env, weights, 0)
    rounds = trainer.adapt(env, tasks_of(env), 1, seed=0).rounds
    rounds[1]["advantages"][0, 0, 0] = math.nan
    before = trainer.model.actor.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="meta-loss nan"):
        trainer.update(rounds)
    assert torch.equal(trainer.model.actor.weight, before)


@pytest.mark.parametrize("part", ["model", "optimizer", "parameters", "frozen"])
def test_a_part_that_is_replaced(part):
    env = environment()
    trainer = trainer_for(env)
    if part == "model":
        trainer.model = copy.deepcopy(trainer.model)
    elif part == "optimizer":
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    elif part == "parameters":
        trainer.model.load_state_dict(trainer.model.state_dict(), assign=True)
    else:
        trainer.model.layers[0].A.requires_grad_(False)
    words = "must keep the optimizer" if part == "optimizer" else "of the model must be trained"
    with pytest.raises(ValueError, match=f"{words}.*make a new trainer"):
        trainer.train(env, 1)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_model_that_is_wrapped():
    model = trainer_for(environment()).model
    for wrapped in (torch.compile(model), torch.nn.DataParallel(model)):
        with pytest.raises(TypeError, match=r"an ImprovedSSM, got .*: give the model"):
            MetaRLTrainer(wrapped)


def test_episodes_that_end_at_once():
    """Where nothing can be told apart, nothing is learnt: rounding is not blown up."""
    env = environment(limit=1)
    trainer = trainer_for(env, num_steps=3)
    adaptation = trainer.adapt(env, tasks_of(env), 1, seed=0)
    assert all(float(batch["advantages"].abs().max()) < 0.01 for batch in adaptation.rounds)
    for n, weight in adaptation.weights.items():
        torch.testing.assert_close(weight, trainer.shared_weights(G)[n], rtol=0, atol=1e-3)
    assert adaptation.returns.eq(1.0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_lr": -1.0}, "inner_lr must be finite and at least 0, got -1.0"),
        ({"outer_lr": math.nan}, "outer_lr must be finite and positive, got nan"),
        ({"inner_steps": -1}, "inner_steps must be at least 0, got -1"),
        ({"tasks_per_epoch": 0}, "tasks_per_epoch must be at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"gamma": 1.1}, r"gamma must be finite and in \[0, 1\], got 1.1"),
    ],
)
def test_settings_out_of_range(options, message):
    with environment() as env, pytest.raises(ValueError, match=message):
        trainer_for(env, **options)


def test_environments_that_do_not_fit():
    env = environment()
    trainer = trainer_for(env, num_steps=None)
    with pytest.raises(ValueError, match="CartPole-v1 must have tasks"):
        trainer.train(Environment("CartPole-v1", G), 1)
    with pytest.raises(TypeError, match="env must be an Environment or a TrialEnvironment"):
        trainer.train("CartPole-v1", 1)
    with pytest.raises(ValueError, match="as many rows for each of 3 tasks, got 4"):
        trainer.train(environment(rows=4), 1)
    with pytest.raises(ValueError, match=r"HalfCheetah.* has 17 .*, the model is for 4"):
        trainer.train(environment(CHEETAH), 1)
    with pytest.raises(ValueError, match=r"has 8 observations .*, the model is for 4"):
        trainer.train(environment(trial=2), 1)
    with pytest.raises(ValueError, match="train_tasks must not be empty"):
        trainer.train(env, 1, train_tasks=())
    with pytest.raises(ValueError, match="as many rows for each of 5 tasks, got 12"):
        trainer.adapt(env, tasks_of(env, 5), 1, seed=0)
    with pytest.raises(ValueError, match="tasks must not be empty"):
        trainer.adapt(env, [], 1, seed=0)
    with pytest.raises(ValueError, match="CartPole-v1 must have tasks"):
        trainer.adapt(Environment("CartPole-v1", G), tasks_of(env), 1, seed=0)
    with pytest.raises(ValueError, match="total_epochs must be at least 1, got 0"):
        trainer.train(env, 0)
    with pytest.raises(ValueError, match="resume needs the run"):
        trainer.train(env, 1, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner_lr": 0.5}, "inner_lr must be 0.3 as in the run that is resumed, got 0.5"),
        ({"tasks_per_epoch": 2}, "tasks_per_epoch must be 3"),
        ({"seed": 6}, "seed must be 5"),
    ],
)
def test_load_state_dict_of_other_settings(change, message):
    env = environment()
    state = trainer_for(env).state_dict()
    with pytest.raises(ValueError, match=f"training state does not fit: {message}"):
        trainer_for(env, **change).load_state_dict(state)


def test_resume_in_another_environment(tmp_path):
    with RunDirectory(tmp_path / "run") as run:
        env = environment()
        trainer_for(env).train(env, 1, test_tasks=(), run=run)
    other = environment("ssm_fast/CartPoleUnsignedFamily-v0")
    with (
        RunDirectory(tmp_path / "run", resume=True) as run,
        pytest.raises(ValueError, match="env_name must be 'ssm_fast/CartPoleFamily-v0'"),
    ):
        trainer_for(other).train(other, 2, run=run, resume=True)


@pytest.mark.parametrize("broken", ["rates", "model", "optimizer", "iteration", "version"])
def test_load_state_dict_of_a_damaged_state(broken):
    env = environment()
    trainer = trainer_for(env)
    state = trainer.state_dict()
    del state[broken]
    with pytest.raises(ValueError, match=f"training state does not fit: it lacks '{broken}'"):
        trainer.load_state_dict(state)


@pytest.mark.parametrize("name", ["iteration", "seconds", "env_name"])
def test_a_state_that_is_refused_changes_nothing(name):
    env = environment()
    trainer = trainer_for(env)
    state = copy.deepcopy(trainer.state_dict())
    state["model"]["actor.bias"] += 1.0
    if name == "env_name":
        del state[name]
    else:
        state[name] = -1 if name == "iteration" else "x"
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match="training state does not fit"):
        trainer.load_state_dict(state)
    assert all(torch.equal(x, before[n]) for n, x in trainer.model.state_dict().items())


def test_family_tasks_are_held_out():
    family = get_family(CARTPOLE)
    assert not set(family.train_tasks) & set(family.test_tasks)
