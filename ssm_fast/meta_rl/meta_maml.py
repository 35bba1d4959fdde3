"""Model-agnostic meta-learning, all tasks of a batch at once. Maths in docs/meta_maml.md."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import vmap

from ssm_fast._torch import add_all, tree_flatten, tree_leaves, tree_map
from ssm_fast.checks import check_count, check_number
from ssm_fast.core.functional_call import functional_call
from ssm_fast.losses import default_loss, is_default_loss
from ssm_fast.meta_rl.training_state import check_step, check_tensors, load_adam, must_fit
from ssm_fast.native.impl import Choice, Impl
from ssm_fast.native.plan import Reason
from ssm_fast.native.task_gradients import TaskGradients, task_gradients

Weights: TypeAlias = dict[str, Tensor]
Loss: TypeAlias = Callable[[Weights, Any], Tensor]  # of one task: its weights, its batch
LossFn: TypeAlias = Callable[[Any, Any], Tensor]  # of one task: the model's output, the target
TaskData: TypeAlias = Sequence[Any]  # support_x, support_y, query_x, query_y

_LOGGER = logging.getLogger(__name__)
_PARTS = ("support_x", "support_y", "query_x", "query_y")
_STATE_VERSION = 1
_CHUNK_ROWS = 8192  # of the tasks in a vmapped call on the CPU
_LARGEST_RATE = 10.0  # of the learnt ones, in rates at the start
_WRITTEN_OUT_TASKS = 64  # in a call without vmap, which keeps a gradient of each


@dataclass(frozen=True)
class MetaGradient:
    """What a batch of tasks says about the meta-parameters.

    Attributes:
        losses: Query loss of each task ``[G]``, at its adapted weights.
        weights: Gradient of their mean with respect to each meta-weight.
        rates: The same for the inner rates; empty unless they are learnt.
    """

    losses: Tensor
    weights: Weights
    rates: Weights


class MetaMAML:
    """MAML (Finn et al. 2017, arXiv 1703.03400) and Meta-SGD (Li et al. 2017, arXiv 1707.09835).

    With meta-weights ``θ``, task ``g`` adapts by ``K`` steps on its support set::

        φ_g^0 = θ,    φ_g^{k+1} = φ_g^k - α ∘ ∇ L_g^support(φ_g^k)

    and the outer step follows ``∇_θ mean_g L_g^query(φ_g^K)``, through the inner steps unless
    ``first_order``. The tasks run as one vmapped call: the layers of this package take the weights
    of all tasks as groups of one kernel call. A `StateSpaceModel` or an `ImprovedSSM` on the CPU, as it
    was made, and with the default losses (or torch's ``mse_loss``) runs without vmap and autograd, each
    of several tasks on a thread.

    The model may be stateless, ``forward(x) -> output``, or stateful, ``forward(x, hidden_state) ->
    (output, next_hidden, ...)``: of a tuple, a loss gets the first element. A task's ``x`` is a
    tensor, the first argument of ``forward``, or a mapping of its arguments by name, such as
    ``{"x": x, "reset": reset}``; ``y`` is a tensor or any nest of them that ``loss_fn`` takes. For
    losses of everything that a model returns, or of trajectories collected between the steps, use
    `inner_update` and `task_losses` with `task_weights`.

    Args:
        model: Its trainable parameters are the meta-weights, changed by `meta_update` alone.
        inner_lr: Rate of the inner steps; where they are learnt, at the start.
        outer_lr: Learning rate of Adam.
        first_order: Leave out the derivative of the inner gradients (FOMAML).
        inner_steps: Inner steps of `meta_update`, and of `adapt_task` by default.
        learn_inner_lr: Learn a rate for each weight together with the weights (Meta-SGD). Rates stay
            between 0 and ten times ``inner_lr``: beyond, more inner steps than were trained diverge.
        max_grad_norm: Scale the meta-gradient down to this norm; None leaves it. The gradient through
            several inner steps grows a thousandfold at times.
        chunk_size: Tasks in one call. None takes all on a GPU, and on the CPU as many as have 8,192
            rows together: what larger ones give leaves the caches; without vmap it takes 64. Smaller
            chunks take less memory and give the same numbers. 1 needs no vmap, which not every
            module has; the tasks of a model with an ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM`` always
            run without it, one by one.
        optimizer: Makes the outer optimizer from the list of meta-parameters, instead of Adam.
        impl: Where gradients come from: ``"native"`` code, ``"autograd"``, or native code where the
            model has a plan and the losses are the default ones (``"auto"``;
            `ssm_fast.native.plan_of`).

    Attributes:
        optimizer: The outer optimizer.
        gradients: The `Choice` that `impl` makes; its ``path`` is "native", or says why it is not.
        rates: ``inner_lr``, or the learnt rates by the names of the weights.

    Raises:
        ValueError: A number is out of its range, or the model has nothing to train.
        TypeError: The model is no ``nn.Module``, or a count is no integer.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float = 0.01,
        outer_lr: float = 0.001,
        first_order: bool = False,
        *,
        inner_steps: int = 1,
        learn_inner_lr: bool = False,
        max_grad_norm: float | None = 10.0,
        chunk_size: int | None = None,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        impl: Impl = "auto",
    ) -> None:
        self.gradients = Choice(impl, _LOGGER)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        check_number("inner_lr", inner_lr, at_least=0.0)
        check_number("outer_lr", outer_lr, at_least=0.0)
        check_count("inner_steps", inner_steps)
        if max_grad_norm is not None:
            check_number("max_grad_norm", max_grad_norm, above=0.0)
        if chunk_size is not None:
            check_count("chunk_size", chunk_size)
        self.model = model
        self.inner_lr = inner_lr
        self.first_order = first_order
        self.inner_steps = inner_steps
        self.max_grad_norm = max_grad_norm
        self.chunk_size = chunk_size
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ValueError("model must have parameters that require gradients")
        self._kinds = _kinds(self._parameters)
        if learn_inner_lr and inner_lr == 0.0:
            raise ValueError("inner_lr must be positive where learn_inner_lr is set, got 0")
        self._first_rate = float(inner_lr)
        self._rates = {
            name: nn.Parameter(torch.full_like(p, inner_lr))
            for name, p in self._parameters.items()
            if learn_inner_lr
        }
        parameters = [*self._parameters.values(), *self._rates.values()]
        self._makes_optimizer = optimizer is None
        if optimizer is None:
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
                parameters, lr=outer_lr, fused=True
            )
        elif not callable(optimizer):
            raise TypeError(
                "optimizer must make one from the list of meta-parameters, such as "
                f"functools.partial(torch.optim.SGD, lr=0.1), got {type(optimizer).__name__}"
            )
        else:
            self.optimizer = optimizer(parameters)
            self._check_optimizer(self._parameters, self._rates)

    @property
    def rates(self) -> float | Weights:
        """``inner_lr``, or the learnt rates by the names of the weights."""
        return dict(self._rates) if self._rates else self.inner_lr

    def task_weights(self, num_tasks: int) -> Weights:
        """The meta-weights for ``G`` tasks, ``[G, ...]`` views that gradients flow through."""
        check_count("num_tasks", num_tasks)
        weights, _ = self._meta_parameters()
        return {n: p.expand(num_tasks, *p.shape) for n, p in weights.items()}

    def adapt_task(
        self,
        support_x: Any,
        support_y: Any,
        initial_hidden_state: Any = None,
        loss_fn: LossFn | None = None,
        num_steps: int | None = None,
    ) -> Weights:
        """Adapt to one task; the model stays as it is.

        An outer loss of the adapted weights can be differentiated with respect to the model's
        parameters, the learnt rates and the support set; through the inner gradients unless
        ``first_order``. Under ``torch.no_grad()`` no graph is kept.

        Args:
            support_x: What the model sees, ``[B, T, I]`` or ``[B, I]``, or forward's arguments.
            support_y: The target.
            initial_hidden_state: State before ``support_x``; the model's own if None.
            loss_fn: ``(output, target) -> scalar``. By default the mean squared error, or the cross
                entropy where the target holds integers.
            num_steps: Inner steps; ``inner_steps`` if None, 0 gives the meta-weights.

        Returns:
            The adapted weights by name, for ``torch.func.functional_call(model, weights, ...)``.

        Raises:
            ValueError: A shape does not fit, or the support set is empty.
            TypeError: A dtype does not fit.
            FloatingPointError: A loss or weight is not finite.
        """
        steps = self.inner_steps if num_steps is None else num_steps
        check_count("num_steps", steps, at_least=0)
        weights = self.task_weights(1)
        parts = dict(zip(_PARTS, (support_x, support_y), strict=False))
        self._check_parts(parts, "")
        batch = tree_map(lambda x: x.unsqueeze(0), (support_x, support_y))
        loss = self._loss("support_y", batch[1], initial_hidden_state, loss_fn)
        for step in range(steps):
            weights, losses = inner_update(
                loss, weights, batch, self.rates, self.first_order, vmapped=self._is_vmapped
            )
            if not bool(torch.isfinite(losses).all()):
                raise FloatingPointError(
                    f"the support loss is {float(losses)} before inner step {step}"
                )
        for name, weight in weights.items():
            if not bool(torch.isfinite(weight).all()):
                raise FloatingPointError(f"{name} is not finite after {steps} inner steps")
        return {name: weight[0].clone() for name, weight in weights.items()}

    def meta_update(
        self,
        tasks: Sequence[TaskData],
        initial_hidden_state: Any = None,
        loss_fn: LossFn | None = None,
        inner_steps: int | None = None,
    ) -> float:
        """Take one step of the outer optimizer.

        Args:
            tasks: ``(support_x, support_y, query_x, query_y)`` of each; their shapes may differ.
            initial_hidden_state: State before every support and query set; the model's own if None.
            loss_fn: As in `adapt_task`.
            inner_steps: Of this update; those of the constructor if None.

        Returns:
            The mean query loss of the adapted weights, before the step.

        Raises:
            ValueError: There is no task, a shape does not fit, a set is empty, or the model has other
                parameters than it had.
            TypeError: A dtype does not fit.
            FloatingPointError: A loss or gradient is not finite. Weights and optimizer are as
                before.
        """
        gradient = self.meta_gradient(tasks, initial_hidden_state, loss_fn, inner_steps)
        self.outer_step(gradient)
        return float(gradient.losses.mean())

    def meta_gradient(
        self,
        tasks: Sequence[TaskData],
        initial_hidden_state: Any = None,
        loss_fn: LossFn | None = None,
        inner_steps: int | None = None,
    ) -> MetaGradient:
        """The gradient that `meta_update` follows; arguments and errors are the same."""
        steps = self.inner_steps if inner_steps is None else inner_steps
        check_count("inner_steps", steps)
        if not tasks:
            raise ValueError("tasks must hold at least one task, got none")
        for i, task in enumerate(tasks):
            self._check_task(i, task)
        weights, rates = self._meta_parameters()
        total = [torch.zeros_like(p) for p in (*weights.values(), *rates.values())]
        losses = total[0].new_empty(len(tasks))
        for group in _same_shapes(tasks):
            for chunk, of_chunk, gradients in self._gradients_of_chunks(
                group, tasks, initial_hidden_state, loss_fn, steps
            ):
                losses[chunk] = of_chunk
                add_all(total, gradients, alpha=1.0 / len(tasks))
        count = len(weights)
        return MetaGradient(
            losses,
            dict(zip(weights, total[:count], strict=True)),
            dict(zip(rates, total[count:], strict=True)),
        )

    def outer_step(self, gradient: MetaGradient) -> float:
        """Clip a gradient and let the optimizer follow it.

        Returns:
            The gradient's norm before clipping.

        Raises:
            ValueError: The model has other parameters than it had.
            FloatingPointError: The norm is not finite: weights and optimizer are as before. Or a
                weight after the step is not: weights and rates are as before.
        """
        weights, rates = self._meta_parameters()
        self._check_optimizer(weights, rates)
        missing = weights.keys() - gradient.weights.keys() | rates.keys() - gradient.rates.keys()
        if missing:
            raise ValueError(f"gradient must hold {sorted(missing)}, which are trained now")
        parameters = [*weights.values(), *rates.values()]
        gradients = [
            *(gradient.weights[name] for name in weights),
            *(gradient.rates[name] for name in rates),
        ]
        # In float64: a gradient through several steps may be finite and its square not.
        norm = float(nn.utils.get_total_norm([grad.double() for grad in gradients]))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the norm of the meta-gradient is {norm}")
        scale = 1.0
        if self.max_grad_norm is not None:
            scale = min(1.0, self.max_grad_norm / (norm + 1e-6))
        self.optimizer.zero_grad()  # a frozen weight keeps no gradient to follow
        for parameter, grad in zip(parameters, gradients, strict=True):
            parameter.grad = grad * scale
        before = [parameter.detach().clone() for parameter in parameters]
        self.optimizer.step()
        self.optimizer.zero_grad()
        check_step(parameters, before)
        with torch.no_grad():
            for rate in rates.values():
                rate.clamp_(0.0, _LARGEST_RATE * self._first_rate)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Model, rates and optimizer, for a checkpoint."""
        return {
            "version": _STATE_VERSION,
            "model": self.model.state_dict(),
            "rates": {name: rate.detach() for name, rate in self._rates.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`.

        Settings such as `inner_steps` are no part of a state: they are those of this object.

        Raises:
            ValueError: It does not fit; nothing has changed then.
        """
        with must_fit():
            if state["version"] != _STATE_VERSION:
                raise ValueError(f"version must be {_STATE_VERSION}, got {state['version']!r}")
            model = check_tensors("model", state["model"], self.model.state_dict())
            rates = check_tensors("rates", state["rates"], self._rates)
            if self._makes_optimizer:
                load_adam(self.optimizer, state["optimizer"])
            else:
                self.optimizer.load_state_dict(dict(state["optimizer"]))
        self.model.load_state_dict(model)
        with torch.no_grad():
            for name, rate in self._rates.items():
                rate.copy_(rates[name])

    def _native_gradients(
        self, tasks: list[TaskData], state: Any, loss_fn: LossFn | None, steps: int
    ) -> TaskGradients | Reason:
        if not all(is_default_loss(loss_fn, task[k]) for task in tasks for k in (1, 3)):
            return Reason("the loss is one of the caller's own")
        weights, rates = self._meta_parameters()
        return task_gradients(
            self.model, weights, tasks, state, rates or self.inner_lr, steps, self.first_order
        )

    def _gradients_of_chunks(
        self,
        group: list[int],
        tasks: Sequence[TaskData],
        state: Any,
        loss_fn: LossFn | None,
        steps: int,
    ) -> Iterator[tuple[list[int], Tensor, list[Tensor]]]:
        """Of tasks of the same shapes: some of them, their query losses and sums of gradients."""
        weights, rates = self._meta_parameters()
        for part in _parts(group, self.chunk_size or _WRITTEN_OUT_TASKS):
            own = [tasks[i] for i in part]
            found = self.gradients.of(partial(self._native_gradients, own, state, loss_fn, steps))
            if found is not None:
                _check_losses(torch.cat((found.inner_losses, found.outer_losses[None])), part)
                _check_gradients(found.weights, part)
                by_weight = [found.weights[name].sum(0) for name in weights]
                by_rate = [found.rates[name].sum(0) for name in rates]
                yield part, found.outer_losses, by_weight + by_rate
                continue
            most = self.chunk_size or _tasks_of_a_chunk(tasks[part[0]], len(part))
            for chunk in _parts(part, most):
                yield chunk, *self._chunk_gradient(chunk, tasks, state, loss_fn, steps)

    def _chunk_gradient(
        self,
        chunk: list[int],
        tasks: Sequence[TaskData],
        state: Any,
        loss_fn: LossFn | None,
        steps: int,
    ) -> tuple[Tensor, list[Tensor]]:
        """Query losses of some tasks ``[G]`` and the sums of their gradients, by autograd."""
        _keep_freed_memory()
        support_x, support_y, query_x, query_y = (
            tree_map(lambda *x: torch.stack(x), *(tasks[i][part] for i in chunk))
            for part in range(len(_PARTS))
        )
        of_tasks = f"of task {chunk[0]}"
        support = self._loss(f"support_y {of_tasks}", support_y, state, loss_fn)
        query = self._loss(f"query_y {of_tasks}", query_y, state, loss_fn)
        _, rates = self._meta_parameters()
        with torch.enable_grad():
            # Leaves of every task: their gradients tell which task has gone wrong.
            leaves = {
                n: w.detach().requires_grad_() for n, w in self.task_weights(len(chunk)).items()
            }
            weights, history = leaves, []
            for _ in range(steps):
                weights, losses = inner_update(
                    support,
                    weights,
                    (support_x, support_y),
                    rates or self.inner_lr,
                    self.first_order,
                    vmapped=self._is_vmapped,
                )
                history.append(losses)
            losses = task_losses(  # [G]
                query, weights, (query_x, query_y), vmapped=self._is_vmapped
            )
            history.append(losses.detach())
            _check_losses(torch.stack(history), chunk)
            if not self.first_order and not self._is_vmapped:
                _check_twice_differentiable(losses)
            with _second_order(not self.first_order):
                gradients = torch.autograd.grad(
                    losses.sum(),
                    [*leaves.values(), *rates.values()],
                    allow_unused=True,
                    materialize_grads=True,
                )
        per_task = gradients[: len(leaves)]
        _check_gradients(dict(zip(leaves, per_task, strict=True)), chunk)
        return losses.detach(), [*(g.sum(0) for g in per_task), *gradients[len(leaves) :]]

    def _loss(self, where: str, targets: Any, state: Any, loss_fn: LossFn | None) -> Loss:
        """The loss of one task's weights on its ``(x, y)``; ``targets`` are those of all tasks."""
        chosen = default_loss(where, targets) if loss_fn is None else loss_fn

        def loss(weights: Weights, batch: tuple[Any, Any]) -> Tensor:
            x, y = batch
            arguments, named = self._arguments(x, state)
            output = functional_call(self.model, weights, arguments, named)
            return chosen(output[0] if isinstance(output, (tuple, list)) else output, y)

        return loss

    def _arguments(self, x: Any, state: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the model's ``forward``, by place and by name."""
        parameters = list(inspect.signature(self.model.forward).parameters.values())
        second = parameters[1] if len(parameters) > 1 else None
        named = dict(x) if isinstance(x, Mapping) else {}
        positional = () if isinstance(x, Mapping) else (x,)
        if state is None and _is_required(second) and second.name not in named:  # type: ignore[union-attr]
            init_hidden = getattr(self.model, "init_hidden", None)
            if init_hidden is None:
                raise ValueError(
                    f"initial_hidden_state must be given: the model needs {second.name!r}"  # type: ignore[union-attr]
                )
            state = init_hidden(tree_leaves(x)[0].shape[0])
        if state is None:
            return positional, named
        if second is None:
            raise ValueError("initial_hidden_state must be None: the model takes no state")
        if second.name in named:
            raise ValueError(f"initial_hidden_state must be None where x holds {second.name!r}")
        if positional:
            return (*positional, state), named
        return (), named | {second.name: state}

    def _meta_parameters(self) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """The weights that are trained now and their learnt rates, by name.

        A weight that was frozen after construction is not among them. Rates and optimizer follow a
        model that was moved to another dtype or device.

        Raises:
            ValueError: The model has other parameters than it had, or trains none of them, or a
                module of it would update statistics that tasks share.
        """
        own = dict(self.model.named_parameters())
        for name, parameter in self._parameters.items():
            if own.get(name) is not parameter:
                raise ValueError(
                    f"{name} of the model must stay the parameter that the optimizer was made with: "
                    "load_state_dict() without assign=True keeps it; after another change make a "
                    "new MetaMAML"
                )
        trained = {name: p for name, p in own.items() if p.requires_grad}
        for name in trained:
            if name not in self._parameters:
                raise ValueError(
                    f"{name} of the model must not require gradients, as when MetaMAML was made: "
                    "make a new MetaMAML to train it too"
                )
        if not trained:
            raise ValueError("model must have parameters that require gradients, all are frozen")
        for name, module in self.model.named_modules():
            if module.training and getattr(module, "track_running_stats", False):
                raise ValueError(
                    f"{name or 'model'}, a {type(module).__name__}, must not update running "
                    "statistics, which all tasks share: make it with track_running_stats=False, or "
                    "call its eval()"
                )
        if self._kinds != _kinds(self._parameters):
            for name, rate in self._rates.items():
                rate.data = rate.data.to(self._parameters[name])
            self.optimizer.load_state_dict(self.optimizer.state_dict())  # casts its tensors
            self._kinds = _kinds(self._parameters)
        return trained, {name: rate for name, rate in self._rates.items() if name in trained}

    def _check_optimizer(self, weights: Mapping[str, Tensor], rates: Mapping[str, Tensor]) -> None:
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for what, parameters in (("", weights), ("the rate of ", rates)):
            for name, p in parameters.items():
                if id(p) not in held:
                    raise ValueError(f"optimizer must hold {what}{name}, which it would not move")

    @property
    def _is_vmapped(self) -> bool:
        """Whether the tasks of a chunk run as one call."""
        return self.chunk_size != 1 and not any(
            isinstance(module, nn.RNNBase) for module in self.model.modules()
        )

    def _check_task(self, i: int, task: TaskData) -> None:
        if not isinstance(task, (tuple, list)) or len(task) != len(_PARTS):
            raise ValueError(f"task {i} must be ({', '.join(_PARTS)})")
        self._check_parts(dict(zip(_PARTS, task, strict=True)), f" of task {i}")

    def _check_parts(self, parts: Mapping[str, Any], of_task: str) -> None:
        weight = next(iter(self._parameters.values()))
        for name, part in parts.items():
            leaves = tree_leaves(part)
            if not leaves:
                raise ValueError(f"{name}{of_task} is empty")
            for leaf in leaves:
                if not isinstance(leaf, Tensor):
                    raise TypeError(f"{name}{of_task} must hold tensors, got {type(leaf).__name__}")
                if leaf.numel() == 0:
                    raise ValueError(f"{name}{of_task} is empty, its shape is {list(leaf.shape)}")
                if leaf.device != weight.device:
                    raise ValueError(
                        f"{name}{of_task} must be on the model's device {weight.device}, "
                        f"got {leaf.device}"
                    )
            dtypes = [leaf.dtype for leaf in leaves if leaf.is_floating_point()]
            # A reset may have another one.
            if name.endswith("_x") and dtypes and weight.dtype not in dtypes:
                raise TypeError(
                    f"{name}{of_task} must have the model's dtype {weight.dtype}, got {dtypes[0]}"
                )


def inner_update(
    loss: Loss,
    weights: Weights,
    batch: Any,
    rates: float | Mapping[str, Tensor],
    first_order: bool = False,
    *,
    vmapped: bool = True,
) -> tuple[Weights, Tensor]:
    """Take one gradient step in every task: ``φ_g - α ∘ ∇ L_g(φ_g)``.

    Where ``weights`` or ``rates`` require gradients and gradients are enabled, the result can be
    differentiated with respect to them, through as many steps as follow each other. Each step may
    have a batch of its own, such as trajectories collected with the weights of the step before.

    Args:
        loss: ``(weights, batch) -> scalar`` of one task.
        weights: ``[G, ...]`` by name, from `MetaMAML.task_weights` or the step before.
        batch: Any nest of tensors ``[G, ...]``.
        rates: One rate, or a tensor for each name that broadcasts against its weight.
        first_order: Take the gradient for a constant.
        vmapped: As in `task_losses`.

    Returns:
        The adapted weights ``[G, ...]``, and the losses before the step ``[G]``, detached.

    Raises:
        ValueError: The loss is no scalar, does not depend on the weights, or a rate is missing.
        RuntimeError: The loss cannot be vmapped, or gradients are off by ``inference_mode``.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "an inner step needs gradients: use torch.no_grad() around it instead of inference_mode()"
        )
    if isinstance(rates, Mapping) and not weights.keys() <= rates.keys():
        raise ValueError(f"rates must hold {sorted(weights.keys() - rates.keys())}")
    keeps_graph = torch.is_grad_enabled() and not first_order
    with torch.enable_grad():
        # A view made without gradients still requires one, and would get that of its base.
        points = {
            n: w if keeps_graph and w.requires_grad else w.detach().requires_grad_()
            for n, w in weights.items()
        }
        losses = task_losses(loss, points, batch, vmapped=vmapped)  # [G]
        if not losses.requires_grad:
            raise ValueError("the loss must depend on the weights")
        # A task's loss depends on its own weights alone, so the gradient of the sum is theirs.
        gradients = torch.autograd.grad(
            losses.sum(),
            list(points.values()),
            create_graph=keeps_graph and _is_differentiable(weights, rates),
            allow_unused=True,
            materialize_grads=True,
        )
    adapted = {
        name: weight - (rates[name] if isinstance(rates, Mapping) else rates) * gradient
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }
    return adapted, losses.detach()


def task_losses(loss: Loss, weights: Weights, batch: Any, *, vmapped: bool = True) -> Tensor:
    """The loss of every task at its weights, ``[G]``, in one vmapped call.

    Args:
        loss: ``(weights, batch) -> scalar`` of one task.
        weights: ``[G, ...]`` by name.
        batch: Any nest of tensors ``[G, ...]``.
        vmapped: Otherwise the tasks run one by one, for a loss that torch cannot vmap, such as one
            through an ``nn.GRU``.

    Raises:
        ValueError: The loss is no scalar.
        RuntimeError: The loss cannot be vmapped.
    """

    def scalar(weights: Weights, batch: Any) -> Tensor:
        value = loss(weights, batch)
        if not isinstance(value, Tensor) or value.shape != ():
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the loss must be a scalar tensor, got {got}")
        return value

    if not vmapped:
        tasks = len(next(iter(weights.values())))
        each = [tree_map(lambda x, g=g: x[g], (weights, batch)) for g in range(tasks)]
        return torch.stack([scalar(*arguments) for arguments in each])
    try:
        losses: Tensor = vmap(scalar, randomness="different")(weights, batch)
    except RuntimeError as error:
        if any(word in str(error) for word in ("vmap", "functorch", "atching rule")):
            raise RuntimeError(
                f"the loss must be one that torch.func.vmap can map over the tasks: {error} "
                "vmapped=False, or chunk_size=1 of MetaMAML, takes the tasks one by one without it."
            ) from error
        raise
    return losses


_ONE_DERIVATIVE = (
    "the model must have second derivatives unless first_order=True, which leaves them out: "
)


@contextmanager
def _second_order(wanted: bool) -> Iterator[None]:
    """Says what to do where a module of a model has first derivatives only."""
    try:
        yield
    except RuntimeError as error:
        if wanted and "not implemented" in str(error):
            raise RuntimeError(f"{_ONE_DERIVATIVE}{error}") from error
        raise


def _check_twice_differentiable(losses: Tensor) -> None:
    """Raise for a gradient of a once-differentiable function.

    Torch puts a node there that raises, but ``torch.autograd.grad`` goes around it: no weight is
    behind the node.
    """
    seen, nodes = set(), [losses.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise RuntimeError(f"{_ONE_DERIVATIVE}a function is marked with @once_differentiable")
        nodes.extend(following for following, _ in node.next_functions)


def _kinds(parameters: Mapping[str, Tensor]) -> list[tuple[torch.dtype, torch.device]]:
    return [(p.dtype, p.device) for p in parameters.values()]


@cache
def _keep_freed_memory() -> None:
    """Lets glibc keep up to 64 MiB of freed memory, which it would map and clear anew in every call.

    It takes the size of the largest block that was freed for what a program needs again and again,
    up to 32 MiB; this one is never touched, so it costs nothing.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)


def _is_differentiable(weights: Weights, rates: float | Mapping[str, Tensor]) -> bool:
    tensors = [*weights.values(), *(rates.values() if isinstance(rates, Mapping) else ())]
    return any(x.requires_grad for x in tensors)


def _tasks_of_a_chunk(task: TaskData, count: int) -> int:
    """How many of `count` tasks like this one run together."""
    leaves: list[Tensor] = tree_leaves((task[0], task[2]))
    if leaves[0].device.type != "cpu":
        return count
    rows = max(x.numel() // x.shape[-1] if x.ndim > 1 else x.numel() for x in leaves)
    return max(1, _CHUNK_ROWS // rows)


def _same_shapes(tasks: Sequence[TaskData]) -> list[list[int]]:
    """Indices of tasks, those of the same shapes together."""
    groups: dict[Any, list[int]] = {}
    for i, task in enumerate(tasks):
        leaves, structure = tree_flatten(tuple(task))
        key = str(structure), tuple((x.shape, x.dtype) for x in leaves)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _parts(items: list[int], most: int) -> list[list[int]]:
    return [items[first : first + most] for first in range(0, len(items), most)]


def _check_losses(history: Tensor, chunk: list[int]) -> None:
    """Raise for the first loss ``[K + 1, G]`` that is not finite."""
    bad = (~torch.isfinite(history)).nonzero()
    if len(bad) == 0:
        return
    step, row = (int(i) for i in bad[0])
    last = step == len(history) - 1
    what = "query loss" if last else f"support loss before inner step {step}"
    raise FloatingPointError(f"task {chunk[row]}: the {what} is {float(history[step, row])}")


def _check_gradients(gradients: Weights, chunk: list[int]) -> None:
    for name, gradient in gradients.items():
        bad = (~torch.isfinite(gradient)).flatten(1).any(1).nonzero()
        if len(bad) > 0:
            raise FloatingPointError(
                f"task {chunk[int(bad[0])]}: the meta-gradient of {name} is not finite"
            )


def _is_required(parameter: inspect.Parameter | None) -> bool:
    return (
        parameter is not None
        and parameter.default is inspect.Parameter.empty
        and parameter.kind
        in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    )
