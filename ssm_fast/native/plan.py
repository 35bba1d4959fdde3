"""What of a model runs in native calls: a plan, or the reason why there is none."""

from __future__ import annotations

import inspect
from itertools import chain
from operator import attrgetter, is_
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ssm_fast._torch import has_global_hooks, has_gradient_hooks, is_plain, is_watched, registries
from ssm_fast.nn.fused import is_untouched
from ssm_fast.nn.stages import NetworkStages, Stage, Unplanned
from ssm_fast.ops.dispatch import is_interpreting, native_kernel, needs_autograd

_DTYPES = (torch.float32, torch.float64)
_ABSENT = -1


class Reason:
    """Why a model, or a call of it, has no native path. ``str()`` is a sentence."""

    def __init__(self, sentence: str) -> None:
        self._sentence = sentence

    def __str__(self) -> str:
        return self._sentence

    def __repr__(self) -> str:
        return f"Reason({self._sentence!r})"

    def __bool__(self) -> Literal[False]:
        return False


class Plan:
    """A model as native code runs it.

    Attributes:
        names: Of the model's parameters, in the order of ``named_parameters()``.
        parameters: The parameters; native code reads their values where they lie.
        stages: The network.
        dtype: Of all parameters.
        inputs: Features of the observations ``I``.
        outputs: Of the first branch ``K``.
        states: Size of each state ``N``, stage by stage.
        log_std: The number of ``log_std`` among the parameters, -1 without one.
    """

    def __init__(self, model: nn.Module, stages: NetworkStages) -> None:
        named = dict(model.named_parameters())
        self.names, self.parameters = list(named), list(named.values())
        self.stages = stages
        numbers = {id(p): i for i, p in enumerate(self.parameters)}
        self.dtype = self._checked_dtype(numbers)
        _check_sizes(stages)
        self.inputs = stages.trunk[0].inputs
        self.outputs = stages.branches[0][0][-1].outputs
        self.states = [stage.state for stage in stages.trunk if stage.state]
        self.log_std = _ABSENT if stages.log_std is None else numbers[id(stages.log_std)]
        self._numbers = numbers
        self._networks: dict[int, Any] = {}
        self._layouts = self._layouts_now()
        # Not the model itself: `_plans` lets go of a plan when nothing else holds its model.
        modules = list(model.modules())
        self._kind, self._modules = type(model), modules[1:]
        self._kinds = [type(module) for module in self._modules]
        parts = [part for module in modules for part in registries(module)]
        self._dicts = [*map(vars, modules), *(part for part in parts if part)]
        self._empty = [part for part in parts if not part]
        self._values = [value for part in self._dicts for value in part.values()]

    def __bool__(self) -> Literal[True]:
        return True

    def network(self, branches: int) -> Any:
        """The compiled network with so many of its branches."""
        if branches not in self._networks:
            self._networks[branches] = native_kernel("Network", self.dtype)(
                [self._description(stage) for stage in self.stages.trunk],
                [
                    ([self._description(stage) for stage in stages], detached)
                    for stages, detached in self.stages.branches[:branches]
                ],
                [p.numel() for p in self.parameters],
                self.log_std,
            )
        return self._networks[branches]

    def addresses(self) -> list[int]:
        """Where the parameters lie now."""
        return [p.data_ptr() for p in self.parameters]

    def overridden(self, *methods: str) -> str | None:
        """Why native code cannot stand in for methods of the model, if it overrides one."""
        for method in methods:
            if method in self.stages.overrides:
                return f"the model overrides {method}()"
        return None

    def is_current(self, model: nn.Module) -> bool:
        """Whether the model, of which the plan was made, is still as it was.

        Every attribute, parameter, buffer and module must be the same object. The loops run in C:
        they are part of every step.
        """
        return (
            type(model) is self._kind
            and not has_global_hooks()
            and not any(self._empty)
            and all(map(is_, map(type, self._modules), self._kinds))
            and sum(map(len, self._dicts)) == len(self._values)
            and all(map(is_, chain.from_iterable(map(dict.values, self._dicts)), self._values))
            and self._layouts_now() == self._layouts
        )

    def _layouts_now(self) -> list[Any]:
        """What an assignment to ``data`` changes."""
        norm = self.stages.obs_norm
        tensors = self.parameters if norm is None else [*self.parameters, norm.mean, norm.var]
        return [*map(Tensor.size, tensors), *map(Tensor.stride, tensors), *map(_kind, tensors)]

    def used(self, branches: int) -> set[str]:
        """Names of the parameters that the trunk and so many branches read, and ``log_std``."""
        chains = [self.stages.trunk, *(stages for stages, _ in self.stages.branches[:branches])]
        tensors = [p for chain in chains for stage in chain for p in stage.tensors()]
        return {self._name(p) for p in (*tensors, self.stages.log_std) if p is not None}

    def not_differentiable(self, branches: int) -> str | None:
        """Why native gradients of what so many branches read are not those of autograd, if so."""
        tensors = [p for stage in self.stages.stages() for p in stage.tensors() if p is not None]
        if len({id(p) for p in tensors}) < len(tensors):
            shared = next(p for i, p in enumerate(tensors) if any(p is q for q in tensors[:i]))
            return f"{self._name(shared)} is used twice"
        used = self.used(branches)
        for name, p in zip(self.names, self.parameters, strict=True):
            if name in used and not p.requires_grad:
                return f"{name} is not trained"
            if has_gradient_hooks(p):
                return f"{name} has a backward hook"
        return None

    def _name(self, p: Tensor) -> str:
        return self.names[self._numbers[id(p)]]

    def _checked_dtype(self, numbers: dict[int, int]) -> torch.dtype:
        tensors = [p for stage in self.stages.stages() for p in stage.tensors() if p is not None]
        tensors += [] if self.stages.log_std is None else [self.stages.log_std]
        dtype = tensors[0].dtype
        for p in tensors:
            if id(p) not in numbers:
                raise Unplanned(f"a weight {list(p.shape)} is no parameter of the model")
            name = self.names[numbers[id(p)]]
            if p.device.type != "cpu":
                raise Unplanned(f"{name} is on {p.device}")
            if p.dtype not in _DTYPES or p.dtype != dtype:
                raise Unplanned(f"{name} is {p.dtype}")
            if not is_plain(p) or not p.is_contiguous():
                raise Unplanned(f"{name} does not lie in memory as a contiguous tensor")
        return dtype

    def _description(self, stage: Stage) -> dict[str, Any]:
        return {
            "kind": stage.kind,
            "inputs": stage.inputs,
            "outputs": stage.outputs,
            "state": stage.state,
            "observations": stage.observations,
            "parameters": [
                _ABSENT if p is None else self._numbers[id(p)] for p, _ in stage.parameters
            ],
            "eps": stage.eps,
            "tanh": stage.tanh,
            "residual": stage.residual,
            "cell": None if stage.cell is None else self._description(stage.cell),
        }


def plan_of(model: nn.Module) -> Plan | Reason:
    """How the model runs in native calls.

    Args:
        model: Any module. One with a method ``stages()`` can have a plan.

    Returns:
        The plan, kept until the model changes, or a `Reason` with the sentence that says why not.
    """
    plan = _plans.get(model)
    if plan is not None and plan.is_current(model):
        return plan
    try:
        _check_modules(model)
        if not inspect.isfunction(
            getattr(type(model), "stages", None)
        ):  # not an attribute of that name
            raise Unplanned(f"{type(model).__name__} has no stages()")
        stages = model.stages()  # type: ignore[operator]
        if not isinstance(stages, NetworkStages):
            raise Unplanned(f"stages() of {type(model).__name__} gives no NetworkStages")
        plan = Plan(model, stages)
    except Unplanned as reason:
        _plans.pop(model, None)
        return Reason(str(reason))
    _plans[model] = plan
    return plan


_plans: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()


def unavailable(*inputs: Tensor | None) -> str | None:
    """Why a call without gradients cannot be native now, if so.

    Args:
        inputs: What the call reads.
    """
    for x in inputs:
        if x is None:
            continue
        if not is_plain(x):
            return f"an input {list(x.shape)} on {x.device} is no plain tensor on the CPU"
    if needs_autograd():
        return "a transform of torch.func or forward-mode differentiation is active"
    if torch.is_grad_enabled():
        return "gradients are enabled"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is enabled"
    if is_watched():
        return "a compiler, tracer, mode or profiler watches the calls"
    if is_interpreting():
        return "Triton's interpreter stands in for the native kernels"
    return None


def _check_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if name and not is_untouched(module):
            raise Unplanned(f"{name} has a hook, or another method in the place of its own")


_kind = attrgetter("dtype", "device")


def _check_sizes(stages: NetworkStages) -> None:
    """Raises `Unplanned` unless the weights have their shapes and the stages fit each other."""
    features, states = stages.trunk[-1].outputs, {s.state for s in stages.trunk if s.state}
    if len(states) != 1:
        raise Unplanned(f"states have the sizes {sorted(states)}, not one size")
    if any(stage.state for branch, _ in stages.branches for stage in branch):
        raise Unplanned("a branch has a state")
    outputs = [branch[-1].outputs for branch, _ in stages.branches]
    if outputs[1:] not in ([], [1]):
        raise Unplanned(f"the values have {outputs[1:]} outputs, not one")
    if stages.log_std is not None and stages.log_std.shape != (outputs[0],):
        raise Unplanned(f"log_std is {list(stages.log_std.shape)}, not {outputs[:1]}")
    for group, before in [
        (stages.trunk, None),
        *((branch, features) for branch, _ in stages.branches),
    ]:
        for i, stage in enumerate(group):
            stage.check_shapes()
            if stage.residual and (i == 0 or stage.inputs != stage.outputs):
                raise Unplanned(f"a {stage.kind} stage has nothing of its size to add to")
            if before is not None and stage.inputs != before:
                raise Unplanned(f"a {stage.kind} stage takes {stage.inputs} features, not {before}")
            if stage.observations not in (0, stages.trunk[0].inputs):
                raise Unplanned(f"a {stage.kind} stage takes {stage.observations} observations")
            before = stage.outputs
