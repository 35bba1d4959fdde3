"""The gradients of MAML through its inner steps, written out for the models of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssm_fast.core.improved_ssm import NORM_EPS, ImprovedSSM
from ssm_fast.core.sequence_gradient import has_plain_parameters
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

# In the order of the native calls.
_OF_STATE_SPACE_MODEL = ("A", "B", "D", "C.0.weight", "C.0.bias", "C.2.weight", "C.2.bias")
_OF_POLICY = ("encoder.weight", "encoder.bias", "actor.weight", "actor.bias")
_OF_LAYER = ("A", "B", "bias", "C", "D")
_OF_NORM = ("norm.weight", "norm.bias")
_ARGUMENTS = ("x", "hidden_state", "reset")


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


class _Network(NamedTuple):
    """A model as its native function takes it.

    Attributes:
        names: Of the weights, in the order of their vector.
        weights: The same, detached.
        unused: Names of other parameters of the model, whose gradients are zero.
        inputs: Number of features ``I``.
        outputs: Number of outputs ``O``.
        state: Shape of a state without its rows: of ``[*state[:-1], B, state[-1]]``.
        prepare: What the observations go through first.
        native: The function, less its sizes.
    """

    names: tuple[str, ...]
    weights: list[Tensor]
    unused: dict[str, Tensor]
    inputs: int
    outputs: int
    state: tuple[int, ...]
    prepare: Callable[[Tensor], Tensor]
    native: Callable[..., None]


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
    """The gradients of the query losses in one native call, by the chain rule of docs/meta_maml.md.

    Each of several tasks runs on one thread, a few sequences at a time from the first pass to the
    last, so that its activations stay in the caches. Autograd goes through all rows of all tasks
    pass by pass.

    Args:
        model: A `StateSpaceModel` or an `ImprovedSSM`.
        parameters: What is adapted, by name: all that the model has.
        tasks: ``(support_x, support_y, query_x, query_y)`` of each, as for `MetaMAML.meta_update`,
            for the default losses.
        state: Before every support and query set, in the model's shape.
        rates: Of the inner steps, one or one for each weight. Gradients are wanted for the latter.
        steps: Inner steps ``K``.
        first_order: Take the inner gradients for constants.

    Returns:
        None where it does not apply: for another model, or one that somebody has changed, on another
        device, under a transform or a mode, or where a shape or dtype does not fit.
    """
    network = _network(model, parameters)
    if network is None or parameters.keys() != {*network.names, *network.unused}:
        return None
    sets = [_set(network, task[part], task[part + 1], state) for part in (0, 2) for task in tasks]
    found = [s for s in sets if s is not None]
    G = len(tasks)
    if len(found) < 2 * G:
        return None
    inner = [s.arguments() for s in found[:G]] * steps
    outer = [_NOTHING] * (steps * G) + [s.arguments() for s in found[G:]]
    return _gradients(network, inner, outer, G, rates, first_order, isinstance(rates, Mapping))


@torch.no_grad()
def policy_task_gradients(
    model: ImprovedSSM,
    parameters: Mapping[str, Tensor],
    rounds: Sequence[Mapping[str, Tensor]],
    rates: Mapping[str, Tensor],
    first_order: bool,
    clip_epsilon: float,
    largest_log_ratio: float,
    learn_rates: bool,
) -> TaskGradients | None:
    """The gradients of ProMP in one native call: see `MetaRLTrainer`.

    Args:
        model: The policy.
        parameters: What is adapted, by name: all but the critic's.
        rounds: Of before each step and after the last, ``[G, R, T, ...]``: ``observations``,
            ``actions``, ``log_probs`` when they were taken, ``reset``, ``advantages``.
        rates: Of the inner steps, one for each weight.
        first_order: Take the inner gradients for constants.
        clip_epsilon: Of the surrogates that are summed up in the outer loss; those of the steps are
            not clipped.
        largest_log_ratio: Where the logarithm of any ratio is cut.
        learn_rates: Whether gradients by the rates are wanted.

    Returns:
        With the sums of the surrogates for the outer losses. None as for `task_gradients`.
    """
    network = _network(model, parameters)
    if network is None or parameters.keys() != set(network.names):
        return None
    G = len(rounds[0]["rewards"])
    found = [_round(network, model.discrete, batch, g) for batch in rounds for g in range(G)]
    examples = [e for e in found if e is not None]
    if G == 0 or len(examples) < len(found):
        return None
    inner = [e.arguments(0.0, largest_log_ratio) for e in examples[:-G]]
    outer = [e.arguments(clip_epsilon, largest_log_ratio) for e in examples]
    return _gradients(network, inner, outer, G, rates, first_order, learn_rates)


def _gradients(
    network: _Network,
    inner: list[Any],
    outer: list[Any],
    G: int,
    rates: float | Mapping[str, Tensor],
    first_order: bool,
    learn_rates: bool,
) -> TaskGradients | None:
    weights, dtype = network.weights, network.weights[0].dtype
    if isinstance(rates, Mapping):
        of_weights = [rates[name].detach() for name in network.names]
        if not all(
            is_plain(rate) and rate.shape == w.shape and rate.dtype == w.dtype
            for rate, w in zip(of_weights, weights, strict=True)
        ):
            return None
        rate = torch.cat([r.reshape(-1) for r in of_weights])  # [P]
    vector = torch.cat([w.reshape(-1) for w in weights])  # [P]
    if not isinstance(rates, Mapping):
        rate = torch.full_like(vector, float(rates))
    steps = len(inner) // G
    gradients = vector.new_empty(G, len(vector))
    of_rates = torch.empty_like(gradients) if learn_rates else None
    inner_losses = torch.empty(steps, G, dtype=torch.float64, device="cpu")
    outer_losses = torch.empty(steps + 1, G, dtype=torch.float64, device="cpu")
    network.native(
        vector.data_ptr(),
        rate.data_ptr(),
        inner,
        outer,
        gradients.data_ptr(),
        0 if of_rates is None else of_rates.data_ptr(),
        inner_losses.data_ptr(),
        outer_losses.data_ptr(),
        G,
        first_order,
    )
    return TaskGradients(
        inner_losses.to(dtype),
        outer_losses.sum(0).to(dtype),
        _by_name(network, gradients),
        {} if of_rates is None else _by_name(network, of_rates),
    )


def _network(model: nn.Module, parameters: Mapping[str, Tensor]) -> _Network | None:
    """The model's weights and function, or None where the modules themselves have to run."""
    if (
        type(model) not in (StateSpaceModel, ImprovedSSM)
        or not all(is_untouched(module) for module in model.modules())
        or needs_autograd()
        or torch.is_autocast_enabled("cpu")
        or is_watched()
        or has_function_mode()
        or is_interpreting()
    ):
        return None
    own = dict(model.named_parameters())
    network = _state_space_network(model, own) or _policy_network(model, own)
    if network is None:
        return None
    for name in network.names:
        if own[name] is not parameters.get(name) or type(own[name]) is not nn.Parameter:
            return None
    return network


def _state_space_network(model: nn.Module, own: Mapping[str, Tensor]) -> _Network | None:
    if type(model) is not StateSpaceModel:
        return None
    if type(model.C) is not OutputNetwork or [type(part) for part in model.C] != [
        nn.Linear,
        nn.Tanh,
        nn.Linear,
    ]:
        return None
    I, N, H, O = model.input_dim, model.state_dim, model.hidden_dim, model.output_dim
    shapes = ((N, N), (N, I), (O, I), (H, N), (H,), (O, H), (O,))
    dtype = model.A.dtype
    if own.keys() != set(_OF_STATE_SPACE_MODEL) or dtype not in (torch.float32, torch.float64):
        return None
    weights = [own[name].detach() for name in _OF_STATE_SPACE_MODEL]
    for weight, shape in zip(weights, shapes, strict=True):
        if weight.shape != shape or weight.dtype != dtype or not is_plain(weight):
            return None
    native = partial(native_kernel("state_space_gradients", dtype), (I, N, H, O))
    return _Network(_OF_STATE_SPACE_MODEL, weights, {}, I, O, (N,), lambda x: x, native)


def _policy_network(model: nn.Module, own: Mapping[str, Tensor]) -> _Network | None:
    if type(model) is not ImprovedSSM or (model.use_layer_norm and model.norm == "state"):
        return None
    with torch.no_grad():
        probe = next(iter(own.values())).new_zeros(1, model.input_dim)
        if not model.can_step_natively(probe) or not has_plain_parameters(model):
            return None
    of_layer = _OF_LAYER + (_OF_NORM if model.use_layer_norm else ())
    names: tuple[str, ...] = _OF_POLICY
    names += tuple(f"layers.{i}.{name}" for i in range(model.num_layers) for name in of_layer)
    names += () if model.log_std is None else ("log_std",)
    unused = {n: p.detach() for n, p in own.items() if n.startswith("critic")}
    if own.keys() != {*names, *unused}:
        return None
    native = partial(
        native_kernel("policy_gradients", probe.dtype),
        (model.input_dim, model.hidden_dim, model.state_dim, model.num_layers, model.action_dim),
        (model.use_layer_norm, model.use_residual, model.log_std is not None),
        NORM_EPS,
    )
    return _Network(
        names,
        [own[name].detach() for name in names],
        unused,
        model.input_dim,
        model.action_dim,
        (model.num_layers, model.state_dim),
        model.normalize,
        native,
    )


def _set(network: _Network, x: Any, target: Any, state: Tensor | None) -> _Examples | None:
    """A supervised set as the native call takes it, or None where it does not fit."""
    named = dict(x) if isinstance(x, Mapping) else {"x": x}
    if not named.keys() <= set(_ARGUMENTS) or (state is not None and "hidden_state" in named):
        return None
    x, hidden, reset = (named.get(name) for name in _ARGUMENTS)
    hidden = state if hidden is None else hidden
    if not all(t is None or _is_plain_tensor(t) for t in (hidden, reset)):
        return None
    if not _is_plain_tensor(x) or not _is_plain_tensor(target):
        return None
    dtype, rows = network.weights[0].dtype, x.shape[:-1]
    if x.ndim not in (2, 3) or x.dtype != dtype or x.shape[-1] != network.inputs:
        return None
    if x.numel() == 0:
        return None
    if reset is not None:
        if reset.shape != rows or reset.is_complex():
            return None
        reset = (reset != 0).contiguous()
    if hidden is not None:
        *layers, N = network.state
        if hidden.shape != (*layers, len(x), N) or hidden.dtype != dtype:
            return None
        hidden = hidden.contiguous()
    x = x.reshape(len(x), -1, network.inputs)  # one step is a sequence of one
    x = network.prepare(x).contiguous()
    if target.dtype == dtype:
        if target.shape != (*rows, network.outputs):
            return None
        return _Examples(x, y=target.contiguous(), state=hidden, reset=reset)
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        return None
    if target.shape != rows or int(target.min()) < 0 or int(target.max()) >= network.outputs:
        return None
    return _Examples(x, labels=target.long().contiguous(), state=hidden, reset=reset)


def _round(
    network: _Network, discrete: bool, batch: Mapping[str, Tensor], task: int
) -> _Examples | None:
    """What a task played in a round of a `MetaRLTrainer`, or None where it does not fit."""
    x, actions, log_probs, reset, advantages = (
        batch[name][task]
        for name in ("observations", "actions", "log_probs", "reset", "advantages")
    )
    rows, dtype = log_probs.shape, network.weights[0].dtype  # [R, T]
    of_rows = (log_probs, reset, advantages)
    if len(rows) != 2 or x.numel() == 0 or any(t.shape != rows for t in of_rows):
        return None
    expected = rows if discrete else (*rows, network.outputs)
    if x.shape != (*rows, network.inputs) or actions.shape != expected:
        return None
    floats = (x, log_probs, advantages) if discrete else (x, log_probs, advantages, actions)
    if any(t.dtype != dtype for t in floats) or reset.is_complex():
        return None
    if not all(_is_plain_tensor(t) for t in (x, actions, *of_rows)):
        return None
    labels = None
    if discrete:
        if actions.is_floating_point() or actions.is_complex() or actions.dtype == torch.bool:
            return None
        if int(actions.min()) < 0 or int(actions.max()) >= network.outputs:
            return None
        labels = actions.long().contiguous()
    return _Examples(
        network.prepare(x).contiguous(),
        labels=labels,
        actions=None if discrete else actions.contiguous(),
        log_probs=log_probs.contiguous(),
        advantages=advantages.contiguous(),
        reset=(reset != 0).contiguous(),
    )


def _is_plain_tensor(x: Any) -> bool:
    """Whether it is no subclass, which may see to what is done with it."""
    return type(x) in (Tensor, nn.Parameter) and is_plain(x)


def _by_name(network: _Network, vectors: Tensor) -> dict[str, Tensor]:
    """The weights ``[G, ...]`` that vectors ``[G, P]`` consist of."""
    G, weights = len(vectors), network.weights
    parts = torch.split(vectors, [w.numel() for w in weights], dim=1)
    found = {
        name: part.reshape(G, *w.shape)
        for name, part, w in zip(network.names, parts, weights, strict=True)
    }
    return found | {name: w.new_zeros(G, *w.shape) for name, w in network.unused.items()}
