"""The gradients of MAML through its inner steps, in one native call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssm_fast._torch import has_function_mode, is_plain
from ssm_fast.native.inputs import Expected, misfit, whole_numbers
from ssm_fast.native.plan import Plan, Reason, plan_of, unavailable
from ssm_fast.nn.fused import is_untouched

_ARGUMENTS = ("x", "hidden_state", "reset")
_OF_ROUND = ("observations", "actions", "log_probs", "reset", "advantages")


class TaskGradients(NamedTuple):
    """What `task_gradients` or `policy_task_gradients` find for ``G`` tasks and ``K`` inner steps.

    Attributes:
        inner_losses: Before each step ``[K, G]``.
        outer_losses: What the gradients are of ``[G]``.
        weights: Gradients with respect to the weights that a task starts from, by their names
            ``[G, ...]``.
        rates: The same for the rates; empty where they are not wanted.
    """

    inner_losses: Tensor
    outer_losses: Tensor
    weights: dict[str, Tensor]
    rates: dict[str, Tensor]


class _Examples(NamedTuple):
    """Sequences and what their loss is of; the tensors are held until the native call has ended."""

    x: Tensor  # [B, T, I]
    y: Tensor | None = None  # [B, T, O]
    labels: Tensor | None = None  # [B, T]
    actions: Tensor | None = None  # [B, T, O]
    log_probs: Tensor | None = None  # [B, T]
    advantages: Tensor | None = None  # [B, T]
    state: Tensor | None = None  # [B, N] or [layers, B, N]
    reset: Tensor | None = None  # [B, T]

    def arguments(
        self, clip_epsilon: float = 0.0, largest_log_ratio: float = 0.0
    ) -> tuple[tuple[int, ...], Any, tuple[float, float]]:
        """Addresses, 0 for what is left out, sizes, and the bounds of a surrogate's ratio."""
        addresses = tuple(0 if t is None else t.data_ptr() for t in self)
        return addresses, self.x.shape[:2], (clip_epsilon, largest_log_ratio)


_NOTHING = ((0,) * len(_Examples._fields), (0, 0), (0.0, 0.0))


class _Unfit(Exception):
    """Why data do not fit the native call."""


@torch.no_grad()
def task_gradients(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    tasks: Sequence[Sequence[Any]],
    state: Tensor | None,
    rates: float | Mapping[str, Tensor],
    steps: int,
    first_order: bool,
) -> TaskGradients | Reason:
    """The gradients of the query losses in one native call, by the chain rule of docs/meta_maml.md.

    Each of several tasks runs on one thread, a few sequences at a time from the first stage to the
    last, so that its activations stay in the caches.

    Args:
        model: A model with a plan.
        parameters: What is adapted, by name: all that the model has.
        tasks: ``(support_x, support_y, query_x, query_y)`` of each, as for `MetaMAML.meta_update`,
            for the default losses.
        state: Before every support and query set, in the model's shape.
        rates: Of the inner steps, one or one for each weight. Gradients are wanted for the latter.
        steps: Inner steps ``K``.
        first_order: Take the inner gradients for constants.

    Returns:
        The gradients, or why native code cannot find them.
    """
    plan = _plan(model, parameters)
    if not plan:
        return plan
    if missing := sorted(set(plan.names) - parameters.keys()):
        return Reason(f"{missing[0]} is not adapted")
    try:
        inner, outer = (
            [_supervised(model, plan, task[part], task[part + 1], state) for task in tasks]
            for part in (0, 2)
        )
    except _Unfit as reason:
        return Reason(str(reason))
    G = len(tasks)
    return _gradients(
        plan,
        parameters,
        [e.arguments() for e in inner] * steps,
        [_NOTHING] * (steps * G) + [e.arguments() for e in outer],
        G,
        rates,
        first_order,
        isinstance(rates, Mapping),
    )


@torch.no_grad()
def policy_task_gradients(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    rounds: Sequence[Mapping[str, Tensor]],
    rates: Mapping[str, Tensor],
    first_order: bool,
    clip_epsilon: float,
    largest_log_ratio: float,
    learn_rates: bool,
) -> TaskGradients | Reason:
    """The gradients of ProMP in one native call: see `MetaRLTrainer`.

    Args:
        model: The policy.
        parameters: What is adapted, by name: all that lead to the actions.
        rounds: Rounds before each step and after the last, ``[G, R, T, ...]``: ``observations``,
            ``actions``, ``log_probs`` when they were taken, ``reset``, ``advantages``.
        rates: Of the inner steps, one for each weight.
        first_order: Take the inner gradients for constants.
        clip_epsilon: Of the surrogates that are summed up in the outer loss; those of the steps are
            not clipped.
        largest_log_ratio: Where the logarithm of any ratio is cut.
        learn_rates: Whether gradients by the rates are wanted.

    Returns:
        The gradients, with the sums of the surrogates for the outer losses, or a reason as
        `task_gradients`.
    """
    plan = _plan(model, parameters)
    if not plan:
        return plan
    G = len(rounds[0]["rewards"])
    try:
        examples = [_round(plan, batch, g) for batch in rounds for g in range(G)]
    except _Unfit as reason:
        return Reason(str(reason))
    if not examples:
        return Reason("there are no tasks")
    inner = [e.arguments(0.0, largest_log_ratio) for e in examples[:-G]]
    outer = [e.arguments(clip_epsilon, largest_log_ratio) for e in examples]
    return _gradients(plan, parameters, inner, outer, G, rates, first_order, learn_rates)


def _plan(model: nn.Module, parameters: Mapping[str, Tensor]) -> Plan | Reason:
    plan = plan_of(model)
    if not plan:
        return plan
    if not is_untouched(model):
        return Reason("the model has a hook")
    sentence = plan.overridden("forward") or plan.not_differentiable(branches=1) or unavailable()
    if sentence is not None:
        return Reason(sentence)
    if has_function_mode():
        return Reason("a mode watches the calls of torch's functions")
    used = plan.used(branches=1)
    for name, own in zip(plan.names, plan.parameters, strict=True):
        if name in used and own is not parameters.get(name):
            return Reason(f"{name} is not adapted")
    return plan


def _gradients(
    plan: Plan,
    parameters: Mapping[str, Tensor],
    inner: list[Any],
    outer: list[Any],
    G: int,
    rates: float | Mapping[str, Tensor],
    first_order: bool,
    learn_rates: bool,
) -> TaskGradients | Reason:
    vector = torch.cat([w.detach().reshape(-1) for w in plan.parameters])  # [P]
    rate = torch.full_like(vector, 0.0 if isinstance(rates, Mapping) else float(rates))
    if isinstance(rates, Mapping):
        views = torch.split(rate, [w.numel() for w in plan.parameters])
        for name, w, view in zip(plan.names, plan.parameters, views, strict=True):
            own = rates.get(name)
            if own is None:
                continue
            if not is_plain(own) or own.shape != w.shape or own.dtype != w.dtype:
                return Reason(f"the rate of {name} is no plain tensor like it")
            view.copy_(own.reshape(-1))
    steps = len(inner) // G
    gradients = vector.new_empty(G, len(vector))
    of_rates = torch.empty_like(gradients) if learn_rates else None
    inner_losses = torch.empty(steps, G, dtype=torch.float64, device="cpu")
    outer_losses = torch.empty(steps + 1, G, dtype=torch.float64, device="cpu")
    outputs = (gradients, of_rates, inner_losses, outer_losses)
    plan.network(1).task_gradients(
        [0 if t is None else t.data_ptr() for t in (vector, rate, *outputs)],
        inner,
        outer,
        G,
        first_order,
    )
    return TaskGradients(
        inner_losses.to(plan.dtype),
        outer_losses.sum(0).to(plan.dtype),
        _by_name(plan, parameters, gradients),
        {} if of_rates is None else _by_name(plan, parameters, of_rates),
    )


def _supervised(model: Any, plan: Plan, x: Any, target: Any, state: Tensor | None) -> _Examples:
    """A supervised set as the native call takes it.

    Raises:
        _Unfit: It does not fit.
    """
    named = dict(x) if isinstance(x, Mapping) else {"x": x}
    if not named.keys() <= set(_ARGUMENTS) or (state is not None and "hidden_state" in named):
        raise _Unfit(f"x has the arguments {sorted(named)}")
    x, hidden, reset = (named.get(name) for name in _ARGUMENTS)
    hidden = state if hidden is None else hidden
    if not isinstance(x, Tensor) or x.ndim not in (2, 3) or x.numel() == 0:
        raise _Unfit("x is no tensor [B, I] or [B, T, I], or empty")
    rows = x.shape[:-1]
    if not hasattr(model, "init_hidden"):
        raise _Unfit(f"{type(model).__name__} has no init_hidden()")
    _check(
        x=(x, (*rows, plan.inputs), plan.dtype),
        hidden_state=(hidden, model.init_hidden(len(x)).shape, plan.dtype),
        reset=(reset, rows, None),
    )
    x = _normalized(plan, x.reshape(len(x), -1, plan.inputs))  # one step is a sequence of one
    reset = None if reset is None else (reset != 0).contiguous()
    hidden = None if hidden is None else hidden.contiguous()
    if isinstance(target, Tensor) and target.dtype == plan.dtype:
        _check(y=(target, (*rows, plan.outputs), plan.dtype))
        return _Examples(x, y=target.contiguous(), state=hidden, reset=reset)
    return _Examples(x, labels=_labels(plan, "y", target, rows), state=hidden, reset=reset)


def _round(plan: Plan, batch: Mapping[str, Tensor], task: int) -> _Examples:
    """What a task played in a round of a `MetaRLTrainer`.

    Raises:
        _Unfit: It does not fit.
    """
    x, actions, log_probs, reset, advantages = (batch[name][task] for name in _OF_ROUND)
    rows, is_discrete = log_probs.shape, plan.stages.log_std is None  # [R, T]
    if len(rows) != 2 or log_probs.numel() == 0:
        raise _Unfit(f"log_probs is {list(rows)}")
    _check(
        observations=(x, (*rows, plan.inputs), plan.dtype),
        actions=(None if is_discrete else actions, (*rows, plan.outputs), plan.dtype),
        log_probs=(log_probs, rows, plan.dtype),
        reset=(reset, rows, None),
        advantages=(advantages, rows, plan.dtype),
    )
    return _Examples(
        _normalized(plan, x),
        labels=_labels(plan, "actions", actions, rows) if is_discrete else None,
        actions=None if is_discrete else actions.contiguous(),
        log_probs=log_probs.contiguous(),
        advantages=advantages.contiguous(),
        reset=(reset != 0).contiguous(),
    )


def _normalized(plan: Plan, x: Tensor) -> Tensor:
    norm = plan.stages.obs_norm
    observations: Tensor = x if norm is None else norm(x)
    return observations.contiguous()


def _labels(plan: Plan, name: str, x: Any, rows: torch.Size) -> Tensor:
    _check(**{name: (x, rows, None)})
    try:
        return whole_numbers(name, x, plan.outputs)
    except (TypeError, ValueError) as error:
        raise _Unfit(str(error)) from error


def _check(**tensors: Expected) -> None:
    if error := misfit(**tensors):
        raise _Unfit(str(error))


def _by_name(plan: Plan, parameters: Mapping[str, Tensor], vectors: Tensor) -> dict[str, Tensor]:
    """The weights ``[G, ...]`` that vectors ``[G, P]`` consist of, those that are adapted."""
    parts = torch.split(vectors, [w.numel() for w in plan.parameters], dim=1)
    return {
        name: part.reshape(len(vectors), *w.shape)
        for name, part, w in zip(plan.names, parts, plan.parameters, strict=True)
        if name in parameters
    }
