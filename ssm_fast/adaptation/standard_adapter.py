"""Adaptation by gradient steps on what a task gives, held near the policy that it started from."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ssm_fast.adaptation.policy_objective import ActionDistribution, distribution_of
from ssm_fast.checks import check_count, check_number
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.core.ssm import StateSpaceModel
from ssm_fast.losses import default_loss
from ssm_fast.meta_rl.flat_adam import FlatAdam
from ssm_fast.meta_rl.flat_parameters import FlatParameters
from ssm_fast.nn.parameters import matrix_growth
from ssm_fast.nn.ssm_layer import SSMLayer

LossFn: TypeAlias = Callable[[nn.Module, Any, Any, "Tensor | None"], Tensor]
"""Of the model, ``x``, ``y`` and the state before ``x``: a scalar."""

Snapshot: TypeAlias = tuple[Tensor, dict[str, Any], "Tensor | None"]
"""The weights ``[P]``, the optimizer's state, and the average ``[P]``."""

_HALVINGS = 10  # of a step that leaves the trust region; then it is not taken
_HORIZON = 1024  # steps over which a state must not grow
_LARGEST_GROWTH = 1e3  # over the horizon: float32 then lasts for 13 of them


@dataclass(frozen=True)
class StandardAdaptationConfig:
    """How `StandardAdapter` adapts.

    Attributes:
        learning_rate: Of Adam.
        num_steps: Gradient steps of a call.
        grad_clip_norm: Gradients are scaled down to this norm; None leaves them.
        trust_region_eps: Largest mean KL divergence of the policy before the call from the policy
            after it, over the steps of the call. The step that would pass it is halved until it
            does not, and ends the call. None leaves the policy free.
        ema_decay: Keep an average of the weights, ``average <- d average + (1 - d) weights`` after
            every step, from the weights of the start on; None keeps none.
        entropy_weight: Weight of the mean entropy of the policy, which is added to the objective.
        max_steps_per_call: Bound on the work of a call: gradient steps and the halvings of the
            trust region together. A step that cannot be halved any more is not taken. None sets no
            bound.

    Raises:
        ValueError: A number is out of its range.
        TypeError: A count is no integer.
    """

    learning_rate: float = 3e-4
    num_steps: int = 5
    grad_clip_norm: float | None = 1.0
    trust_region_eps: float | None = None
    ema_decay: float | None = None
    entropy_weight: float = 0.0
    max_steps_per_call: int | None = None

    def __post_init__(self) -> None:
        check_number("learning_rate", self.learning_rate, above=0.0)
        check_count("num_steps", self.num_steps)
        if self.grad_clip_norm is not None:
            check_number("grad_clip_norm", self.grad_clip_norm, above=0.0)
        if self.trust_region_eps is not None:
            check_number("trust_region_eps", self.trust_region_eps, above=0.0)
        if self.ema_decay is not None:
            check_number("ema_decay", self.ema_decay, at_least=0.0, at_most=1.0)
        check_number("entropy_weight", self.entropy_weight, at_least=0.0)
        if self.max_steps_per_call is not None:
            check_count("max_steps_per_call", self.max_steps_per_call)


class StandardAdapter:
    """Adapts a copy of a model by gradient steps on each batch that it is given.

    A call either ends with finite weights and a finite loss or leaves weights, optimizer and
    average as they were and raises. Transition matrices (``A``) take a tenth of every step, as
    `learning_rate_scales` has it, and less where a state would grow more than a thousandfold over 1024 steps,
    as it would overflow in an episode longer than those that were seen. Statistics of observations
    (`obs_norm`) do not move.

    Args:
        model: Where adaptation starts from, an `ImprovedSSM`, a `StateSpaceModel` or any module
            ``forward(x, hidden_state) -> output or (output, ...)``. It is copied and never changed.
        config: How to adapt.

    Attributes:
        model: The adapted copy.
        learning_rate: Of the next step; ``config.learning_rate`` until somebody sets it.

    Raises:
        TypeError: An argument is of another class.
        ValueError: The model has nothing to train, or a weight of it is not finite.
    """

    def __init__(self, model: nn.Module, config: StandardAdaptationConfig | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("model must have parameters that require gradients")
        for name, parameter in model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise ValueError(f"{name} of the model must be finite, got NaN or infinity")
        config = StandardAdaptationConfig() if config is None else config
        if not isinstance(config, StandardAdaptationConfig):
            raise TypeError(
                f"config must be a StandardAdaptationConfig, got {type(config).__name__}"
            )
        self.config = config
        self.model: Any = copy.deepcopy(model)
        self.learning_rate = self.config.learning_rate
        self._meta = {name: x.clone() for name, x in self.model.state_dict().items()}
        self._weights = FlatParameters(self.model)
        self._reset_optimizer()

    def update_step(
        self,
        x: Any,
        y: Any,
        hidden_state: Tensor | None = None,
        loss_fn: LossFn | None = None,
    ) -> tuple[float, int]:
        """Take the gradient steps of one batch.

        Args:
            x: What the model sees: ``[B, T, I]`` or ``[B, I]``, or the arguments of ``forward`` by
                name, such as ``{"x": x, "reset": reset}``.
            y: The target: a tensor, or anything that ``loss_fn`` takes.
            hidden_state: The state before ``x``; the model's own if None.
            loss_fn: ``(model, x, y, hidden_state) -> scalar``. By default the mean squared error of
                the model's (first) output, or the cross entropy where ``y`` holds integers;
                `PolicyObjective` for reinforcement learning.

        Returns:
            The loss before the first step, without the entropy, and the number of steps taken.

        Raises:
            ValueError: A shape does not fit, or the batch is empty.
            TypeError: A dtype does not fit.
            FloatingPointError: A loss, gradient or weight is not finite. Nothing has changed then.
        """
        check_batch(x, y)
        chosen = supervised_loss if loss_fn is None else loss_fn
        return self._descend(
            lambda _: chosen(self.model, x, y, hidden_state),
            lambda: self._distribution(x, y, hidden_state),
        )

    def averaged_weights(self) -> dict[str, Tensor]:
        """The average of the weights by name, for ``model.load_state_dict``.

        Raises:
            ValueError: ``ema_decay`` is None.
        """
        if self._average is None:
            raise ValueError("ema_decay must be set to average the weights")
        trained = [p for p in self.model.parameters() if p.requires_grad]
        parts = torch.split(self._average, [p.numel() for p in trained])
        averages = {id(p): part for p, part in zip(trained, parts, strict=True)}
        own: dict[str, Tensor] = {n: t.clone() for n, t in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):  # tied ones too
            if id(parameter) in averages:
                own[name] = averages[id(parameter)].view_as(own[name]).clone()
        return own

    def take_average(self) -> None:
        """Put the average in the place of the weights.

        Raises:
            ValueError: ``ema_decay`` is None.
        """
        self.model.load_state_dict(self.averaged_weights())

    def reset_to_meta(self) -> None:
        """Go back to the weights of the start, bitwise, with a new optimizer and average."""
        self.model.load_state_dict(self._meta)
        self.learning_rate = self.config.learning_rate
        self._reset_optimizer()

    def snapshot(self) -> Snapshot:
        """Copies of the weights, the optimizer's state and the average, for `restore`."""
        self._weights.read()
        average = None if self._average is None else self._average.clone()
        optimizer = copy.deepcopy(self._optimizer.state_dict())
        return self._weights.vector.detach().clone(), optimizer, average

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this adapter, which stays as it is and good for another time."""
        weights, optimizer, average = snapshot
        self._set(weights)
        self._optimizer.load_state_dict(copy.deepcopy(optimizer))
        self._average = None if average is None else average.clone()

    def _reset_optimizer(self) -> None:
        self._weights.read()
        self._optimizer = torch.optim.Adam(
            [self._weights.vector], lr=self.learning_rate, eps=1e-5, fused=True
        )
        decay = self.config.ema_decay
        self._average = None if decay is None else self._weights.vector.detach().clone()

    def _descend(
        self,
        loss_of: Callable[[int], Tensor],
        distribution: Callable[[], ActionDistribution],
        kl: Callable[[], Tensor] | None = None,
    ) -> tuple[float, int]:
        """Take the steps of one call, or none and raise.

        Args:
            loss_of: The loss at the weights of the model, of each step.
            distribution: Of the actions, at the weights of the model.
            kl: What the trust region bounds; by default the divergence from the policy before.

        Raises:
            RuntimeError: It is called inside ``torch.inference_mode()``.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "an adapter learns by gradients: use torch.no_grad() around it instead of inference_mode()"
            )
        before = self.snapshot()
        try:
            with torch.enable_grad():  # an agent may call it where it acts without gradients
                return self._take_steps(loss_of, distribution, kl)
        except BaseException:
            self.restore(before)
            raise

    def _take_steps(
        self,
        loss_of: Callable[[int], Tensor],
        distribution: Callable[[], ActionDistribution],
        kl: Callable[[], Tensor] | None,
    ) -> tuple[float, int]:
        config = self.config
        eps, budget = config.trust_region_eps, config.max_steps_per_call or math.inf
        if eps is not None and kl is None:
            with torch.no_grad():
                old = distribution().detach()

            def kl() -> Tensor:
                return old.kl(distribution()).mean()

        growth = max(_LARGEST_GROWTH, state_growth(self.model))
        first, steps = math.nan, 0
        while steps < config.num_steps and budget >= 1:
            loss = loss_of(steps)
            if not isinstance(loss, Tensor) or loss.shape != ():
                raise ValueError("the loss must be a scalar tensor")
            if steps == 0:
                first = float(loss.detach())
            objective = loss
            if config.entropy_weight:
                objective = loss - config.entropy_weight * distribution().entropy().mean()
            start = self._weights.vector.detach().clone()  # [P]
            self._step(objective, f"step {steps}", growth)
            budget -= 1
            halvings: int | None = 0
            if eps is not None and kl is not None:
                halvings = self._backtrack(start, kl, eps, budget, growth)
                if halvings is None:
                    break
            steps += 1
            self._move_average()
            if halvings:
                break
        if eps is None:
            self._check_result(loss_of, steps)
        return first, steps

    def _step(self, loss: Tensor, where: str, growth: float) -> None:
        """One step of Adam, that of the transition matrices as `growth` of a state allows."""
        clip = math.inf if self.config.grad_clip_norm is None else self.config.grad_clip_norm
        norm = float(self._weights.backward(loss, clip))
        if not (math.isfinite(norm) and math.isfinite(float(loss.detach()))):
            raise FloatingPointError(
                f"{where}: loss {float(loss.detach())}, gradient norm {norm}; the weights are "
                "those before the call"
            )
        start = self._weights.vector.detach().clone()  # [P]
        self._optimizer.param_groups[0]["lr"] = self.learning_rate
        FlatAdam(self._weights, self._optimizer).step()
        if not bool(torch.isfinite(self._weights.vector).all()):
            raise FloatingPointError(
                f"{where}: a weight is not finite; the weights are those before the call"
            )
        self._bound_growth(start, growth)

    @torch.no_grad()
    def _bound_growth(self, start: Tensor, growth: float) -> None:
        """Halve the step of the transition matrices from ``start`` until no state outgrows it."""
        slow = self._weights.lr_scales < 1.0  # [P]
        for halvings in range(1, _HALVINGS + 2):
            if state_growth(self.model) <= growth:
                return
            vector = self._weights.vector.detach()
            back = torch.lerp(vector, start, 0.5 if halvings <= _HALVINGS else 1.0)
            self._set(torch.where(slow, back, vector))

    def _check_result(self, loss_of: Callable[[int], Tensor], steps: int) -> None:
        """Raises FloatingPointError where the last step led to a loss that is not finite."""
        loss = float(loss_of(steps).detach())
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss after the last step is {loss}; the weights are those before the call"
            )

    @torch.no_grad()
    def _backtrack(
        self, start: Tensor, kl: Callable[[], Tensor], eps: float, budget: float, growth: float
    ) -> int | None:
        """Halve the step from ``start`` until the policy is in the trust region.

        Where a state grows beyond ``growth`` is none of it: the divergence is that on the steps
        that were seen.

        Returns:
            How often, or None where it was not to be had and the weights are those of ``start``.
        """
        change = self._weights.vector.detach() - start  # [P]
        for halvings in range(int(min(budget, _HALVINGS)) + 1):
            if halvings > 0:
                self._set(start + 0.5**halvings * change)
            if float(kl()) <= eps and state_growth(self.model) <= growth:
                return halvings
        self._set(start)
        return None

    def _distribution(self, x: Any, y: Any, hidden_state: Tensor | None) -> ActionDistribution:
        """Of an `ImprovedSSM` its own; of another model what its output and the target stand for.

        That is a categorical distribution where the target holds integers, and else a Gaussian of
        deviation 1, whose entropy does not depend on the model.
        """
        if isinstance(self.model, ImprovedSSM):
            return distribution_of(self.model, x, hidden_state)[0]
        output = first_output(self.model, x, hidden_state)
        if isinstance(y, Tensor) and not y.is_floating_point():
            return ActionDistribution(output, None)
        if self.config.entropy_weight:
            raise ValueError(
                "entropy_weight must be 0 where the model gives no distribution of actions"
            )
        return ActionDistribution(output, torch.zeros_like(output))

    def _move_average(self) -> None:
        if self._average is not None and self.config.ema_decay is not None:
            self._average.lerp_(self._weights.vector.detach(), 1.0 - self.config.ema_decay)

    @torch.no_grad()
    def _set(self, vector: Tensor) -> None:
        self._weights.vector.copy_(vector)
        self._weights.write()


@torch.no_grad()
def state_growth(model: nn.Module) -> float:
    """The largest factor by which a state of the model may grow over 1024 steps without input.

    It tells whether the model can play for longer than it was seen to. A state that is normalised
    in the recurrence does not grow.
    """
    growth = 0.0
    for module in model.modules():
        if isinstance(module, StateSpaceModel):
            growth = max(growth, matrix_growth(module.A, _HORIZON))
        elif isinstance(module, SSMLayer):
            growth = max(growth, module.cell.growth(module, _HORIZON))
    return growth


def supervised_loss(model: nn.Module, x: Any, y: Any, hidden_state: Tensor | None) -> Tensor:
    """Mean squared error of the model's first output, or cross entropy of integer targets.

    Raises:
        ValueError: The shapes of output and target do not fit, or an integer is out of range.
        TypeError: The target is no tensor of floats or integers, or of another floating dtype.
    """
    return default_loss("y", y)(first_output(model, x, hidden_state), y)


def first_output(model: nn.Module, x: Any, hidden_state: Tensor | None) -> Tensor:
    """What ``forward`` returns, or the first of what it returns."""
    arguments = dict(x) if isinstance(x, Mapping) else None
    positional = () if arguments is not None else (x,)
    named = arguments or {}
    if hidden_state is not None:
        named = {**named, "hidden_state": hidden_state}
    output = model(*positional, **named)
    first: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return first


def check_batch(x: Any, y: Any) -> None:
    """Raises ValueError where a batch is empty or holds numbers that are not finite."""
    for name, part in (("x", x), ("y", y)):
        named = isinstance(part, Mapping)
        for key, leaf in part.items() if named else [("", part)]:
            where = f"{name}[{key!r}]" if named else name
            if not isinstance(leaf, Tensor):
                continue  # a loss_fn may take anything
            if leaf.numel() == 0:
                raise ValueError(f"{where} is empty, its shape is {list(leaf.shape)}")
            if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
                index = (~torch.isfinite(leaf)).nonzero()[0].tolist()
                raise ValueError(f"{where} must be finite, got NaN or infinity at {index}")
