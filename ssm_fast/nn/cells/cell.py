"""The interface of a cell."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from ssm_fast.nn.ssm_layer import SSMLayer
    from ssm_fast.nn.stages import Stage


class Cell(ABC):
    """A recurrence with its projections, from inputs ``[I]`` to outputs ``[H]`` by way of a state ``[N]``.

    A cell holds nothing. Its parameters lie in the `SSMLayer` that every method takes first, so that
    their names say what they are (``layers.0.A``).

    Attributes:
        transition_parameters: Names of those that take a state to the next one. They learn slowly:
            `ssm_fast.nn.parameters.learning_rate_scales`.
        recurrent_parameters: Names of those that lead into the state, through it and out of it.
        normalizes_state: Whether ``layer.norm`` stands inside the recurrence.
    """

    transition_parameters: ClassVar[Sequence[str]] = ()
    recurrent_parameters: ClassVar[Sequence[str]] = ()
    normalizes_state: ClassVar[bool] = False

    @abstractmethod
    def make_parameters(
        self, layer: SSMLayer, bias: bool, parameter: Callable[..., nn.Parameter]
    ) -> None:
        """Put parameters into the layer, whose sizes are set; ``parameter(*shape)`` makes one."""

    @abstractmethod
    def reset_parameters(self, layer: SSMLayer) -> None:
        """Draw them anew."""

    @abstractmethod
    def states(
        self,
        layer: SSMLayer,
        x: Tensor,
        s0: Tensor | None,
        reset: Tensor | None,
        batch_first: bool,
        restart: Tensor | None,
    ) -> Tensor:
        """Every state of a sequence; see `SSMLayer.states`."""

    @abstractmethod
    def outputs(self, layer: SSMLayer, s: Tensor, x: Tensor) -> Tensor:
        """Outputs ``[..., H]`` from states ``[..., N]`` and inputs ``[..., I]``."""

    @abstractmethod
    def step(self, layer: SSMLayer, x: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs ``[B, H]`` and state ``[B, N]`` of one step from ``x`` ``[B, I]`` and ``s`` ``[B, N]``."""

    @abstractmethod
    def stage(self, layer: SSMLayer, name: str) -> Stage:
        """The cell as native code runs it; ``name`` is that of the layer, for a reason.

        Raises:
            Unplanned: Native code cannot stand in for it.
        """

    def growth(self, layer: SSMLayer, steps: int) -> float:
        """The largest factor by which a state may grow over ``steps`` without input; 0 if bounded."""
        return 0.0
