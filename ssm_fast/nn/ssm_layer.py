"""One layer of a recurrent network: a cell, and a LayerNorm of its outputs."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssm_fast.checks import check_count, is_replaced
from ssm_fast.nn.cells import cell_of
from ssm_fast.nn.fused import calls_more, is_changed, layer_norm
from ssm_fast.nn.parameters import SPECTRAL_RADIUS, check_radius
from ssm_fast.nn.stages import Stage, check_methods, layer_norm_parameters
from ssm_fast.ops.output_norm import fused_output
from ssm_fast.ops.validation import check_dtype, in_autocast

Norm = Literal["output", "state"]


class SSMLayer(nn.Module):
    """A state-space layer.

    The cell maps a sequence of inputs to outputs by way of a state. The dense one, with ``m_t = 1 -
    reset_t`` (the incoming state is zeroed where an episode begins)::

        s_t = A (m_t s_{t-1}) + B x_t + bias
        y_t = C s_t + D x_t

    ``norm="output"`` normalises what comes out, ``y_t = LN(C s_t + D x_t)``; ``norm="state"``
    normalises inside the recurrence, ``s_t = LN(A (m_t s_{t-1}) + B x_t + bias)``.

    Args:
        input_size: Number of input features ``I``.
        hidden_size: Number of output features ``H``.
        state_size: Size of the state ``N``.
        bias: Whether the projection into the state has a bias ``[N]``.
        norm: Where the LayerNorm stands: ``None``, ``"output"`` or ``"state"``.
        cell: The name of the recurrence, one of ``ssm_fast.nn.cells.CELLS``.
        spectral_radius: Of ``A`` at first, in [0, 1): what is left of a state after one step.
        device: Device of the parameters.
        dtype: Floating-point type of the parameters.

    Attributes:
        A: Transition matrix ``[N, N]``.
        B: Input projection ``[N, I]``.
        C: Read-out ``[H, N]``.
        D: Feed-through ``[H, I]``.
        bias: ``[N]`` or ``None``.
        norm: ``nn.LayerNorm`` over ``H`` (``"output"``) or ``N`` (``"state"``), or ``None``.

    Raises:
        ValueError: If a size is less than 1, ``norm`` or ``cell`` is unknown or ``spectral_radius`` out
            of range.
        TypeError: If a size is not an integer.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    bias: Tensor | None
    norm: nn.LayerNorm | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        state_size: int,
        bias: bool = True,
        norm: Norm | None = None,
        *,
        cell: str = "dense",
        spectral_radius: float = SPECTRAL_RADIUS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size = check_count("input_size", input_size)
        self.hidden_size = check_count("hidden_size", hidden_size)
        self.state_size = check_count("state_size", state_size)
        self.cell = cell_of(cell, norm)
        self.spectral_radius = check_radius(spectral_radius)
        self.transition_parameters = self.cell.transition_parameters
        self.recurrent_parameters = self.cell.recurrent_parameters

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.register_module("norm", None)
        self.cell.make_parameters(self, bias, parameter)
        if norm == "output":
            self.norm = nn.LayerNorm(hidden_size, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as the cell does."""
        self.cell.reset_parameters(self)
        if self.norm is not None:
            self.norm.reset_parameters()

    @property
    def output_norm(self) -> nn.LayerNorm | None:
        """The norm, where it stands behind the layer."""
        return None if self.cell.normalizes_state else self.norm

    def forward(
        self,
        x: Tensor,
        s0: Tensor | None = None,
        reset: Tensor | None = None,
        *,
        restart: Tensor | None = None,
        every_state: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Run a whole sequence.

        Args:
            x: Inputs ``[B, T, I]``, any batch and time stride.
            s0: State before the first step ``[B, N]``; zeros when ``None``.
            reset: ``[B, T]``, boolean or 0/1: where it is set, ``x_t`` is the first of an episode.
            restart: As in `states`.
            every_state: Return the states of all steps.

        Returns:
            Outputs ``[B, T, H]`` and the last state ``[B, N]`` (``s0`` when ``T`` is 0), or every
            state ``[B, T, N]``.

        Raises:
            ValueError: If a shape does not fit.
            TypeError: If a dtype does not fit.
        """
        if x.ndim != 3 or x.shape[2] != self.input_size:
            raise ValueError(
                f"x must have shape [B, T, I] = [B, T, {self.input_size}], got {list(x.shape)}"
            )
        check_dtype("x", x, self.B)
        s = self.states(x, s0, reset, restart=restart)  # [B, T, N]
        return self.readout(s, x), s if every_state else last_state(s, s0)

    def step(self, x: Tensor, s: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Advance one step; equal to ``forward`` on a sequence of length 1, and cheaper.

        Shapes are not checked here, and a reset is the caller's: who takes tensors from outside
        does both once for all layers.

        Args:
            x: Input ``[B, I]``.
            s: State ``[B, N]``; zeros when ``None``. It is not modified.

        Returns:
            The output ``[B, H]`` and the new state ``[B, N]``.
        """
        # Under autocast the scan keeps its state in float32.
        if in_autocast(x) or is_replaced(self, SSMLayer, ("states", "readout")):
            y, s = self.forward(x.unsqueeze(1), s)  # [B, 1, H], [B, N]
            return y.squeeze(1), s
        y, s = self.cell.step(self, x, s)  # [B, H], [B, N]
        norm = self.output_norm
        return y if norm is None else layer_norm(norm, y), s

    def states(
        self,
        x: Tensor,
        s0: Tensor | None = None,
        reset: Tensor | None = None,
        batch_first: bool = True,
        restart: Tensor | None = None,
    ) -> Tensor:
        """Every state of a sequence, without the read-out.

        Args:
            x: Inputs ``[B, T, I]``, or ``[T, B, I]`` with ``batch_first=False``.
            s0: State before the first step ``[B, N]``; zeros when ``None``.
            reset: ``[B, T]`` or ``[T, B]``, as ``x``.
            batch_first: The layout of ``x``, ``reset`` and the result. The input projection runs
                in that layout, so that a time-major sequence is not copied.
            restart: ``[B, T, N]`` or ``[T, B, N]``, as ``x``: where ``reset`` is set, the state to
                go on from instead of zeros. What it holds elsewhere is never used.

        Returns:
            States ``[B, T, N]`` or ``[T, B, N]``.
        """
        return self.cell.states(self, x, s0, reset, batch_first, restart)

    def readout(
        self, s: Tensor, x: Tensor, *, tanh: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """Outputs from states, by the cell and the output norm.

        Args:
            s: States ``[..., N]``.
            x: Inputs ``[..., I]``.
            tanh: Whether to take the hyperbolic tangent of the outputs.
            residual: What to add last ``[..., H]``.

        Returns:
            Outputs ``[..., H]``.
        """
        z, norm = self.cell.outputs(self, s, x), self.output_norm  # [..., H]
        if norm is not None and is_changed(norm):
            z, norm = norm(z), None  # [..., H]
        weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
        if weight is None and residual is None and not tanh:
            return z
        return fused_output(z, weight, bias, residual, 1e-5 if norm is None else norm.eps, tanh)

    def stage(self, name: str, *, residual: bool) -> Stage:
        """The layer as a stage of a network, with a tanh behind it.

        Args:
            name: Of the layer, for the reason.
            residual: Whether the tanh is added to the input.

        Raises:
            Unplanned: Native code cannot stand in for the layer.
        """
        check_methods(name, self, SSMLayer, ("forward", "step", "states", "readout"))
        cell = self.cell.stage(self, name)
        weight, bias, eps = layer_norm_parameters(f"{name}.norm", self.output_norm)
        norm = [(p, (cell.outputs,)) for p in (weight, bias)]
        return Stage(
            "layer",
            cell.inputs,
            cell.outputs,
            norm,
            state=cell.state,
            eps=eps,
            residual=residual,
            cell=cell,
        )

    def extra_repr(self) -> str:
        """Sizes and options, for ``print(layer)``."""
        norm = None if self.norm is None else "state" if self.cell.normalizes_state else "output"
        return (
            f"{self.input_size}, {self.hidden_size}, state_size={self.state_size}, "
            f"bias={self.bias is not None}, norm={norm!r}, spectral_radius={self.spectral_radius:g}"
        )


def is_called(layer: SSMLayer) -> bool:
    """Whether a layer has to be called for its hooks, or its own ``forward``, to run."""
    return calls_more(layer) or type(layer).forward is not SSMLayer.forward


def run_layer(
    layer: SSMLayer,
    x: Tensor,
    s0: Tensor | None,
    reset: Tensor | None,
    batch_first: bool = True,
    restart: Tensor | None = None,
    every_state: bool = False,
    *,
    tanh: bool = False,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`SSMLayer.states` and `SSMLayer.readout`, through a call of the layer where it has to be called.

    The arguments are theirs; what comes back is laid out as ``x``, the last state ``[B, N]`` in the
    place of every one unless ``every_state``.
    """
    if not is_called(layer):
        s = layer.states(x, s0, reset, batch_first, restart)  # as x, N features
        y = layer.readout(s, x, tanh=tanh, residual=residual)  # as x, H features
        return y, s if every_state else last_state(s if batch_first else s.transpose(0, 1), s0)
    if not batch_first:
        x = x.transpose(0, 1)  # [B, T, I]
        reset = None if reset is None else reset.transpose(0, 1)  # [B, T]
        restart = None if restart is None else restart.transpose(0, 1)  # [B, T, N]
    # Somebody else's forward need not know of what is not asked for.
    more: dict[str, Any] = {"every_state": True} if every_state else {}
    if restart is not None:
        more["restart"] = restart
    y, s = layer(x, s0, reset, **more)
    if not batch_first:
        y, s = y.transpose(0, 1), s.transpose(0, 1) if every_state else s
    if tanh or residual is not None:
        y = fused_output(y, None, None, residual, 1e-5, tanh)
    return y, s


def step_layer(layer: SSMLayer, x: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
    """`SSMLayer.step`, through a call of the layer where it has to be called."""
    if not is_called(layer) or is_replaced(layer, SSMLayer, ("step",)):
        return layer.step(x, s)
    y, s = layer(x.unsqueeze(1), s)  # [B, 1, H], [B, N]
    return y.squeeze(1), s


def last_state(s: Tensor, s0: Tensor | None) -> Tensor:
    """The state after a sequence of states ``[B, T, N]``: ``s0`` where ``T`` is 0."""
    if s.shape[1] > 0:
        return s[:, -1]
    return s.new_zeros(s.shape[0], s.shape[2]) if s0 is None else s0
