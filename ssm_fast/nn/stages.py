"""How a model describes itself to native code: as stages. docs/architecture.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssm_fast.checks import is_replaced
from ssm_fast.nn.running_norm import RunningNorm


class Unplanned(Exception):
    """Why a module has no stages, as a sentence that names it."""


@dataclass(frozen=True)
class Stage:
    """What one stage computes; csrc/network/stages.cpp has the kinds.

    Attributes:
        kind: Its name.
        inputs: Features of what the stage before it gives.
        outputs: Features of what it gives.
        parameters: In the order of the kind, each with the shape that native code reads; ``None`` for
            one that the module does not have.
        state: Size of its state, 0 without one.
        observations: Features of the network's input, where a linear stage reads that as well.
        eps: Of its norm.
        tanh: Whether a tanh stands behind a linear stage.
        residual: Whether a layer has a residual connection.
        cell: The stage inside a layer.
    """

    kind: str
    inputs: int
    outputs: int
    parameters: Sequence[tuple[Tensor | None, tuple[int, ...]]]
    state: int = 0
    observations: int = 0
    eps: float = 0.0
    tanh: bool = False
    residual: bool = False
    cell: Stage | None = None

    def tensors(self) -> list[Tensor | None]:
        """All parameters, those of the cell too."""
        return [*(p for p, _ in self.parameters), *(self.cell.tensors() if self.cell else ())]

    def check_shapes(self) -> None:
        """Compare the parameters with their shapes.

        Raises:
            Unplanned: One has another shape.
        """
        if self.cell is not None:
            self.cell.check_shapes()
        for p, shape in self.parameters:
            if p is not None and p.shape != shape:
                raise Unplanned(
                    f"a weight of a {self.kind} stage is {list(p.shape)}, not {list(shape)}"
                )


@dataclass(frozen=True)
class NetworkStages:
    """A network: stages one after the other, and branches that read what the last of them gives.

    Attributes:
        trunk: The stages.
        branches: Stages each, and whether no gradient flows from them into the trunk. The first
            gives the means (or logits, or predictions), the second the values.
        log_std: Of a Gaussian policy ``[K]``.
        obs_norm: What normalises the observations first.
        overrides: Methods of the model that a subclass, or somebody on this object, has overridden,
            of those that native code may stand in for.
    """

    trunk: Sequence[Stage]
    branches: Sequence[tuple[Sequence[Stage], bool]]
    log_std: Tensor | None = None
    obs_norm: RunningNorm | None = None
    overrides: Sequence[str] = ()

    def stages(self) -> list[Stage]:
        """All of them."""
        return [*self.trunk, *(stage for branch, _ in self.branches for stage in branch)]


def linear_stage(name: str, module: nn.Module, *, tanh: bool = False) -> Stage:
    """The stage of a plain linear layer.

    Raises:
        Unplanned: It is another module.
    """
    if type(module) is not nn.Linear:
        raise Unplanned(f"{name} is a {type(module).__name__}, not an nn.Linear")
    H, O = module.in_features, module.out_features
    parameters = [(module.weight, (O, H)), (module.bias, (O,)), (None, (O, 0))]
    return Stage("linear", H, O, parameters, tanh=tanh)


def layer_norm_parameters(
    name: str, module: nn.Module | None
) -> tuple[Tensor | None, Tensor | None, float]:
    """Weight, bias and eps of a layer norm; ``None`` twice where there is none.

    Raises:
        Unplanned: It is another module, or has no weight or no bias.
    """
    if module is None:
        return None, None, 0.0
    if type(module) is not nn.LayerNorm:
        raise Unplanned(f"{name} is a {type(module).__name__}, not an nn.LayerNorm")
    if module.weight is None or module.bias is None:
        raise Unplanned(f"{name} has no weight or no bias")
    return module.weight, module.bias, module.eps


def overrides(module: nn.Module, owner: type, methods: Iterable[str]) -> list[str]:
    """Those methods that a subclass, or somebody on this object, has overridden."""
    return [method for method in methods if is_replaced(module, owner, (method,))]


def check_methods(name: str, module: nn.Module, owner: type, methods: Iterable[str]) -> None:
    """Raises `Unplanned` where one of the methods is overridden."""
    if found := overrides(module, owner, methods):
        raise Unplanned(f"{name} overrides {found[0]}()")


def running_norm(name: str, module: nn.Module | None, features: int) -> RunningNorm | None:
    """A norm of observations that native code can apply.

    Raises:
        Unplanned: It is another module, or its statistics are not as it makes them.
    """
    if module is None:
        return None
    if type(module) is not RunningNorm:
        raise Unplanned(f"{name} is a {type(module).__name__}, not a RunningNorm")
    for which in ("mean", "var"):
        x = getattr(module, which)
        if x.shape != (features,) or x.dtype != torch.float64 or not x.is_contiguous():
            raise Unplanned(f"{name}.{which} is no contiguous float64 [{features}]")
    return module
