"""The gradient of MAML through its inner steps for a `StateSpaceModel`, written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ssm_fast.core.ssm import OutputNetwork, StateSpaceModel
from ssm_fast.nn.ssm_layer import is_untouched
from ssm_fast.ops.backend import (
    has_function_mode,
    is_interpreting,
    is_plain,
    is_watched,
    native_kernel,
    needs_autograd,
)

# In the order of the native call.
_NAMES = ("A", "B", "D", "C.0.weight", "C.0.bias", "C.2.weight", "C.2.bias")
_ARGUMENTS = ("x", "hidden_state", "reset")


class TaskGradients(NamedTuple):
    """What `task_gradients` finds for ``G`` tasks.

    Attributes:
        losses: Before each of the ``K`` inner steps, then of the query set, ``[K + 1, G]``.
        weights: Gradients of a task's query loss with respect to the weights it starts from, by their
            names ``[G, ...]``.
        rates: The same for the rates; empty where they are not wanted.
    """

    losses: Tensor
    weights: dict[str, Tensor]
    rates: dict[str, Tensor]


class _Set(NamedTuple):
    """Support or query set of one task; the tensors are held until the native call has ended."""

    x: Tensor  # [B, T, I]
    y: Tensor | None  # [B, T, O]
    labels: Tensor | None  # [B, T]
    state: Tensor | None  # [B, N]
    reset: Tensor | None  # [B, T]

    def arguments(self) -> tuple[int, ...]:
        """Addresses, 0 for what is left out, and sizes."""
        return *(0 if t is None else t.data_ptr() for t in self), *self.x.shape[:2]


@torch.no_grad()
def task_gradients(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    tasks: Sequence[Sequence[Any]],
    state: Tensor | None,
    rates: float | Mapping[str, Tensor],
    steps: int,
    first_order: bool,
) -> TaskGradients | None:
    """The gradients of all tasks in one native call, each by the chain rule of docs/meta_maml.md.

    Each of several tasks runs on one thread, a few sequences at a time from the first pass to the
    last, so that its activations stay in the caches. Autograd goes through all rows of all tasks
    pass by pass.

    Args:
        model: A `StateSpaceModel`.
        parameters: What is adapted, by name: all that the model has.
        tasks: ``(support_x, support_y, query_x, query_y)`` of each, as for `MetaMAML.meta_update`,
            for the default losses.
        state: Before every support and query set, ``[B, N]``.
        rates: Of the inner steps, one or one for each weight. Gradients are wanted for the latter.
        steps: Inner steps ``K``.
        first_order: Take the inner gradients for constants.

    Returns:
        None where it does not apply: for another model, or one that somebody has changed, on another
        device, under a transform or a mode, or where a shape or dtype does not fit.
    """
    weights = _weights(model, parameters)
    if weights is None:
        return None
    if isinstance(rates, Mapping) and not all(
        is_plain(rates[name].detach())
        and rates[name].shape == w.shape
        and rates[name].dtype == w.dtype
        for name, w in zip(_NAMES, weights, strict=True)
    ):
        return None
    model = cast("StateSpaceModel", model)
    dtype, device = weights[0].dtype, weights[0].device
    sets = [_set(model, task[part], task[part + 1], state) for part in (0, 2) for task in tasks]
    if any(s is None for s in sets):
        return None
    found = cast("list[_Set]", sets)
    G, P = len(tasks), sum(w.numel() for w in weights)
    vector = torch.cat([w.reshape(-1) for w in weights])  # [P]
    if isinstance(rates, Mapping):
        rate = torch.cat([rates[name].reshape(-1) for name in _NAMES])  # [P]
    else:
        rate = torch.full_like(vector, float(rates))
    gradients = torch.empty(G, P, dtype=dtype, device=device)
    of_rates = torch.empty_like(gradients) if isinstance(rates, Mapping) else None
    losses = torch.empty(steps + 1, G, dtype=torch.float64, device=device)
    sizes = (G, model.input_dim, model.state_dim, model.hidden_dim, model.output_dim, steps)
    native_kernel("task_gradients", dtype)(
        vector.data_ptr(),
        rate.data_ptr(),
        [s.arguments() for s in found[:G]],
        [s.arguments() for s in found[G:]],
        gradients.data_ptr(),
        0 if of_rates is None else of_rates.data_ptr(),
        losses.data_ptr(),
        sizes,
        first_order,
    )
    return TaskGradients(
        losses.to(dtype),
        _by_name(gradients, weights),
        {} if of_rates is None else _by_name(of_rates, weights),
    )


def _weights(model: nn.Module, parameters: Mapping[str, Tensor]) -> list[Tensor] | None:
    """The weights in the order of the native call, or None where the modules themselves have to run."""
    if (
        type(model) is not StateSpaceModel
        or type(model.C) is not OutputNetwork
        or [type(part) for part in model.C] != [nn.Linear, nn.Tanh, nn.Linear]
        or not all(is_untouched(module) for module in model.modules())
        or needs_autograd()
        or torch.is_autocast_enabled("cpu")
        or is_watched()
        or has_function_mode()
        or is_interpreting()
    ):
        return None
    I, N, H, O = model.input_dim, model.state_dim, model.hidden_dim, model.output_dim
    shapes = ((N, N), (N, I), (O, I), (H, N), (H,), (O, H), (O,))
    own, dtype = dict(model.named_parameters()), model.A.dtype
    if own.keys() != set(_NAMES) or parameters.keys() != set(_NAMES):
        return None
    if dtype not in (torch.float32, torch.float64):
        return None
    weights = [own[name] for name in _NAMES]
    for name, weight, shape in zip(_NAMES, weights, shapes, strict=True):
        if weight is not parameters[name] or type(weight) is not nn.Parameter:
            return None
        if weight.shape != shape or weight.dtype != dtype or not is_plain(weight):
            return None
    return [weight.detach() for weight in weights]


def _set(model: StateSpaceModel, x: Any, target: Any, state: Tensor | None) -> _Set | None:
    """A set as the native call takes it, or None where it does not fit."""
    named = dict(x) if isinstance(x, Mapping) else {"x": x}
    if not named.keys() <= set(_ARGUMENTS) or (state is not None and "hidden_state" in named):
        return None
    x, hidden, reset = (named.get(name) for name in _ARGUMENTS)
    hidden = state if hidden is None else hidden
    if not all(t is None or _is_plain_tensor(t) for t in (hidden, reset)):
        return None
    if not _is_plain_tensor(x) or not _is_plain_tensor(target):
        return None
    dtype, rows = model.A.dtype, x.shape[:-1]
    if x.ndim not in (2, 3) or x.dtype != dtype or x.shape[-1] != model.input_dim:
        return None
    if x.numel() == 0:
        return None
    if reset is not None:
        if reset.shape != rows or reset.is_complex():
            return None
        reset = (reset != 0).contiguous()
    if hidden is not None:
        if hidden.shape != (len(x), model.state_dim) or hidden.dtype != dtype:
            return None
        hidden = hidden.contiguous()
    x = x.reshape(len(x), -1, model.input_dim).contiguous()  # one step is a sequence of one
    if target.dtype == dtype:
        if target.shape != (*rows, model.output_dim):
            return None
        return _Set(x, target.contiguous(), None, hidden, reset)
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        return None
    if target.shape != rows or int(target.min()) < 0 or int(target.max()) >= model.output_dim:
        return None
    return _Set(x, None, target.long().contiguous(), hidden, reset)


def _is_plain_tensor(x: Any) -> bool:
    """Whether it is no subclass, which may see to what is done with it."""
    return type(x) in (Tensor, nn.Parameter) and is_plain(x)


def _by_name(vectors: Tensor, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """The weights ``[G, ...]`` that vectors ``[G, P]`` consist of."""
    parts = torch.split(vectors, [w.numel() for w in weights], dim=1)
    return {
        name: part.reshape(len(vectors), *w.shape)
        for name, part, w in zip(_NAMES, parts, weights, strict=True)
    }
