from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssm_fast.core import ImprovedSSM
from ssm_fast.core.sequence_gradient import sequence_gradient
from ssm_fast.native.gradient import SequenceGradient
from ssm_fast.native.plan import Reason

S, T, I, K = 5, 7, 3, 2


def _model(**options: Any) -> ImprovedSSM:
    torch.manual_seed(0)
    model = ImprovedSSM(I, K, 9, 11, **{"num_layers": 2, **options}).double()
    with torch.no_grad():
        for parameter in model.parameters():  # orthogonal ones hide a transposition, zeros a bias
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def _batch(model: ImprovedSSM) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    state = torch.randn(model.num_layers, S, model.state_dim).double()
    x, actions = torch.randn(S, T, I).double(), torch.randn(S, T, K).double()
    if model.discrete:
        actions = actions[..., 0].gt(0).long()
    return x, actions, state, torch.rand(S, T) < 0.3


def _loss(weights: Tensor, count: int) -> Any:
    """A loss whose gradients differ in every step; of the entropies only where count is 3."""

    def loss(*outputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        pairs = list(zip(weights, outputs, strict=True))[:count]
        return sum((w * x.square()).sum() for w, x in pairs), [2 * w * x for w, x in pairs]

    return loss


@pytest.mark.parametrize(
    ("norm", "residual", "layers", "count", "critic_dim", "discrete"),
    list(
        itertools.product(
            (None, "output", "state"), (True, False), (1, 2), (2, 3), (None, 6), (True, False)
        )
    ),
)
def test_equals_autograd(
    norm: str | None,
    residual: bool,
    layers: int,
    count: int,
    critic_dim: int | None,
    discrete: bool,
) -> None:
    model = _model(
        use_layer_norm=norm is not None,
        norm=norm or "output",
        use_residual=residual,
        num_layers=layers,
        critic_dim=critic_dim,
        discrete=discrete,
    )
    x, actions, state, reset = _batch(model)
    weights = torch.randn(3, S, T).double()
    gradient = sequence_gradient(model, x, state)
    assert gradient
    report = gradient(x, actions, state, reset, _loss(weights, count))
    outputs = model.evaluate_actions(x, actions, state, reset)
    expected, _ = _loss(weights, count)(*outputs)
    expected.backward()
    torch.testing.assert_close(report, expected)
    assert all(p.grad is not None for p in model.parameters())
    flat = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient.vector, flat, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("critic_dim", [None, 40])
def test_any_number_of_rows_and_threads(critic_dim: int | None, dtype: torch.dtype) -> None:
    model = _model(critic_dim=critic_dim).to(dtype)  # the critic's network wider than the features
    gradient: SequenceGradient | None = None
    threads = torch.get_num_threads()
    for rows in (3, 200, 7, 120):
        state = torch.randn(2, rows, 9, dtype=dtype)
        batch = (
            torch.randn(rows, 11, I, dtype=dtype),
            torch.randn(rows, 11, K, dtype=dtype),
            state,
            torch.rand(rows, 11) < 0.3,
        )
        loss = _loss(torch.randn(3, rows, 11, dtype=dtype), 2)
        gradient = gradient or sequence_gradient(model, batch[0], state)
        assert gradient
        vectors = []
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                gradient(*batch, loss)
                vectors.append(gradient.vector.clone())
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(*vectors)
        model.zero_grad()
        loss(*model.evaluate_actions(*batch))[0].backward()
        flat = torch.cat([x.reshape(-1) for x in _gradients(model)])
        error = (vectors[0] - flat).norm() / flat.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-12)


def _gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def test_keeps_the_memory_of_a_model_that_moves() -> None:
    model = _model()
    batch, loss = _batch(model), _loss(torch.randn(3, S, T).double(), 2)
    gradient = sequence_gradient(model, batch[0], batch[2])
    assert gradient
    before = gradient(*batch, loss)
    model.float()
    with pytest.raises(
        TypeError, match=r"the parameters' dtype torch\.float32, got torch\.float64"
    ):
        gradient(*batch, loss)
    assert torch.isfinite(before)


def test_wrong_tensors() -> None:
    model = _model()
    x, actions, state, reset = _batch(model)
    gradient, loss = sequence_gradient(model, x, state), _loss(torch.zeros(3, S, T), 2)
    assert gradient
    with pytest.raises(TypeError, match=r"actions must have dtype torch\.float64"):
        gradient(x, actions.float(), state, reset, loss)
    with pytest.raises(TypeError, match=r"reset must have dtype torch\.bool"):
        gradient(x, actions, state, reset.double(), loss)
    with pytest.raises(ValueError, match="state must have shape"):
        gradient(x, actions, state[:, 1:], reset, loss)

    def of_a_scalar(*outputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        report, (of_log_prob, of_value, *rest) = loss(*outputs)
        return report, [of_log_prob, of_value.sum(), *rest]

    with pytest.raises(ValueError, match="the gradient of the values must have shape"):
        gradient(x, actions, state, reset, of_a_scalar)


def test_reads_the_weights_at_each_call() -> None:
    model = _model()
    batch = _batch(model)
    gradient = sequence_gradient(model, batch[0], batch[2])
    assert gradient
    loss = _loss(torch.randn(3, S, T).double(), 2)
    before = gradient(*batch, loss)
    with torch.no_grad():
        model.layers[0].A.mul_(0.5)
    assert float(gradient(*batch, loss)) != float(before)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda model: model.encoder.register_forward_hook(lambda *_: None), "encoder has a hook"),
        (lambda model: model.layers[0].A.requires_grad_(False), "layers.0.A is not trained"),
        (
            lambda model: setattr(model, "actor", nn.Sequential(model.actor)),
            "actor is a Sequential",
        ),
        (
            lambda model: setattr(model, "evaluate_actions", model.evaluate_actions),
            "overrides evaluate_actions()",
        ),
        (
            lambda model: model.actor.register_full_backward_hook(lambda *_: None),
            "actor has a hook",
        ),
        (
            lambda model: model.actor.weight.register_hook(lambda grad: grad),
            "actor.weight has a backward hook",
        ),
        (
            lambda model: setattr(model.layers[1], "A", model.layers[0].A),
            "layers.0.A is used twice",
        ),
        (lambda model: model.layers.__setitem__(1, model.layers[0]), "is used twice"),
        (
            lambda model: setattr(model.critic_network, "hidden", nn.Identity()),
            "critic_network.hidden is a Identity",
        ),
    ],
)
def test_says_why_a_changed_model_is_left_to_autograd(change: Any, sentence: str) -> None:
    model = _model(critic_dim=4)
    x, _, state, _ = _batch(model)
    assert sequence_gradient(model, x, state)
    change(model)
    reason = sequence_gradient(model, x, state)
    assert isinstance(reason, Reason)
    assert sentence in str(reason)
