from __future__ import annotations

import copy
import io
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map

from ssm_fast import SSM
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.core.ssm import StateSpaceModel
from ssm_fast.meta_rl.meta_maml import MetaGradient, MetaMAML, inner_update, task_losses

G, B, T, IN, OUT, N, H = 3, 2, 6, 3, 2, 4, 5
EPS = 1e-5

Weights = dict[str, Tensor]


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """The default loss by another name, which takes the way through vmap."""
    return (output - target).square().mean()


class Wrapped(nn.Module):
    """An SSM in a module of the user's own; it has more outputs than two."""

    def __init__(self) -> None:
        super().__init__()
        self.ssm = SSM(IN, H, 2, batch_first=True, state_size=N, norm="output")
        self.head = nn.Linear(H, OUT)

    def forward(self, x: Tensor, hidden_state: Tensor | None = None) -> tuple[Tensor, ...]:
        y, h = self.ssm(x, hidden_state)
        return self.head(y), h, y


class NeedsState(nn.Module):
    """A model of today: the state has no default."""

    def __init__(self) -> None:
        super().__init__()
        self.model = StateSpaceModel(N, IN, OUT, H)

    def init_hidden(self, batch_size: int) -> Tensor:
        return self.model.init_hidden(batch_size)

    def forward(self, x: Tensor, hidden_state: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(x, hidden_state)


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    models: dict[str, Callable[[], nn.Module]] = {
        "standard": lambda: StateSpaceModel(N, IN, OUT, H),
        "norm_output": lambda: ImprovedSSM(IN, OUT, N, H, orthogonal_init=False),
        "norm_state": lambda: ImprovedSSM(IN, OUT, N, H, norm="state", orthogonal_init=False),
        "no_norm": lambda: ImprovedSSM(IN, OUT, N, H, use_layer_norm=False, use_residual=False),
        "wrapped": Wrapped,
        "needs_state": NeedsState,
        "stateless": lambda: nn.Sequential(nn.Linear(IN, H), nn.Tanh(), nn.Linear(H, OUT)),
    }
    model = models[kind]().double()
    with torch.no_grad():
        for parameter in model.parameters():  # away from zeros and ones
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_tasks(count: int = G, length: int = T) -> list[tuple[Any, ...]]:
    """Tasks whose sequences have resets, also at the first and last step."""
    generator = torch.Generator().manual_seed(1)

    def part() -> tuple[dict[str, Tensor], Tensor]:
        x = torch.randn(B, length, IN, generator=generator, dtype=torch.float64)
        reset = torch.rand(B, length, generator=generator) < 0.3
        reset[0, 0] = reset[-1, -1] = True
        y = torch.randn(B, length, OUT, generator=generator, dtype=torch.float64)
        return {"x": x, "reset": reset}, y

    return [(*part(), *part()) for _ in range(count)]


def without_resets(tasks: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [(sx["x"], sy, qx["x"], qy) for sx, sy, qx, qy in tasks]


def initial_state(kind: str) -> Tensor:
    shape = (B, N) if kind in ("standard", "needs_state") else (2, B, N)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# The independent implementation: eager recurrences, one task and one step at a time.


def layer_norm(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = z - z.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


def eager_standard(w: Weights, x: Tensor, reset: Tensor, h: Tensor) -> Tensor:
    outputs = []
    for t in range(x.shape[1]):
        h = torch.where(reset[:, t, None], torch.zeros_like(h), h)
        h = h @ w["A"].T + x[:, t] @ w["B"].T
        hidden = torch.tanh(h @ w["C.0.weight"].T + w["C.0.bias"])
        outputs.append(hidden @ w["C.2.weight"].T + w["C.2.bias"] + x[:, t] @ w["D"].T)
    return torch.stack(outputs, 1)


def eager_improved(norm: str) -> Callable[[Weights, Tensor, Tensor, Tensor], Tensor]:
    def run(w: Weights, x: Tensor, reset: Tensor, states: Tensor) -> Tensor:
        h = list(states)
        outputs = []
        for t in range(x.shape[1]):
            features = torch.tanh(x[:, t] @ w["encoder.weight"].T + w["encoder.bias"])
            for i in range(2):
                p = {n.removeprefix(f"layers.{i}."): v for n, v in w.items()}
                s = torch.where(reset[:, t, None], torch.zeros_like(h[i]), h[i])
                s = s @ p["A"].T + features @ p["B"].T + p["bias"]
                if norm == "state":
                    s = layer_norm(s, p["norm.weight"], p["norm.bias"])
                h[i] = s
                y = s @ p["C"].T + features @ p["D"].T
                if norm == "output":
                    y = layer_norm(y, p["norm.weight"], p["norm.bias"])
                features = torch.tanh(y) if norm == "none" else features + torch.tanh(y)
            outputs.append(features @ w["actor.weight"].T + w["actor.bias"])
        return torch.stack(outputs, 1)

    return run


EAGER = {
    "standard": eager_standard,
    "norm_output": eager_improved("output"),
    "norm_state": eager_improved("state"),
    "no_norm": eager_improved("none"),
}


def eager_meta_gradient(
    kind: str,
    weights: Weights,
    rates: Weights | float,
    tasks: list[tuple[Any, ...]],
    state: Tensor,
    steps: int,
    first_order: bool = False,
) -> tuple[float, list[Tensor]]:
    """The mean query loss and its gradients, by autograd over the eager loop."""

    def loss(w: Weights, x: dict[str, Tensor], y: Tensor) -> Tensor:
        return (EAGER[kind](w, x["x"], x["reset"], state) - y).square().mean()

    total = torch.zeros((), dtype=torch.float64)
    for support_x, support_y, query_x, query_y in tasks:
        w = dict(weights)
        for _ in range(steps):
            gradients = torch.autograd.grad(
                loss(w, support_x, support_y), list(w.values()), create_graph=True,
                allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            if first_order:
                gradients = tuple(g.detach() for g in gradients)
            w = {
                n: p - (rates if isinstance(rates, float) else rates[n]) * g
                for (n, p), g in zip(w.items(), gradients, strict=True)
            }
        total = total + loss(w, query_x, query_y) / len(tasks)
    leaves = [*weights.values(), *(rates.values() if isinstance(rates, dict) else ())]
    return float(total.detach()), list(
        torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    )


def copies(parameters: Weights) -> Weights:
    return {n: p.detach().clone().requires_grad_() for n, p in parameters.items()}


class TestMetaGradient:
    """Equal to the eager implementation to 1e-8, with resets and initial states."""

    @pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
    @pytest.mark.parametrize("kind", EAGER)
    def test_second_order(self, kind: str, steps: int) -> None:
        self.compare(kind, steps)

    @pytest.mark.parametrize("steps", [1, 3])
    @pytest.mark.parametrize("kind", EAGER)
    def test_first_order(self, kind: str, steps: int) -> None:
        self.compare(kind, steps, first_order=True)

    @pytest.mark.parametrize("first_order", [False, True])
    @pytest.mark.parametrize("kind", EAGER)
    def test_meta_sgd(self, kind: str, first_order: bool) -> None:
        self.compare(kind, 2, first_order=first_order, learn_inner_lr=True)

    @pytest.mark.parametrize("chunk_size", [1, 2])
    def test_chunks(self, chunk_size: int) -> None:
        self.compare("norm_state", 2, chunk_size=chunk_size)

    @pytest.mark.parametrize(("rows", "calls"), [(10, 1), (4096, 2), (5000, 3)])
    def test_large_tasks_run_in_chunks_by_themselves(self, rows: int, calls: int) -> None:
        model, seen = torch.nn.Linear(2, 1), []
        model.register_forward_hook(lambda *_: seen.append(1))
        x, y = torch.randn(rows, 2), torch.randn(rows, 1)
        MetaMAML(model).meta_update([(x, y, x, y)] * 3)
        assert len(seen) == 2 * calls  # of the support and of the query sets

    def test_tasks_of_different_lengths(self) -> None:
        tasks = [*make_tasks(2, 4), *make_tasks(2, 7), *make_tasks(1, 4)]
        tasks = [tasks[i] for i in (0, 2, 4, 1, 3)]
        self.compare("standard", 2, tasks=tasks)

    def test_one_task_of_one_step(self) -> None:
        self.compare("norm_output", 2, tasks=make_tasks(1, 1))

    def test_float32(self) -> None:
        model = make("norm_output")
        tasks, state = make_tasks(), initial_state("norm_output")
        expected = MetaMAML(model, inner_lr=0.1).meta_gradient(tasks, state)
        single = [tuple(cast(part) for part in task) for task in tasks]
        actual = MetaMAML(copy.deepcopy(model).float(), inner_lr=0.1).meta_gradient(
            single, state.float()
        )
        for name, gradient in expected.weights.items():
            error = (actual.weights[name].double() - gradient).norm()
            assert error <= 1e-4 * gradient.norm()

    @staticmethod
    def compare(
        kind: str, steps: int, tasks: list[tuple[Any, ...]] | None = None, **options: Any
    ) -> None:
        model, state = make(kind), initial_state(kind)
        tasks = make_tasks() if tasks is None else tasks
        maml = MetaMAML(model, inner_lr=0.3, inner_steps=steps, **options)
        for rate in maml._rates.values():
            rate.data.uniform_(0.1, 0.5)
        rates = copies(maml._rates) if maml._rates else 0.3
        loss, expected = eager_meta_gradient(
            kind,
            copies(dict(model.named_parameters())),
            rates,
            tasks,
            state,
            steps,
            options.get("first_order", False),
        )
        assert max(float(g.abs().max()) for g in expected) > 1e-2
        for loss_fn in (None, squared_error):  # written out, where it can be, and vmapped
            actual = maml.meta_gradient(tasks, state, loss_fn)
            gradients = [*actual.weights.values(), *actual.rates.values()]
            assert len(gradients) == len(expected)
            for one, other in zip(gradients, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-8)
            assert float(actual.losses.mean()) == pytest.approx(loss, abs=1e-10)

    def test_second_order_differs_from_first(self) -> None:
        model, tasks = make("standard"), make_tasks()
        second = MetaMAML(model, inner_lr=0.3).meta_gradient(tasks)
        first = MetaMAML(model, inner_lr=0.3, first_order=True).meta_gradient(tasks)
        assert not torch.allclose(second.weights["A"], first.weights["A"], rtol=1e-2)

    @pytest.mark.parametrize("kind", ["wrapped", "needs_state", "stateless"])
    def test_other_models_equal_a_loop_over_tasks(self, kind: str) -> None:
        model, tasks = make(kind), without_resets(make_tasks())
        state = None if kind == "stateless" else initial_state(kind)
        actual = MetaMAML(model, inner_lr=0.3, inner_steps=2).meta_gradient(tasks, state)
        weights = copies(dict(model.named_parameters()))
        total = torch.zeros((), dtype=torch.float64)

        def loss(w: Weights, x: Tensor, y: Tensor) -> Tensor:
            output = functional_call(model, w, (x,) if state is None else (x, state))
            return F.mse_loss(output if state is None else output[0], y)

        for support_x, support_y, query_x, query_y in tasks:
            w = dict(weights)
            for _ in range(2):
                gradients = torch.autograd.grad(
                    loss(w, support_x, support_y), list(w.values()), create_graph=True
                )
                w = {n: p - 0.3 * g for (n, p), g in zip(w.items(), gradients, strict=True)}
            total = total + loss(w, query_x, query_y) / len(tasks)
        expected = torch.autograd.grad(total, list(weights.values()))
        for one, other in zip(actual.weights.values(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)

    def test_state_that_the_model_needs_is_its_own_init(self) -> None:
        tasks = without_resets(make_tasks())
        maml = MetaMAML(make("needs_state"))
        zeros = torch.zeros(B, N, dtype=torch.float64)
        assert torch.equal(
            maml.meta_gradient(tasks).losses, maml.meta_gradient(tasks, zeros).losses
        )

    def test_each_task_has_its_own_state(self) -> None:
        model, states = make("standard"), torch.randn(G, B, N, dtype=torch.float64)
        tasks = [
            (sx | {"hidden_state": h}, sy, qx | {"hidden_state": h}, qy)
            for (sx, sy, qx, qy), h in zip(make_tasks(), states, strict=True)
        ]
        actual = MetaMAML(model).meta_gradient(tasks)
        expected = [
            MetaMAML(model).meta_gradient([task], h).losses[0]
            for task, h in zip(make_tasks(), states, strict=True)
        ]
        torch.testing.assert_close(actual.losses, torch.stack(expected))


class Recurrent(nn.Module):
    """A layer of torch without vmap, and a head."""

    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = layer(IN, H, batch_first=True)
        self.head = nn.Linear(H, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


class _Tanh(torch.autograd.Function):
    """It has neither vmap nor a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1.0 - ctx.saved_tensors[0].square())


class OnceDifferentiable(nn.Module):
    """A stateless model of which torch has the first derivatives alone."""

    def __init__(self, tanh: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.head, self.tanh = nn.Linear(IN, H), nn.Linear(H, OUT), tanh

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tanh(self.linear(x)))


def by_hand(
    model: nn.Module, call: Callable[[Weights, Tensor], Tensor], tasks: Any, first_order: bool
) -> list[Tensor]:
    """The meta-gradient of two inner steps with rate 0.3, one task after the other."""
    names = [name for name, _ in model.named_parameters()]
    weights = copies(dict(model.named_parameters()))
    total = torch.zeros((), dtype=torch.float64)
    for support_x, support_y, query_x, query_y in tasks:
        w = weights
        for _ in range(2):
            loss = F.mse_loss(call(w, support_x), support_y)
            gradients = torch.autograd.grad(loss, list(w.values()), create_graph=not first_order)
            w = {n: w[n] - 0.3 * g for n, g in zip(names, gradients, strict=True)}
        total = total + F.mse_loss(call(w, query_x), query_y) / len(tasks)
    return list(torch.autograd.grad(total, list(weights.values())))


class TestModelsWithoutVmap:
    @pytest.mark.parametrize("chunk_size", [None, 1, 2])
    @pytest.mark.parametrize("first_order", [False, True])
    @pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
    def test_layers_of_torch(
        self, layer: type[nn.RNNBase], first_order: bool, chunk_size: int | None
    ) -> None:
        torch.manual_seed(0)
        model, tasks = Recurrent(layer).double(), without_resets(make_tasks())
        maml = MetaMAML(model, 0.3, 0.1, first_order, inner_steps=2, chunk_size=chunk_size)
        expected = by_hand(model, lambda w, x: functional_call(model, w, (x,)), tasks, first_order)
        for one, other in zip(maml.meta_gradient(tasks).weights.values(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        assert maml.meta_update(tasks) > maml.meta_update(tasks)
        assert maml.adapt_task(*tasks[0][:2])["layer.weight_hh_l0"].shape[1] == H
        copy.deepcopy(model)(tasks[0][0]).sum().backward()

    def test_a_module_with_first_derivatives_only(self) -> None:
        torch.manual_seed(0)
        model, tasks = OnceDifferentiable(_Tanh.apply).double(), without_resets(make_tasks())
        with pytest.raises(RuntimeError, match=r"torch\.func\.vmap can map .* or chunk_size=1 of"):
            MetaMAML(model, 0.3).meta_update(tasks)
        with pytest.raises(RuntimeError, match="second derivatives unless first_order=True"):
            MetaMAML(model, 0.3, chunk_size=1).meta_update(tasks)
        maml = MetaMAML(model, 0.3, first_order=True, inner_steps=2, chunk_size=1)
        twice = OnceDifferentiable(torch.tanh).double()
        expected = by_hand(model, lambda w, x: functional_call(twice, w, (x,)), tasks, True)
        for one, other in zip(maml.meta_gradient(tasks).weights.values(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        (x, y, *_), *_ = tasks
        with torch.no_grad():
            maml.adapt_task(x, y)


def tied_module() -> nn.Module:
    layer = nn.Linear(IN, IN)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(IN, OUT))


def tied_weight() -> nn.Module:
    model = nn.Sequential(nn.Linear(IN, IN), nn.Tanh(), nn.Linear(IN, IN), nn.Linear(IN, OUT))
    model[2].weight = model[0].weight
    return model


class TestTiedWeights:
    """What is used twice is one weight, which adapts once."""

    @pytest.mark.parametrize("make_model", [tied_module, tied_weight])
    def test_meta_gradient(self, make_model: Callable[[], nn.Module]) -> None:
        torch.manual_seed(0)
        model, tasks = make_model().double(), without_resets(make_tasks())

        def call(w: Weights, x: Tensor) -> Tensor:
            second = w.get("2.bias", w["0.bias"])
            hidden = F.linear(F.linear(x, w["0.weight"], w["0.bias"]).tanh(), w["0.weight"], second)
            return F.linear(hidden, w["3.weight"], w["3.bias"])

        maml = MetaMAML(model, 0.3, inner_steps=2)
        expected = by_hand(model, call, tasks, False)
        for one, other in zip(maml.meta_gradient(tasks).weights.values(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        before = dict(model.named_parameters(remove_duplicate=False))
        maml.meta_update(tasks)
        maml.adapt_task(*tasks[0][:2])
        with pytest.raises(RuntimeError, match=r"size|shape"):
            maml.meta_update([(x[..., 1:], y, qx, qy) for x, y, qx, qy in tasks])
        after = dict(model.named_parameters(remove_duplicate=False))
        assert all(after[name] is parameter for name, parameter in before.items())
        assert model[0].weight is model[2].weight
        assert isinstance(model[0].weight, nn.Parameter)


def cast(part: Any) -> Any:
    if isinstance(part, dict):
        return {name: cast(x) for name, x in part.items()}
    return part.float() if part.is_floating_point() else part


class TestLosses:
    def test_integers_mean_cross_entropy(self) -> None:
        model = make("standard")
        generator = torch.Generator().manual_seed(3)
        tasks = [
            (sx, torch.randint(OUT, (B, T), generator=generator), qx,
             torch.randint(OUT, (B, T), generator=generator))
            for sx, _, qx, _ in make_tasks()
        ]  # fmt: skip

        def loss_fn(output: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(output.flatten(0, 1), target.flatten())

        maml = MetaMAML(model, inner_lr=0.5)
        default, given = maml.meta_gradient(tasks), maml.meta_gradient(tasks, loss_fn=loss_fn)
        torch.testing.assert_close(default.losses, given.losses)
        for name, gradient in default.weights.items():
            torch.testing.assert_close(gradient, given.weights[name])
        tasks[1][1][0, 0] = OUT
        with pytest.raises(ValueError, match=r"support_y .* must lie in \[0, 2\), got 0 to 2"):
            maml.meta_gradient(tasks)

    def test_policy_gradient_with_a_nest_of_targets(self) -> None:
        """The meta-gradient of a policy-gradient loss equals one by finite differences."""
        model, tasks = make("standard"), []
        for sx, _, qx, _ in make_tasks():
            targets = [
                {"actions": torch.randint(OUT, (B, T)), "advantages": torch.randn(B, T).double()}
                for _ in range(2)
            ]
            tasks.append((sx, targets[0], qx, targets[1]))

        def loss_fn(logits: Tensor, target: dict[str, Tensor]) -> Tensor:
            log_probs = F.log_softmax(logits, -1)
            taken = log_probs.gather(-1, target["actions"].unsqueeze(-1)).squeeze(-1)
            return -(taken * target["advantages"]).mean()

        maml = MetaMAML(model, inner_lr=0.5, inner_steps=2)
        gradient = maml.meta_gradient(tasks, loss_fn=loss_fn)
        assert isinstance(model, StateSpaceModel)
        direction = torch.randn_like(model.A)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                model.A.add_(sign * 1e-5 * direction)
            losses.append(maml.meta_gradient(tasks, loss_fn=loss_fn).losses.mean())
            with torch.no_grad():
                model.A.sub_(sign * 1e-5 * direction)
        difference = (losses[0] - losses[1]) / 2e-5
        torch.testing.assert_close((gradient.weights["A"] * direction).sum(), difference)


class TestInnerUpdate:
    """What a trainer of policies builds on."""

    def test_fresh_batches_between_steps(self) -> None:
        """Several steps with a batch each, differentiated into the model's own parameters."""
        model = make("norm_state")
        maml = MetaMAML(model, inner_lr=0.2, learn_inner_lr=True)
        x, y = torch.randn(3, G, B, T, IN).double(), torch.randn(3, G, B, T, OUT).double()

        def loss(weights: Weights, batch: dict[str, Tensor]) -> Tensor:
            mean, log_std, value, _ = functional_call(model, weights, (batch["x"],))
            log_prob = -0.5 * ((batch["y"] - mean) / log_std.exp()).square() - log_std
            return value.square().mean() - log_prob.mean()

        weights = maml.task_weights(G)
        for step in range(2):
            batch = {"x": x[step], "y": y[step]}
            weights, losses = inner_update(loss, weights, batch, maml.rates)
            assert losses.shape == (G,)
        query = task_losses(loss, weights, {"x": x[2], "y": y[2]})
        assert isinstance(maml.rates, dict)
        leaves = [*model.parameters(), *maml.rates.values()]
        actual = torch.autograd.grad(query.mean(), leaves)

        expected = [torch.zeros_like(p) for p in leaves]
        for g in range(G):
            w = dict(model.named_parameters())
            for step in range(2):
                value = loss(w, {"x": x[step, g], "y": y[step, g]})
                gradients = torch.autograd.grad(value, list(w.values()), create_graph=True)
                w = {
                    n: p - maml.rates[n] * d for (n, p), d in zip(w.items(), gradients, strict=True)
                }
            value = loss(w, {"x": x[2, g], "y": y[2, g]})
            for total, part in zip(expected, torch.autograd.grad(value, leaves), strict=True):
                total += part / G
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)

    def test_without_gradients_nothing_is_kept(self) -> None:
        model, maml = make("standard"), MetaMAML(make("standard"), learn_inner_lr=True)

        def loss(weights: Weights, x: Tensor) -> Tensor:
            return functional_call(model, weights, (x,))[0].square().mean()

        x = torch.randn(G, B, T, IN).double()
        kept, _ = inner_update(loss, maml.task_weights(G), x, maml.rates)
        with torch.no_grad():
            weights, _ = inner_update(loss, maml.task_weights(G), x, maml.rates)
            torch.testing.assert_close(weights["A"], kept["A"], rtol=0, atol=1e-14)
            weights, _ = inner_update(loss, weights, x, maml.rates)
        assert kept["A"].requires_grad
        assert not weights["A"].requires_grad

    def test_adapted_weights_act_together(self) -> None:
        """One vmapped call steps every task with its own weights."""
        model = make("standard")
        maml, x = MetaMAML(model, inner_lr=0.5), torch.randn(G, B, IN).double()
        tasks = without_resets(make_tasks())
        each = [maml.adapt_task(task[0], task[1]) for task in tasks]
        weights = {n: torch.stack([w[n] for w in each]) for n in each[0]}
        with torch.no_grad():
            together, _ = vmap(lambda w, x: functional_call(model, w, (x,)))(weights, x)
            for g in range(G):
                torch.testing.assert_close(together[g], functional_call(model, each[g], (x[g],))[0])

    def test_refuses(self) -> None:
        weights = MetaMAML(make("standard")).task_weights(2)
        x = torch.randn(2, 3).double()
        with pytest.raises(ValueError, match=r"the loss must be a scalar tensor, got \[3\]"):
            inner_update(lambda w, x: x * w["A"].sum(), weights, x, 0.1)
        with pytest.raises(ValueError, match="must depend on the weights"):
            inner_update(lambda w, x: x.sum(), weights, x, 0.1)
        with pytest.raises(ValueError, match="rates must hold"):
            inner_update(lambda w, x: w["A"].sum(), weights, x, {"A": torch.ones(())})


class TestAdaptTask:
    @pytest.mark.parametrize("num_steps", [0, 1, 4])
    def test_equals_plain_gradient_descent(self, num_steps: int) -> None:
        model, state = make("norm_output"), initial_state("norm_output")
        before = {n: p.clone() for n, p in model.state_dict().items()}
        (x, y, *_), *_ = make_tasks()
        with torch.no_grad():
            adapted = MetaMAML(model, inner_lr=0.3).adapt_task(x, y, state, num_steps=num_steps)
        assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
        assert not any(w.requires_grad for w in adapted.values())
        other = copy.deepcopy(model)
        sgd = torch.optim.SGD(other.parameters(), lr=0.3)
        for _ in range(num_steps):
            sgd.zero_grad()
            F.mse_loss(other(x["x"], state, x["reset"])[0], y).backward()
            sgd.step()
        for name, parameter in other.named_parameters():
            torch.testing.assert_close(adapted[name], parameter.detach(), rtol=0, atol=1e-12)

    def test_weights_are_no_views_of_the_model(self) -> None:
        model = make("standard")
        (x, y, *_), *_ = make_tasks()
        adapted = MetaMAML(model).adapt_task(x, y, num_steps=0)
        adapted["A"].detach().zero_()
        assert dict(model.named_parameters())["A"].abs().sum() > 0

    @pytest.mark.parametrize("first_order", [False, True])
    @pytest.mark.parametrize("kind", ["standard", "norm_output", "stateless"])
    def test_an_outer_loss_of_the_user(self, kind: str, first_order: bool) -> None:
        """Its gradient is the meta-gradient, of the parameters and of the rates."""
        model, tasks = make(kind), without_resets(make_tasks())
        maml = MetaMAML(model, 0.3, first_order=first_order, inner_steps=2, learn_inner_lr=True)
        expected = maml.meta_gradient(tasks)
        losses = []
        for support_x, support_y, query_x, query_y in tasks:
            weights = maml.adapt_task(support_x, support_y)
            output = functional_call(model, weights, (query_x,))
            output = output[0] if isinstance(output, tuple) else output
            losses.append(F.mse_loss(output, query_y))
        torch.stack(losses).mean().backward()
        assert isinstance(maml.rates, dict)
        for name, parameter in model.named_parameters():
            given = (parameter.grad, maml.rates[name].grad)
            for actual, wanted in zip(given, (expected.weights, expected.rates), strict=True):
                actual = torch.zeros_like(parameter) if actual is None else actual
                torch.testing.assert_close(actual, wanted[name], rtol=0, atol=1e-10)

    def test_inference_mode_is_named(self) -> None:
        (x, y, *_), *_ = make_tasks()
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad\(\)"):
            MetaMAML(make("standard")).adapt_task(x, y)

    def test_learnt_rates_are_used(self) -> None:
        maml = MetaMAML(make("standard"), learn_inner_lr=True)
        (x, y, *_), *_ = make_tasks()
        for rate in maml._rates.values():
            rate.data.zero_()
        adapted = maml.adapt_task(x, y, num_steps=3)
        assert torch.equal(adapted["A"], maml.model.get_parameter("A"))

    def test_divergence_is_an_error(self) -> None:
        (x, y, *_), *_ = make_tasks()
        maml = MetaMAML(make("stateless"), inner_lr=1e200)
        with pytest.raises(FloatingPointError, match=r"support loss is|is not finite after"):
            maml.adapt_task(x["x"], y, num_steps=4)


class TestMetaUpdate:
    def test_learns_to_adapt(self) -> None:
        """Regression onto a random gain of each task: one step fits better and better."""
        model = make("standard")
        generator = torch.Generator().manual_seed(0)

        def draw() -> list[tuple[Any, ...]]:
            tasks = []
            for _ in range(4):
                gain = torch.randn((), generator=generator, dtype=torch.float64)
                x = torch.randn(2, 4, T, IN, generator=generator, dtype=torch.float64)
                y = gain * x[..., :OUT].cumsum(2)
                tasks.append((x[0], y[0], x[1], y[1]))
            return tasks

        maml = MetaMAML(model, 0.05, 0.01, learn_inner_lr=True, max_grad_norm=10.0)
        losses = [maml.meta_update(draw()) for _ in range(150)]
        assert sum(losses[-20:]) < 0.5 * sum(losses[:20])

    def test_follows_adam_and_clips(self) -> None:
        tasks = make_tasks()
        for max_grad_norm in (None, 0.01):
            model = make("standard")
            maml = MetaMAML(model, outer_lr=0.1, max_grad_norm=max_grad_norm)
            other = copy.deepcopy(model)
            adam = torch.optim.Adam(other.parameters(), lr=0.1)
            for _ in range(3):
                gradient = maml.meta_gradient(tasks)
                for name, parameter in other.named_parameters():
                    parameter.grad = gradient.weights[name].clone()
                if max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(other.parameters(), max_grad_norm)
                adam.step()
                assert maml.meta_update(tasks) == pytest.approx(float(gradient.losses.mean()))
                for one, two in zip(model.parameters(), other.parameters(), strict=True):
                    torch.testing.assert_close(one, two)

    def test_inner_steps_of_one_update(self) -> None:
        tasks = make_tasks()
        three = MetaMAML(make("standard"), inner_steps=3).meta_update(tasks)
        assert MetaMAML(make("standard")).meta_update(tasks, inner_steps=3) == three

    def test_frozen_parameters_stay(self) -> None:
        model = make("standard")
        assert isinstance(model, StateSpaceModel)
        model.A.requires_grad_(False)
        before = model.A.clone()
        maml = MetaMAML(model)
        maml.meta_update(make_tasks())
        assert torch.equal(model.A, before)
        assert "A" not in maml.adapt_task(*make_tasks()[0][:2])

    @pytest.mark.parametrize("chunk_size", [None, 1])
    def test_freezing_after_construction(self, chunk_size: int | None) -> None:
        model, tasks = make("standard"), make_tasks()
        maml = MetaMAML(model, 0.1, 0.05, learn_inner_lr=True, chunk_size=chunk_size)
        maml.meta_update(tasks)
        model.A.requires_grad_(False)
        model.A.grad = torch.ones_like(model.A)  # of a loss of before
        before = copy.deepcopy(model.state_dict())
        assert isinstance(maml.rates, dict)
        rate = maml.rates["A"].detach().clone()
        gradient = maml.meta_gradient(tasks)
        assert "A" not in gradient.weights.keys() | gradient.rates.keys()
        assert "A" not in maml.adapt_task(*tasks[0][:2]).keys() | maml.task_weights(1).keys()
        maml.meta_update(tasks)
        assert torch.equal(model.A, before["A"])
        assert torch.equal(maml.rates["A"], rate)
        assert not torch.equal(model.B, before["B"])
        model.A.requires_grad_(True)
        with pytest.raises(ValueError, match=r"gradient must hold \['A'\], which are trained now"):
            maml.outer_step(gradient)
        maml.meta_update(tasks)
        assert not torch.equal(model.A, before["A"])
        model.requires_grad_(False)
        with pytest.raises(ValueError, match=r"must have parameters .*, all are frozen"):
            maml.meta_update(tasks)

    @pytest.mark.parametrize("optimizer", [None, partial(torch.optim.SGD, lr=0.1, momentum=0.9)])
    def test_moving_the_model_after_construction(self, optimizer: Any) -> None:
        maml = MetaMAML(make("standard"), 0.1, 0.05, learn_inner_lr=True, optimizer=optimizer)
        maml.meta_update(make_tasks())
        other = copy.deepcopy(maml)
        other.model.float()
        other.model.double()  # back again: only rounded, as are rates and moments then
        maml.model.float()
        tasks = [tuple(cast(part) for part in task) for task in make_tasks()]
        assert maml.meta_update(tasks) == pytest.approx(other.meta_update(make_tasks()), rel=1e-5)
        assert isinstance(maml.rates, dict)
        assert maml.rates["A"].dtype == maml.model.get_parameter("A").dtype == torch.float32
        for name, parameter in maml.model.named_parameters():
            close = other.model.get_parameter(name).detach().float()
            torch.testing.assert_close(parameter.detach(), close, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("call", ["meta_update", "adapt_task", "task_weights"])
    def test_other_changes_after_construction(self, call: str) -> None:
        def use(maml: MetaMAML) -> Any:
            tasks = make_tasks()
            arguments = {"meta_update": (tasks,), "adapt_task": tasks[0][:2], "task_weights": (2,)}
            return getattr(maml, call)(*arguments[call])

        def unfreeze(model: nn.Module) -> None:
            model.D.requires_grad_(True)

        def replace(model: nn.Module) -> None:
            model.A = nn.Parameter(model.A.detach().clone())

        def add(model: nn.Module) -> None:
            model.more = nn.Linear(2, 2).double()

        for change, match in (
            (unfreeze, "D of the model must not require gradients, as when"),
            (replace, "A of the model must stay the parameter that"),
            (add, r"more\.weight of the model must not require gradients, as when"),
        ):
            model = make("standard")
            model.D.requires_grad_(False)
            maml = MetaMAML(model)
            change(model)
            with pytest.raises(ValueError, match=match):
                use(maml)
        maml = MetaMAML(make("standard"))
        maml.model = make("standard")
        with pytest.raises(ValueError, match="A of the model must stay the parameter that"):
            use(maml)

    def test_another_optimizer_after_construction(self) -> None:
        maml = MetaMAML(make("standard"), learn_inner_lr=True)
        maml.optimizer = torch.optim.SGD(make("standard").parameters(), lr=0.1)
        with pytest.raises(ValueError, match="optimizer must hold A, which it would not move"):
            maml.meta_update(make_tasks())
        maml.optimizer = torch.optim.SGD(maml.model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match="optimizer must hold the rate of A"):
            maml.meta_update(make_tasks())
        assert isinstance(maml.rates, dict)
        learnt = [*maml.model.parameters(), *maml.rates.values()]
        maml.optimizer = torch.optim.SGD(learnt, lr=0.1)
        maml.meta_update(make_tasks())

    def test_running_statistics_are_refused_in_training(self) -> None:
        layers = nn.Linear(IN, H), nn.BatchNorm1d(H), nn.Linear(H, OUT)
        model = nn.Sequential(*layers).double()
        maml, before = MetaMAML(model), copy.deepcopy(model.state_dict())
        x, y = torch.randn(2, 6, IN).double(), torch.randn(2, 6, OUT).double()
        with pytest.raises(ValueError, match="1, a BatchNorm1d, must not update running stat"):
            maml.meta_update([(x[0], y[0], x[1], y[1])])
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        model[1].eval()
        maml.meta_update([(x[0], y[0], x[1], y[1])])

    def test_rates_stay_in_their_range(self) -> None:
        maml = MetaMAML(make("standard"), 0.1, outer_lr=2.0, learn_inner_lr=True)
        maml.meta_update(make_tasks())  # Adam's first step has the length of its rate
        assert isinstance(maml.rates, dict)
        rates = torch.cat([rate.detach().flatten() for rate in maml.rates.values()])
        assert set(rates.tolist()) == {0.0, 1.0}

    def test_clips_by_default(self) -> None:
        model = make("standard")
        before = copy.deepcopy(model.state_dict())
        maml = MetaMAML(model, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
        tasks = [(x, 1e3 * y, qx, 1e3 * qy) for x, y, qx, qy in make_tasks()]
        assert maml.outer_step(maml.meta_gradient(tasks)) > 1e3
        step = torch.cat([(t - before[n]).flatten() for n, t in model.state_dict().items()])
        assert float(step.norm()) == pytest.approx(10.0)

    def test_clips_a_gradient_whose_square_is_not_finite(self) -> None:
        model = make("standard").float()
        before = copy.deepcopy(model.state_dict())
        maml = MetaMAML(model, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
        weights = {name: torch.full_like(p, 1e25) for name, p in model.named_parameters()}
        norm = maml.outer_step(MetaGradient(torch.zeros(1), weights, {}))
        count = sum(p.numel() for p in model.parameters())
        assert norm == pytest.approx(1e25 * math.sqrt(count))
        step = torch.cat([(t - before[n]).flatten() for n, t in model.state_dict().items()])
        assert float(step.norm()) == pytest.approx(10.0, rel=1e-4)

    def test_another_optimizer(self) -> None:
        model = make("standard")
        maml = MetaMAML(
            model,
            max_grad_norm=None,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        )
        before = model.get_parameter("A").detach().clone()
        gradient = maml.meta_gradient(make_tasks())
        maml.meta_update(make_tasks())
        torch.testing.assert_close(model.get_parameter("A"), before - 0.5 * gradient.weights["A"])

    def test_resume_from_a_checkpoint(self) -> None:
        tasks = make_tasks()
        options: dict[str, Any] = {"inner_lr": 0.1, "outer_lr": 0.05, "learn_inner_lr": True}
        maml = MetaMAML(make("norm_state"), **options)
        maml.meta_update(tasks)
        file = io.BytesIO()
        torch.save(maml.state_dict(), file)
        file.seek(0)
        other = MetaMAML(make("norm_state"), **options)
        other.load_state_dict(torch.load(file, weights_only=True))
        for _ in range(2):
            assert maml.meta_update(tasks) == other.meta_update(tasks)
        bad = other.state_dict()
        bad["rates"] = {**bad["rates"], "log_std": torch.ones(1)}
        with pytest.raises(ValueError, match="rates tensor log_std must have shape"):
            other.load_state_dict(bad)
        with pytest.raises(ValueError, match="version must be 1, got 0"):
            other.load_state_dict({"version": 0})
        for name, part in (("optimizer", {}), ("model", None), ("rates", None)):
            with pytest.raises(ValueError, match="training state does not fit"):
                other.load_state_dict({**other.state_dict(), name: part})

    def test_resume_of_another_optimizer(self) -> None:
        def make_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            return torch.optim.AdamW(parameters, lr=0.05, amsgrad=True)

        maml, other = (MetaMAML(make("norm_state"), optimizer=make_optimizer) for _ in range(2))
        maml.meta_update(make_tasks())
        other.load_state_dict(copy.deepcopy(maml.state_dict()))
        for _ in range(2):
            assert maml.meta_update(make_tasks()) == other.meta_update(make_tasks())


class TestBadInput:
    @staticmethod
    def untouched(maml: MetaMAML, call: Callable[[], object], error: Any, match: str) -> None:
        state = copy.deepcopy(maml.state_dict())
        with pytest.raises(error, match=match):
            call()
        after = maml.state_dict()
        for key in ("model", "rates"):
            assert all(torch.equal(x, after[key][n]) for n, x in state[key].items())
        for i, moments in state["optimizer"]["state"].items():
            for n, x in moments.items():
                assert torch.equal(x, after["optimizer"]["state"][i][n])

    @pytest.mark.parametrize("part", range(4))
    def test_nan_names_the_task(self, part: int) -> None:
        maml, tasks = MetaMAML(make("standard"), learn_inner_lr=True), make_tasks()
        maml.meta_update(tasks)
        tensor = tasks[1][part] if part % 2 else tasks[1][part]["x"]
        tensor[0, 2, 0] = float("nan")
        what = "support loss before inner step 0" if part < 2 else "query loss"
        for size in (None, 1):
            maml.chunk_size = size
            self.untouched(
                maml,
                lambda: maml.meta_update(tasks),
                FloatingPointError,
                f"task 1: the {what} is nan",
            )

    def test_diverging_inner_steps(self) -> None:
        maml = MetaMAML(make("standard"), inner_lr=1e150, inner_steps=3)
        self.untouched(
            maml,
            lambda: maml.meta_update(make_tasks()),
            FloatingPointError,
            r"task 0: the support loss before inner step [12] is",
        )

    def test_step_that_is_not_finite(self) -> None:
        model = make("standard").float()
        maml = MetaMAML(model, outer_lr=1e39)
        tasks = [
            tree_map(lambda x: x.float() if x.is_floating_point() else x, t) for t in make_tasks()
        ]
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(FloatingPointError, match="the step of the optimizer leads to"):
            maml.meta_update(tasks)
        assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())

    def test_gradient_that_is_not_finite(self) -> None:
        maml = MetaMAML(make("standard"))

        def loss_fn(output: Tensor, target: Tensor) -> Tensor:
            return (output.mean() * target.mean()).abs().sqrt()  # its slope at zero is infinite

        tasks = make_tasks()
        tasks[2] = (*tasks[2][:3], torch.zeros_like(tasks[2][3]))
        self.untouched(
            maml,
            lambda: maml.meta_update(tasks, loss_fn=loss_fn),
            FloatingPointError,
            "task 2: the meta-gradient of .* is not finite",
        )

    def test_shapes_and_dtypes(self) -> None:
        maml = MetaMAML(make("standard"))
        x, y = make_tasks()[0][:2]
        good = make_tasks()[0]
        cases: list[tuple[Any, Any, str]] = [
            ([], ValueError, "at least one task"),
            ([good, good[:3]], ValueError, r"task 1 must be \(support_x, support_y"),
            ([good, (x["x"][:0], *good[1:])], ValueError, r"support_x of task 1 is empty.*\[0, 6"),
            ([(x["x"][:, :0], y[:, :0], x, y)], ValueError, "support_x of task 0 is empty"),
            ([({}, y, x, y)], ValueError, "support_x of task 0 is empty"),
            ([good, (x, y.numpy(), x, y)], TypeError, "support_y of task 1 must hold tensors, got"),
            ([(x["x"].float(), y, x, y)], TypeError, "support_x of task 0 must have the model's"),
            ([(x, y, x, y.float())], TypeError, "query_y of task 0 must have the output's dtype"),
            ([(x, y, x, y[:, :-1])], ValueError, r"query_y of task 0 must have the output's shape"),
            ([(x, y > 0, x, y)], TypeError, "support_y of task 0 must hold floats or integers"),
            ([(x, {"a": y}, x, y)], TypeError, "support_y of task 0 must be a tensor where"),
            ([(x["x"][..., 1:], y, x, y)], ValueError, "x must have shape"),
        ]
        for tasks, error, match in cases:
            self.untouched(maml, lambda tasks=tasks: maml.meta_update(tasks), error, match)
        reset = torch.zeros(x["x"].shape[:2])  # float32, beside float64 observations
        maml.meta_update([({"reset": reset, **x}, y, x, y)])
        maml.model.load_state_dict(make("standard").state_dict(), assign=True)
        with pytest.raises(ValueError, match="of the model must stay the parameter that"):
            maml.meta_update(make_tasks())
        maml = MetaMAML(make("standard"))
        state = torch.zeros(B + 1, N, dtype=torch.float64)
        with pytest.raises(ValueError, match="hidden_state must have shape"):
            maml.meta_update(make_tasks(), state)
        with pytest.raises(ValueError, match=r"support_x is empty"):
            maml.adapt_task(x["x"][:0], y[:0])
        with pytest.raises(ValueError, match="the model takes no state"):
            MetaMAML(make("stateless")).adapt_task(x["x"], y, state)

    def test_settings(self) -> None:
        model = make("standard")
        with pytest.raises(ValueError, match="inner_lr must be positive where learn_inner_lr"):
            MetaMAML(model, inner_lr=0.0, learn_inner_lr=True)
        with pytest.raises(ValueError, match=r"optimizer must hold C\.2\.bias"):
            MetaMAML(model, optimizer=lambda parameters: torch.optim.SGD(parameters[:-1], lr=0.1))
        with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
            MetaMAML(lambda x: x)
        with pytest.raises(ValueError, match="inner_lr must be finite and at least"):
            MetaMAML(model, inner_lr=float("nan"))
        with pytest.raises(ValueError, match="inner_steps must be at least 1, got 0"):
            MetaMAML(model, inner_steps=0)
        with pytest.raises(ValueError, match="max_grad_norm must be finite and positive"):
            MetaMAML(model, max_grad_norm=0.0)
        with pytest.raises(TypeError, match="chunk_size must be an int"):
            MetaMAML(model, chunk_size=2.5)
        with pytest.raises(ValueError, match="must have parameters"):
            MetaMAML(nn.Identity())
        with pytest.raises(TypeError, match="optimizer must make one from the list"):
            MetaMAML(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_tasks_reach_the_grouped_kernel_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scans see A [G, N, N]: one forward a set, whatever the number of tasks."""
    shapes: list[Any] = []
    module = sys.modules["ssm_fast.ops.dense_scan"]  # the function of that name hides it
    kernel = module._op

    def watched(u: Tensor, A: Tensor, *rest: Any) -> Tensor:
        shapes.append(tuple(A.shape))
        return kernel(u, A, *rest)

    monkeypatch.setattr(module, "_op", watched)
    MetaMAML(make("standard")).meta_gradient(make_tasks(), loss_fn=squared_error)
    assert set(shapes) == {(G, N, N)}
    assert (
        len(shapes) == 6
    )  # support and its adjoint, query and its adjoint, and two of second order
