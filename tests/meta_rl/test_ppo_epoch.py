from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.core.sequence_gradient import sequence_gradient
from ssm_fast.meta_rl.ppo_epoch import PpoEpoch
from ssm_fast.meta_rl.ppo_trainer import PPOTrainer
from ssm_fast.meta_rl.rollout import Rollout

B, T, I, K = 4, 24, 3, 2


def _model(**options: Any) -> ImprovedSSM:
    torch.manual_seed(3)
    model = ImprovedSSM(I, K, 5, 8, normalize_observations=True, **options)
    with torch.no_grad():  # a policy and a value that depend on the state
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.double()


def _trainer(model: ImprovedSSM, **options: Any) -> PPOTrainer:
    settings = {"sequence_length": 6, "mini_batch_size": 20, "learning_rate": 0.01, "seed": 5}
    return PPOTrainer(model, **{**settings, **options})


def _rollout(model: ImprovedSSM) -> Rollout:
    """Actions that the policy might have taken, with episodes that end anywhere."""
    torch.manual_seed(1)
    dtype = model.encoder.weight.dtype
    terminated = torch.rand(B, T) < 0.1
    reset = torch.cat((torch.ones(B, 1, dtype=torch.bool), terminated[:, :-1]), dim=1)
    rows = torch.arange(B)[~terminated[:, -1]]
    return Rollout(
        torch.randn(B, T, I, dtype=dtype),
        torch.randint(K, (B, T)) if model.discrete else torch.randn(B, T, K, dtype=dtype),
        torch.randn(B, T, dtype=dtype) - (1.0 if model.discrete else 3.0),
        torch.randn(B, T, dtype=dtype),
        terminated,
        torch.zeros(B, T, dtype=torch.bool),
        reset,
        torch.randn(model.num_layers, B, 5, dtype=dtype),
        rows,
        torch.full_like(rows, T - 1),
        torch.randn(len(rows), I, dtype=dtype),
        [],
        [],
    )


def _weights(trainer: PPOTrainer) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])


def _minibatch_by_minibatch(trainer: PPOTrainer) -> PPOTrainer:
    """The trainer with a method of its own between the minibatches."""
    trainer._step = trainer._step  # type: ignore[method-assign]
    return trainer


def _last_thread() -> int:
    """Number of a thread that starts now: the system counts them up."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(threading.get_native_id()))
    thread.start()
    thread.join()
    return found[0]


class TestPpoEpoch:
    @pytest.mark.parametrize("critic_dim", [None, 7])
    @pytest.mark.parametrize("clip_value_loss", [False, True])
    @pytest.mark.parametrize("entropy_coef", [0.0, 0.03])
    @pytest.mark.parametrize("max_grad_norm", [0.1, 100.0])
    @pytest.mark.parametrize("options", [{}, {"norm": "state"}, {"discrete": True}])
    def test_equals_the_same_minibatch_by_minibatch(
        self,
        options: dict[str, Any],
        critic_dim: int | None,
        clip_value_loss: bool,
        entropy_coef: float,
        max_grad_norm: float,
    ) -> None:
        results = []
        for path in ("native", "minibatch by minibatch: the trainer overrides _step()"):
            model = _model(critic_dim=critic_dim, **options)
            trainer = _trainer(
                model,
                clip_value_loss=clip_value_loss,
                entropy_coef=entropy_coef,
                max_grad_norm=max_grad_norm,
                ppo_epochs=3,
            )
            if path != "native":
                _minibatch_by_minibatch(trainer)
            metrics = [trainer.update(_rollout(model)) for _ in range(2)]
            assert trainer.epochs.path == path
            results.append((metrics, _weights(trainer), trainer))
        (metrics, weights, trainer), (expected, expected_weights, other) = results
        torch.testing.assert_close(weights, expected_weights, rtol=1e-9, atol=1e-11)
        for row, expected_row in zip(metrics, expected, strict=True):
            assert row == pytest.approx(expected_row, rel=1e-9, abs=1e-11)
            assert 0.0 < row["clip_fraction"] < 1.0
        states = [t.optimizer.state_dict() for t in (trainer, other)]
        assert states[0]["param_groups"] == states[1]["param_groups"]
        for name, value in states[1]["state"][0].items():
            found = states[0]["state"][0][name]
            assert found.dtype == value.dtype, name
            torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12)
        other.load_state_dict(trainer.state_dict())

    def test_float32(self) -> None:
        weights = []
        for dtype in (torch.float32, torch.float64):
            model = _model().to(dtype)
            trainer = _trainer(model, ppo_epochs=2, learning_rate=1e-3)
            rollout = _rollout(_model())
            cast = [
                x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
                for x in vars(rollout).values()
            ]
            trainer.update(Rollout(*cast))
            weights.append(_weights(trainer).double())
        assert (weights[0] - weights[1]).norm() <= 1e-5 * weights[1].norm()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("critic_dim", [None, 33])
    def test_several_threads(self, dtype: torch.dtype, critic_dim: int | None) -> None:
        """They equal one to rounding, and themselves bitwise."""
        before = torch.get_num_threads()
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(61, 8, I, generator=generator, dtype=dtype)
        actions, flat = x[..., :K], torch.randn(5, 61, 8, generator=generator, dtype=dtype)
        sequences = [x, actions, flat[0] - 3.0, flat[1] > 1.0, *flat[2:]]
        states = torch.randn(2, 61, 5, generator=generator, dtype=dtype)
        order = torch.randperm(61, generator=generator)
        model = ImprovedSSM(I, K, 5, 96, critic_dim=critic_dim).to(dtype)
        found = []
        try:
            for count in (1, 2, 2, 3):
                torch.set_num_threads(count)
                trainer = _trainer(copy.deepcopy(model), learning_rate=1e-3, entropy_coef=0.1)
                trainer._gradient = sequence_gradient(trainer.model, x, states) or None
                native = trainer._native_epoch()
                assert isinstance(native, PpoEpoch)
                # The last minibatch has one sequence.
                metrics = native(sequences, states, order, 20)
                found.append((metrics, _weights(trainer)))
        finally:
            torch.set_num_threads(before)
        one, two, again, three = found
        assert not torch.equal(one[1], _weights(_trainer(model)))
        for i in range(2):
            assert torch.equal(two[i], again[i])
            assert not torch.equal(one[i], two[i]), "the threads had nothing to do"
            tolerance = 1e-9 if dtype == torch.float64 else 1e-4
            for other in (two, three):
                torch.testing.assert_close(other[i], one[i], rtol=tolerance, atol=tolerance)

    def test_a_minibatch_that_is_not_shared_starts_no_threads(self) -> None:
        """Regions inside a region would start new ones for each kernel."""
        before = torch.get_num_threads()
        x = torch.randn(40, 8, I)
        flat = torch.zeros(40, 8)
        sequences = [x, x[..., :K], flat - 3.0, flat > 0, flat, flat, x[..., 0]]
        states, order = torch.zeros(2, 40, 5), torch.arange(40)
        trainer = _trainer(ImprovedSSM(I, K, 5, 96))
        trainer._gradient = sequence_gradient(trainer.model, x, states) or None
        native = trainer._native_epoch()
        assert isinstance(native, PpoEpoch)
        try:
            torch.set_num_threads(2)
            native(sequences, states, order, 40)  # the runtime's own thread is there now
            number = _last_thread()
            for _ in range(20):
                native(sequences, states, order, 1)
            assert _last_thread() - number < 1000, "some are other processes'"
        finally:
            torch.set_num_threads(before)

    @pytest.mark.parametrize("bad", [3, 55])
    def test_a_gradient_that_is_not_finite_of_several_threads(self, bad: int) -> None:
        before = torch.get_num_threads()
        x = torch.randn(60, 8, I, generator=torch.Generator().manual_seed(2))
        flat = torch.zeros(60, 8)
        log_probs = torch.full((60, 8), -3.0)
        log_probs[bad, 4] = float("nan")
        sequences = [x, x[..., :K], log_probs, flat > 0, flat, flat, x[..., 0]]
        trainer = _trainer(ImprovedSSM(I, K, 5, 96))
        trainer._gradient = sequence_gradient(trainer.model, x, torch.zeros(2, 60, 5)) or None
        native = trainer._native_epoch()
        assert isinstance(native, PpoEpoch)
        try:
            torch.set_num_threads(2)
            metrics = native(sequences, torch.zeros(2, 60, 5), torch.arange(60), 20)
        finally:
            torch.set_num_threads(before)
        assert len(metrics) == bad // 20 + 1
        assert bool(torch.isfinite(metrics[:-1]).all())
        assert bool(metrics[-1, -1].isnan())
        assert bool(torch.isfinite(_weights(trainer)).all())

    @pytest.mark.parametrize("prepare", [lambda trainer: trainer, _minibatch_by_minibatch])
    def test_a_gradient_that_is_not_finite(
        self, prepare: Callable[[PPOTrainer], PPOTrainer]
    ) -> None:
        """The steps before it are taken, its own is not."""
        model = _model()
        trainer = prepare(_trainer(model, ppo_epochs=2))
        rollout = _rollout(model)
        order = torch.randperm(16, generator=torch.Generator().manual_seed(5))
        sequence = int(order[9])  # of the fourth minibatch
        rollout.log_probs[sequence // 4, sequence % 4 * 6] = float("nan")
        with pytest.raises(FloatingPointError, match=r"epoch 0: loss nan, gradient norm nan"):
            trainer.update(rollout)
        assert bool(torch.isfinite(_weights(trainer)).all())
        state = trainer.optimizer.state_dict()["state"][0]
        assert float(state["step"]) == 3
        assert bool(torch.isfinite(state["exp_avg_sq"]).all())

    def test_tells_autograd_of_new_values(self) -> None:
        model = _model()
        before = [p._version for p in model.parameters()]
        _trainer(model).update(_rollout(model))
        assert all(p._version > v for p, v in zip(model.parameters(), before, strict=True))

    def test_wrong_tensors(self) -> None:
        model = _model()
        trainer, rollout = _trainer(model), _rollout(model)
        trainer.update(rollout)
        native, order = trainer._native_epoch(), torch.arange(16)
        assert isinstance(native, PpoEpoch)
        x, states = torch.zeros(16, 6, I).double(), torch.zeros(2, 16, 5).double()
        actions, flat = torch.zeros(16, 6, K).double(), torch.zeros(16, 6).double()
        sequences = [x, actions, flat, flat > 0, flat, flat, flat]
        assert native(sequences, states, order, 3).shape == (6, 6)
        for i in range(2, 7):
            wrong = [t.float() if j == i else t for j, t in enumerate(sequences)]
            with pytest.raises(TypeError, match=r"must have dtype"):
                native(wrong, states, order, 3)
            wrong = [t[:, 1:] if j == i else t for j, t in enumerate(sequences)]
            with pytest.raises(ValueError, match=r"must have shape"):
                native(wrong, states, order, 3)
        for bad in (order[:-1], torch.full((16,), 16), -order - 1, order.int()):
            with pytest.raises(ValueError, match="order must"):
                native(sequences, states, bad, 3)

    def test_discrete_actions(self) -> None:
        model = _model(discrete=True)
        trainer, rollout = _trainer(model), _rollout(model)
        before = _weights(trainer)
        for bad in (-1, K):
            wrong = copy.deepcopy(rollout)
            wrong.actions[1, 2] = bad
            with pytest.raises(ValueError, match=r"actions must lie in \[0, 2\)"):
                trainer.update(wrong)
        assert torch.equal(_weights(trainer), before)
        short = dataclasses.replace(rollout, actions=rollout.actions.int())
        one, other = (_trainer(_model(discrete=True)) for _ in range(2))
        assert one.update(rollout) == other.update(short)

    def test_a_model_that_has_changed_its_dtype(self) -> None:
        model = _model().float()
        trainer = _trainer(model)
        model.double()
        with pytest.raises(TypeError, match=r"must stay torch\.float32"):
            trainer.update(_rollout(model))
        other = _trainer(_model())
        (vector,) = other.optimizer.param_groups[0]["params"]
        other.update(_rollout(other.model))
        state = other.optimizer.state[vector]
        state["exp_avg"] = state["exp_avg"].float()
        with pytest.raises(ValueError, match=r"exp_avg must be torch\.float64"):
            other.update(_rollout(other.model))


def _hooked(trainer: PPOTrainer) -> None:
    trainer.optimizer.register_step_post_hook(lambda *_: None)


def _replaced(trainer: PPOTrainer) -> None:
    (vector,) = trainer.optimizer.param_groups[0]["params"]
    trainer.optimizer = torch.optim.SGD([vector], lr=0.01)


def _decaying(trainer: PPOTrainer) -> None:
    trainer.optimizer.param_groups[0]["weight_decay"] = 0.1


def _scheduled(trainer: PPOTrainer) -> None:
    torch.optim.lr_scheduler.ConstantLR(trainer.optimizer)


def _with_own_objective(trainer: PPOTrainer) -> None:
    trainer._objective = trainer._objective  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hooked, "the optimizer's step() is hooked or replaced"),
        (_replaced, "the optimizer is a SGD, not torch.optim.Adam"),
        (_decaying, "the optimizer's weight_decay is 0.1"),
        (_scheduled, "the optimizer's step() is hooked or replaced"),
        (_minibatch_by_minibatch, "the trainer overrides _step()"),
        (_with_own_objective, "the trainer overrides _objective()"),
    ],
)
def test_what_somebody_has_changed_runs_minibatch_by_minibatch(
    change: Callable[[PPOTrainer], Any], reason: str
) -> None:
    model = _model()
    trainer = _trainer(model)
    trainer.update(_rollout(model))
    assert trainer.epochs.path == "native"
    change(trainer)
    before = _weights(trainer)
    trainer.update(_rollout(model))
    assert trainer.epochs.path == f"minibatch by minibatch: {reason}"
    assert not torch.equal(_weights(trainer), before)


def test_a_subclass_with_an_objective_of_its_own() -> None:
    class Own(PPOTrainer):
        def _objective(self, *arguments: Any) -> tuple[Tensor, list[Tensor]]:
            return super()._objective(*arguments)

    model = _model()
    trainer = Own(model, sequence_length=6)
    trainer.update(_rollout(model))
    assert trainer.epochs.path == "minibatch by minibatch: the trainer overrides _objective()"
