from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.core.ssm import StateSpaceModel
from ssm_fast.meta_rl.meta_maml import MetaGradient, MetaMAML
from ssm_fast.meta_rl.meta_rl_trainer import MetaRLTrainer
from ssm_fast.native.task_gradients import TaskGradients, policy_task_gradients, task_gradients

Task = tuple[Any, ...]


def _model(N: int = 5, I: int = 3, O: int = 2, H: int = 7, seed: int = 0) -> StateSpaceModel:
    torch.manual_seed(seed)
    model = StateSpaceModel(N, I, O, H).double()
    with torch.no_grad():
        for parameter in model.parameters():  # orthogonal ones hide a transposition, zeros a bias
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def _set(model: StateSpaceModel, B: int, T: int, classes: bool = False) -> tuple[Any, Tensor]:
    """A set whose sequences have states and resets, also at the first and last step."""
    x = torch.randn(B, T, model.input_dim).double()
    reset = torch.rand(B, T) < 0.1
    reset[0, 0] = reset[-1, -1] = True
    state = torch.randn(B, model.state_dim).double()
    shape = (B, T, model.output_dim)
    y = torch.randint(model.output_dim, shape[:2]) if classes else torch.randn(shape).double()
    return {"x": x, "reset": reset, "hidden_state": state}, y


def _tasks(model: StateSpaceModel, count: int = 3, B: int = 4, T: int = 6) -> list[Task]:
    return [(*_set(model, B, T), *_set(model, B + 1, T + 2)) for _ in range(count)]


def _written_out(model: nn.Module, tasks: list[Task], *settings: Any) -> TaskGradients | None:
    state, rates, steps, first_order = settings or (None, 0.1, 1, False)
    parameters = dict(model.named_parameters())
    return task_gradients(model, parameters, tasks, state, rates, steps, first_order)


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def _squared_error(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def _compare(
    maml: MetaMAML, tasks: list[Task], loss_fn: Any = _squared_error, **options: Any
) -> None:
    """Written out, for the default loss, against autograd through a loss of the caller's."""
    actual, expected = (
        maml.meta_gradient(tasks, loss_fn=loss, **options) for loss in (None, loss_fn)
    )
    _assert_close(actual, expected)


def _assert_close(actual: MetaGradient, expected: MetaGradient) -> None:
    torch.testing.assert_close(actual.losses, expected.losses, rtol=1e-12, atol=1e-12)
    assert actual.rates.keys() == expected.rates.keys()
    for one, other in ((actual.weights, expected.weights), (actual.rates, expected.rates)):
        for name, gradient in other.items():
            torch.testing.assert_close(one[name], gradient, rtol=1e-9, atol=1e-11)


class TestTaskGradients:
    @pytest.mark.parametrize("first_order", [False, True])
    @pytest.mark.parametrize("learn", [False, True])
    @pytest.mark.parametrize("steps", [1, 3])
    @pytest.mark.parametrize("classes", [False, True])
    def test_equals_autograd(
        self, first_order: bool, learn: bool, steps: int, classes: bool
    ) -> None:
        model = _model()
        tasks = [(*_set(model, 4, 6, classes), *_set(model, 3, 9, classes)) for _ in range(3)]
        maml = MetaMAML(
            model, 0.3, first_order=first_order, inner_steps=steps, learn_inner_lr=learn
        )
        for rate in maml._rates.values():
            rate.data.uniform_(0.1, 0.5)
        _compare(maml, tasks, _cross_entropy if classes else _squared_error)

    @pytest.mark.parametrize(
        ("B", "T"), [(1, 1), (1, 7), (2, 700), (13, 100), (7, 90), (600, 1), (1, 3000)]
    )
    def test_sets_of_one_tile_and_of_several(self, B: int, T: int) -> None:
        model = _model()
        _compare(MetaMAML(model, 0.1), [(*_set(model, B, T), *_set(model, 2, 3))] * 2)
        _compare(MetaMAML(model, 0.1), [(*_set(model, 2, 3), *_set(model, B, T))] * 2)

    @pytest.mark.parametrize(
        "sizes", [(1, 1, 1, 1), (16, 17, 6, 32), (33, 2, 5, 18), (64, 17, 6, 128)]
    )
    def test_sizes_of_the_model(self, sizes: tuple[int, int, int, int]) -> None:
        model = _model(*sizes)
        _compare(MetaMAML(model, 0.1), _tasks(model))

    def test_one_state_for_all_tasks_and_none(self) -> None:
        model = _model()
        tasks = [(sx["x"], sy, {"x": qx["x"][:4]}, qy[:4]) for sx, sy, qx, qy in _tasks(model)]
        state = torch.randn(4, model.state_dim).double()
        _compare(MetaMAML(model, 0.3), tasks, initial_hidden_state=state)
        _compare(MetaMAML(model, 0.3), tasks)

    def test_single_steps(self) -> None:
        model = _model()
        x, y = torch.randn(9, 3).double(), torch.randn(9, 2).double()
        assert _written_out(model, [(x, y, x, y)])
        _compare(MetaMAML(model, 0.3), [(x, y, x, y)])

    def test_any_strides_and_types_of_reset_and_label(self) -> None:
        model = _model()
        x = torch.randn(3, 6, 4).double().mT  # [3, 4, 6]
        inputs = {"x": x[..., ::2], "reset": (torch.rand(4, 3) < 0.3).double().T}
        labels = torch.randint(2, (4, 3), dtype=torch.int32).T
        task = inputs, labels, inputs, labels
        assert _written_out(model, [task])
        _compare(MetaMAML(model, 0.3), [task], lambda y, t: _cross_entropy(y, t.long()))

    def test_float32(self) -> None:
        model = _model(16, 5, 3, 20)
        tasks = _tasks(model, B=8, T=50)
        expected = MetaMAML(model, 0.1).meta_gradient(tasks)
        cast = [
            tuple(
                {n: x.float() if n != "reset" else x for n, x in part.items()}
                if isinstance(part, dict)
                else part.float()
                for part in task
            )
            for task in tasks
        ]
        actual = MetaMAML(copy.deepcopy(model).float(), 0.1).meta_gradient(cast)
        for name, gradient in expected.weights.items():
            assert (actual.weights[name].double() - gradient).norm() <= 1e-4 * gradient.norm()

    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_same_bits_for_any_number_of_threads(self, count: int) -> None:
        model = _model(16, 5, 3, 20)
        tasks, threads = _tasks(model, count, B=30, T=60), torch.get_num_threads()
        try:
            results: list[TaskGradients] = []
            for n in (1, 2, 4):
                torch.set_num_threads(n)
                found = _written_out(model, tasks, None, 0.1, 2, False)
                assert found
                results.append(found)
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert torch.equal(results[0].inner_losses, other.inner_losses)
            assert torch.equal(results[0].outer_losses, other.outer_losses)
            for name, gradient in results[0].weights.items():
                assert torch.equal(gradient, other.weights[name])

    def test_the_model_and_the_tasks_stay_as_they_are(self) -> None:
        model = _model()
        tasks = _tasks(model)
        before = copy.deepcopy((model.state_dict(), tasks))
        _written_out(model, tasks, None, 0.1, 2, False)
        torch.testing.assert_close((model.state_dict(), tasks), before, rtol=0, atol=0)


def _policy(**options: Any) -> ImprovedSSM:
    torch.manual_seed(0)
    sizes = {"state_dim": 5, "hidden_dim": 7, "num_layers": 2, "normalize_observations": True}
    model = ImprovedSSM(3, 2, **{**sizes, **options}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        if model.obs_norm is not None:
            model.obs_norm.update(torch.randn(50, 3).double() * 2.0 + 1.0)
    return model


def _policy_set(model: ImprovedSSM, B: int, T: int, classes: bool = False) -> tuple[Any, Tensor]:
    x = torch.randn(B, T, model.input_dim).double()
    reset = torch.rand(B, T) < 0.2
    reset[0, 0] = reset[-1, -1] = True
    state = torch.randn(model.num_layers, B, model.state_dim).double()
    y = torch.randint(2, (B, T)) if classes else torch.randn(B, T, 2).double()
    return {"x": x, "reset": reset, "hidden_state": state}, y


def _rounds(model: ImprovedSSM, G: int, R: int, T: int, count: int) -> list[dict[str, Tensor]]:
    """What tasks might have played, some of it so unlikely that its ratio is cut."""
    dtype = model.encoder.weight.dtype
    rounds = []
    for _ in range(count):
        reset = torch.rand(G, R, T) < 0.2
        reset[:, :, 0] = True
        actions = torch.randn(G, R, T, 2, dtype=dtype)
        log_probs = -2.5 + 0.5 * torch.randn(G, R, T, dtype=dtype)
        log_probs[0, 0, T // 2] = -50.0
        rounds.append(
            {
                "observations": torch.randn(G, R, T, 3, dtype=dtype),
                "actions": (actions[..., 0] > 0).long() if model.discrete else actions,
                "log_probs": 0.2 * log_probs if model.discrete else log_probs,
                "reset": reset,
                "rewards": torch.randn(G, R, T, dtype=dtype),
                "advantages": torch.randn(G, R, T, dtype=dtype),
            }
        )
    return rounds


class TestPolicies:
    """The same for an `ImprovedSSM`."""

    @pytest.mark.parametrize("residual", [False, True])
    @pytest.mark.parametrize("norm", [None, "output", "state"])
    @pytest.mark.parametrize(("layers", "critic_dim"), [(1, None), (2, 6)])
    def test_equals_autograd(
        self, norm: str | None, residual: bool, layers: int, critic_dim: int | None
    ) -> None:
        model = _policy(
            use_layer_norm=norm is not None,
            norm=norm or "output",
            use_residual=residual,
            num_layers=layers,
            critic_dim=critic_dim,
        )
        tasks = [(*_policy_set(model, 4, 6), *_policy_set(model, 3, 9)) for _ in range(3)]
        assert _written_out(model, tasks)
        maml = MetaMAML(model, 0.2, inner_steps=2, learn_inner_lr=True)
        for rate in maml._rates.values():
            rate.data.uniform_(0.1, 0.3)
        _compare(maml, tasks)
        _compare(MetaMAML(model, 0.2, first_order=True), tasks)

    @pytest.mark.parametrize("discrete", [False, True])
    def test_labels(self, discrete: bool) -> None:
        model = _policy(discrete=discrete)
        tasks = [(*_policy_set(model, 4, 6, True), *_policy_set(model, 3, 9, True))] * 2
        assert _written_out(model, tasks)
        _compare(MetaMAML(model, 0.3, inner_steps=3), tasks, _cross_entropy)

    @pytest.mark.parametrize(
        ("B", "T"), [(1, 1), (1, 7), (2, 700), (13, 100), (7, 90), (600, 1), (1, 3000)]
    )
    def test_sets_of_one_tile_and_of_several(self, B: int, T: int) -> None:
        model = _policy()
        few = _policy_set(model, 2, 3)
        for count in (1, 2):
            _compare(MetaMAML(model, 0.1), [(*_policy_set(model, B, T), *few)] * count)
            _compare(MetaMAML(model, 0.1), [(*few, *_policy_set(model, B, T))] * count)

    @pytest.mark.parametrize(("N", "H"), [(1, 1), (16, 32), (33, 18), (64, 128)])
    def test_sizes_of_the_model(self, N: int, H: int) -> None:
        model = _policy(state_dim=N, hidden_dim=H)
        _compare(MetaMAML(model, 0.1), [(*_policy_set(model, 4, 6), *_policy_set(model, 3, 9))] * 2)

    def test_single_steps_without_state(self) -> None:
        model = _policy()
        x, y = torch.randn(9, 3).double(), torch.randn(9, 2).double()
        assert _written_out(model, [(x, y, x, y)])
        _compare(MetaMAML(model, 0.3), [(x, y, x, y)])
        state = torch.randn(2, 9, 5).double()
        _compare(MetaMAML(model, 0.3), [(x, y, x, y)], initial_hidden_state=state)
        assert not _written_out(model, [(x, y, x, y)], state[:1], 0.1, 1, False)

    @pytest.mark.parametrize("discrete", [False, True])
    @pytest.mark.parametrize("first_order", [False, True])
    @pytest.mark.parametrize("steps", [0, 1, 3])
    def test_surrogates_equal_autograd(self, steps: int, first_order: bool, discrete: bool) -> None:
        model = _policy(discrete=discrete)
        trainer = MetaRLTrainer(model, inner_steps=steps, first_order=first_order, seed=0)
        with torch.no_grad():
            for rate in trainer.rates.values():
                rate.uniform_(0.05, 0.2)
        rounds = _rounds(model, 3, 4, 9, steps + 1)
        loss, gradients = trainer._gradients(rounds)
        expected = trainer._outer_loss(rounds)
        wanted = torch.autograd.grad(
            expected, trainer._learnt, allow_unused=True, materialize_grads=True
        )
        assert not loss.requires_grad  # written out
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
        assert any(bool(g.any()) for g in wanted)
        for one, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)

    def test_float32_of_surrogates(self) -> None:
        model = _policy(state_dim=16, hidden_dim=32)
        trainer = MetaRLTrainer(model, inner_lr=0.1, seed=0)
        rounds = _rounds(model, 2, 8, 50, 3)
        _, expected = trainer._gradients(rounds)
        small = MetaRLTrainer(copy.deepcopy(model).float(), inner_lr=0.1, seed=0)
        cast = [
            {name: x.float() if x.is_floating_point() else x for name, x in batch.items()}
            for batch in rounds
        ]
        _, actual = small._gradients(cast)
        for one, other in zip(actual, expected, strict=True):
            assert (one.double() - other).norm() <= 1e-4 * other.norm() + 1e-7

    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_same_bits_for_any_number_of_threads(self, count: int) -> None:
        model = _policy(state_dim=16, hidden_dim=20)
        trainer, threads = MetaRLTrainer(model, seed=0), torch.get_num_threads()
        rounds, results = _rounds(model, count, 30, 60, 3), []
        try:
            for n in (1, 2, 4):
                torch.set_num_threads(n)
                results.append(trainer._gradients(rounds))
        finally:
            torch.set_num_threads(threads)
        for loss, gradients in results[1:]:
            assert torch.equal(loss, results[0][0])
            assert all(torch.equal(a, b) for a, b in zip(gradients, results[0][1], strict=True))

    def test_others_go_through_autograd(self) -> None:
        def hooked(model: ImprovedSSM) -> None:
            model.layers[0].register_forward_hook(lambda *_: None)

        def frozen(model: ImprovedSSM) -> None:
            model.encoder.weight.requires_grad_(False)

        def rectified(model: ImprovedSSM) -> None:
            model.actor = nn.Sequential(model.actor, nn.ReLU())  # type: ignore[assignment]

        def tied(model: ImprovedSSM) -> None:
            model.layers[1].A = model.layers[0].A

        def own_loss(trainer: MetaRLTrainer) -> None:
            trainer._ratio = trainer._ratio  # type: ignore[method-assign]

        for change in (hooked, frozen, rectified, tied):
            model = _policy()
            change(model)
            trainer = MetaRLTrainer(model, seed=0)
            loss, gradients = trainer._gradients(_rounds(model, 2, 3, 5, 3))
            assert loss.requires_grad, change
            assert len(gradients) == len(trainer._learnt)
            tasks = [(*_policy_set(model, 4, 6), *_policy_set(model, 3, 9))]
            assert not _written_out(model, tasks)
        trainer = MetaRLTrainer(_policy(), seed=0)
        rounds = _rounds(trainer.model, 2, 3, 5, 3)
        assert not trainer._gradients(rounds)[0].requires_grad
        own_loss(trainer)
        assert trainer._gradients(rounds)[0].requires_grad

    def test_rates_that_are_not_learnt(self) -> None:
        trainer = MetaRLTrainer(_policy(), learn_inner_lr=False, seed=0)
        rounds = _rounds(trainer.model, 2, 3, 5, 3)
        _, gradients = trainer._gradients(rounds)
        wanted = torch.autograd.grad(trainer._outer_loss(rounds), trainer._learnt)
        for one, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        found = policy_task_gradients(
            trainer.model,
            {"A": trainer.model.encoder.weight},
            rounds,
            trainer.rates,
            False,
            0.3,
            20.0,
            True,
        )
        assert not found

    @pytest.mark.parametrize("discrete", [False, True])
    def test_rounds_that_do_not_fit(self, discrete: bool) -> None:
        trainer = MetaRLTrainer(_policy(discrete=discrete), seed=0)
        good = _rounds(trainer.model, 2, 3, 5, 3)

        def found(**changed: Tensor) -> TaskGradients | None:
            rounds = [*good[:2], good[2] | changed]
            return policy_task_gradients(
                trainer.model, trainer._shared, rounds, trainer.rates, False, 0.3, 20.0, True
            )

        assert found()
        x, actions = good[2]["observations"], good[2]["actions"]
        bad: list[dict[str, Tensor]] = [
            {"observations": x.float()},
            {"observations": x[..., 1:]},
            {"observations": x.as_subclass(_Tensor)},
            {"reset": good[2]["reset"][..., 1:]},
            {"advantages": good[2]["advantages"].float()},
            {"log_probs": good[2]["log_probs"][..., 1:]},
            {"actions": actions[..., 1:]},
            {name: t[:, :0] for name, t in good[2].items()},
            {name: t[:, :, :0] for name, t in good[2].items()},
        ]
        if discrete:
            bad += [{"actions": actions + 1}, {"actions": actions - 1}, {"actions": actions > 0}]
            bad += [{"actions": actions * 100_000_000}, {"actions": actions.double()}]
        else:
            bad += [{"actions": actions.float()}, {"actions": (actions > 0).long()}]
        for changed in bad:
            assert not found(**changed)


def _hooked(model: StateSpaceModel) -> nn.Module:
    model.C.register_forward_hook(lambda *_: None)
    return model


def _with_relu(model: StateSpaceModel) -> nn.Module:
    model.C[1] = nn.ReLU()
    return model


def _frozen(model: StateSpaceModel) -> nn.Module:
    model.B.requires_grad_(False)
    return model


def _parametrized(model: StateSpaceModel) -> nn.Module:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    parametrize.register_parametrization(model, "A", Doubled())
    return model


class _Scaled(StateSpaceModel):
    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        y, h = super().forward(*arguments)
        return 2 * y, h


def _subclass(model: StateSpaceModel) -> nn.Module:
    return _Scaled(model.state_dim, model.input_dim, model.output_dim, model.hidden_dim).double()


class _Noticing(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


class _Tensor(Tensor):
    pass


def _plain_tasks() -> list[Task]:
    return [(sx["x"], sy, qx["x"], qy) for sx, sy, qx, qy in _tasks(_model())]


class TestOthersGoThroughAutograd:
    @pytest.mark.parametrize("change", [_hooked, _with_relu, _parametrized, _subclass])
    def test_changed_models(self, change: Callable[[StateSpaceModel], nn.Module]) -> None:
        model = change(_model())
        assert not _written_out(model, _plain_tasks())
        _compare(MetaMAML(model, 0.3), _plain_tasks())

    def test_weights_that_are_not_those_of_the_object(self) -> None:
        frozen = _frozen(_model())
        maml = MetaMAML(frozen, 0.3, learn_inner_lr=True)
        assert "B" not in maml.meta_gradient(_plain_tasks()).weights
        _compare(maml, _plain_tasks())

        model = _model()
        maml = MetaMAML(model, 0.3, learn_inner_lr=True)
        model.B.requires_grad_(False)
        assert "B" not in maml.meta_gradient(_plain_tasks()).weights
        _compare(maml, _plain_tasks())

    def test_rates(self) -> None:
        model = _model().float()
        maml = MetaMAML(model, 0.3, learn_inner_lr=True)
        model.double()  # the rates follow
        _compare(maml, _plain_tasks())
        weights = dict(model.named_parameters())
        shared = {name: torch.tensor(0.3).double() for name in weights}
        assert not _written_out(model, _plain_tasks(), None, shared, 1, False)
        _compare(MetaMAML(model, torch.tensor(0.3)), _plain_tasks())

    def test_a_hook_sees_its_calls(self) -> None:
        model, seen = _model(), []
        handles = [
            model.register_forward_hook(lambda *_: seen.append(1)),
            nn.modules.module.register_module_forward_hook(lambda *_: seen.append(2)),
        ]
        for handle, what in zip(handles, (1, 2), strict=True):
            seen.clear()
            MetaMAML(model).meta_gradient(_plain_tasks())
            assert seen.count(what) >= 2
            handle.remove()
        assert _written_out(model, _plain_tasks())

    def test_modes(self) -> None:
        model, tasks = _model(), _plain_tasks()
        with torch.device("cpu"):
            assert _written_out(model, tasks)
        for mode in (torch.autocast("cpu"), torch.profiler.profile(), _Noticing()):
            with mode:
                assert not _written_out(model, tasks)
        assert not _written_out(_model().to("meta"), tasks)
        assert not _written_out(_model().bfloat16(), tasks)

    def test_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ssm_fast.ops.dispatch._interpreting", True)
        assert not _written_out(_model(), _plain_tasks())

    def test_tensors_of_another_kind(self) -> None:
        model = _model()
        x, y, *query = _plain_tasks()[0]
        assert not _written_out(model, [(x.as_subclass(_Tensor), y, *query)])
        assert not _written_out(model, [(x, y.as_subclass(_Tensor), *query)])

    def test_they_run_in_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, calls = _model(), []
        kept = MetaMAML._chunk_gradient

        def counted(self: MetaMAML, chunk: list[int], *rest: Any) -> Any:
            calls.append(len(chunk))
            return kept(self, chunk, *rest)

        monkeypatch.setattr(MetaMAML, "_chunk_gradient", counted)
        x, y = torch.randn(40, 100, 3).double(), torch.randn(40, 100, 2).double()
        MetaMAML(model).meta_gradient([(x, y, x, y)] * 5)
        assert calls == []
        other = torch._neg_view(x)
        MetaMAML(model).meta_gradient([(other, y, x, y)] * 5)
        assert calls == [2, 2, 1]

    def test_losses(self) -> None:
        expected, tasks = MetaMAML(_model()).meta_gradient(_plain_tasks()), _plain_tasks()
        native = MetaMAML(_model(), impl="native")
        for loss_fn in (F.mse_loss, nn.MSELoss()):
            _assert_close(native.meta_gradient(tasks, loss_fn=loss_fn), expected)
        hooked, labels = nn.MSELoss(), torch.zeros(4, 6, dtype=torch.long)
        hooked.register_forward_hook(lambda *_: None)
        counted = [(sx, labels, qx, torch.zeros(5, 8, dtype=torch.long)) for sx, _, qx, _ in tasks]
        mixed = [(sx, labels, qx, qy) for sx, _, qx, qy in tasks]
        for loss_fn, of_tasks in (
            (_squared_error, tasks),
            (F.l1_loss, tasks),
            (nn.MSELoss(reduction="sum"), tasks),
            (hooked, tasks),
            (F.mse_loss, counted),
            (F.mse_loss, mixed),
        ):
            with pytest.raises(RuntimeError, match="impl='native' is not possible"):
                native.meta_gradient(of_tasks, loss_fn=loss_fn)

    def test_sets_that_do_not_fit(self) -> None:
        model = _model()
        good = _tasks(model, 1)[0]
        x, y = good[:2]
        state = torch.zeros(4, model.state_dim).double()
        bad: list[tuple[Any, Any]] = [
            (x | {"more": y}, y),
            ({"reset": x["reset"]}, y),
            (x | {"x": x["x"][..., 1:]}, y),
            (x | {"x": x["x"].float()}, y),
            (x | {"reset": x["reset"][:, 1:]}, y),
            (x | {"reset": x["reset"].to(torch.complex64)}, y),
            (x | {"hidden_state": x["hidden_state"][1:]}, y),
            (x | {"hidden_state": x["hidden_state"].float()}, y),
            (x, y[..., 1:]),
            (x, y.float()),
            (x, {"y": y}),
            (x, y > 0),
            (x, torch.full((4, 6), model.output_dim)),
            (x, torch.full((4, 6), -1)),
            (x, torch.zeros(4, 5, dtype=torch.long)),
        ]
        for support in bad:
            tasks = [good, (*support, *good[2:])]
            assert not _written_out(model, tasks)
        assert not _written_out(model, [good], state, 0.1, 1, False)  # two states
