"""The standard state-space model: one linear recurrence and an output network."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ssm_fast.checkpoint import Model
from ssm_fast.checks import check_count
from ssm_fast.nn.fused import is_untouched, product, runs_fused
from ssm_fast.nn.parameters import SPECTRAL_RADIUS, orthogonal_, unit_variance_
from ssm_fast.nn.ssm_layer import last_state
from ssm_fast.nn.stages import NetworkStages, Stage, Unplanned, linear_stage, overrides
from ssm_fast.ops import dense_scan
from ssm_fast.ops.linear import linear
from ssm_fast.ops.validation import check_dtype, in_autocast


class OutputNetwork(nn.Sequential):
    """Linear, tanh, linear; of a sequence in fused passes, where these are as we made them."""

    def forward(self, s: Tensor) -> Tensor:
        """``[..., O]`` from states ``[..., N]``."""
        parts = tuple(self)
        kinds = [type(part) if is_untouched(part) else None for part in parts]
        if runs_fused(s) and kinds == [nn.Linear, nn.Tanh, nn.Linear]:
            first, _, second = cast("tuple[nn.Linear, nn.Tanh, nn.Linear]", parts)
            h = linear(s, first.weight, first.bias, tanh=True)  # [..., H]
            return linear(h, second.weight, second.bias)
        y = s
        for part in parts:
            y = part(y)
        return y


class StateSpaceModel(Model):
    """A linear state-space recurrence, read by a network of one hidden layer.

    With ``m_t = 1 - reset_t``::

        s_t = A (m_t s_{t-1}) + B x_t
        y_t = C2 tanh(C1 s_t + c1) + c2 + D x_t

    As a policy for a discrete action space its output holds the logits; as a regressor (MAML) its
    prediction. Outputs start small, so that a policy starts close to uniform.

    Args:
        state_dim: Size of the state ``N``.
        input_dim: Number of input features ``I``.
        output_dim: Number of outputs ``O``.
        hidden_dim: Width of the output network.

    Attributes:
        A: Transition matrix ``[N, N]``, orthogonal with gain 0.9 at first.
        B: Input projection ``[N, I]``.
        C: The output network, ``nn.Sequential`` of two linear layers with a tanh between.
        D: Feed-through ``[O, I]``.

    Raises:
        ValueError: If a size is less than 1.
        TypeError: If a size is not an integer.
    """

    transition_parameters = ("A",)  # `learning_rate_scales`
    recurrent_parameters = ("A", "B", "C.0.weight")

    def __init__(
        self, state_dim: int = 32, input_dim: int = 4, output_dim: int = 2, hidden_dim: int = 64
    ) -> None:
        super().__init__()
        self.state_dim = check_count("state_dim", state_dim)
        self.input_dim = check_count("input_dim", input_dim)
        self.output_dim = check_count("output_dim", output_dim)
        self.hidden_dim = check_count("hidden_dim", hidden_dim)
        self.A = nn.Parameter(torch.empty(state_dim, state_dim))
        self.B = nn.Parameter(torch.empty(state_dim, input_dim))
        self.C = OutputNetwork(
            nn.Linear(state_dim, hidden_dim), nn.Tanh(), nn.Linear(hidden_dim, output_dim)
        )
        self.D = nn.Parameter(torch.empty(output_dim, input_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew (see the class docstring)."""
        orthogonal_(self.A, SPECTRAL_RADIUS)
        unit_variance_(self.B, 1.0)
        unit_variance_(self.D, 0.1)
        for layer, std in ((self.C[0], (1.0 - SPECTRAL_RADIUS**2) ** 0.5), (self.C[2], 0.1)):
            if isinstance(layer, nn.Linear):
                unit_variance_(layer.weight, std)
                nn.init.zeros_(layer.bias)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, for a checkpoint."""
        return {
            "state_dim": self.state_dim,
            "input_dim": self.input_dim,
            "output_dim": self.output_dim,
            "hidden_dim": self.hidden_dim,
        }

    def init_hidden(self, batch_size: int) -> Tensor:
        """Zeros ``[B, N]``, in the parameters' dtype and on their device."""
        check_count("batch_size", batch_size)
        return self.A.new_zeros(batch_size, self.state_dim)

    def forward(
        self,
        x: Tensor,
        hidden_state: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run one step or a whole sequence.

        Args:
            x: One step ``[B, I]`` or a sequence ``[B, T, I]``.
            hidden_state: State before it ``[B, N]``; zeros when ``None``. It is not modified.
            reset: ``[B]`` or ``[B, T]``, boolean or 0/1: where it is set, the incoming state is
                zeroed before it is used.

        Returns:
            The output, ``[B, O]`` or ``[B, T, O]``, and the next state ``[B, N]``.

        Raises:
            ValueError: If a shape does not fit.
            TypeError: If a dtype does not fit.
        """
        if x.ndim not in (2, 3) or x.shape[-1] != self.input_dim:
            raise ValueError(
                f"x must have shape [B, I] or [B, T, I] with I = {self.input_dim}, "
                f"got {list(x.shape)}"
            )
        check_dtype("x", x, self.A)
        h = hidden_state
        if h is not None:
            if h.ndim != 2 or h.shape[0] != x.shape[0] or h.shape[1] != self.state_dim:
                raise ValueError(
                    f"hidden_state must have shape [B, N] = {[x.shape[0], self.state_dim]}, "
                    f"got {list(h.shape)}"
                )
            check_dtype("hidden_state", h, self.A)
        if reset is not None and reset.shape != x.shape[:-1]:
            raise ValueError(
                f"reset must have shape {list(x.shape[:-1])}, as x without its features, "
                f"got {list(reset.shape)}"
            )
        if x.ndim == 2 and in_autocast(x):  # the scan keeps its state in float32
            first = None if reset is None else reset.unsqueeze(1)  # [B, 1]
            y, h = self.forward(x.unsqueeze(1), h, first)  # [B, 1, O], [B, N]
            return y.squeeze(1), h
        u = product(x, self.B)  # [B, N] or [B, T, N]
        if x.ndim == 3:
            s = dense_scan(u, self.A, h, reset)  # [B, T, N]
            h_next = last_state(s, h)  # [B, N]
        else:
            s = u
            if h is not None:
                if reset is not None:
                    h = h.masked_fill(reset.bool().unsqueeze(1), 0.0)  # [B, N]
                s = torch.addmm(u, h, self.A.t())  # [B, N]
            h_next = s
        y = self.C(s)  # what a user puts there may broadcast or promote
        if y.shape == (*x.shape[:-1], self.output_dim) and y.dtype == x.dtype:
            return product(x, self.D, add=y), h_next
        return y + product(x, self.D), h_next  # [B, O] or [B, T, O], [B, N]

    def stages(self) -> NetworkStages:
        """The model as native code runs it; docs/architecture.md.

        Raises:
            Unplanned: Native code cannot stand in for it.
        """
        if type(self.C) is not OutputNetwork or len(self.C) != 3 or type(self.C[1]) is not nn.Tanh:
            raise Unplanned("C is no linear layer, tanh and linear layer")
        first, last = linear_stage("C.0", self.C[0], tanh=True), linear_stage("C.2", self.C[2])
        I, N, O = self.input_dim, self.state_dim, self.output_dim
        if last.outputs != O:
            raise Unplanned(f"C.2.out_features is {last.outputs}, not {O}")
        matrices = [(self.A, (N, N)), (self.B, (N, I)), *((None, (N,)) for _ in range(3))]
        scan = Stage("scan", I, N, matrices, state=N)
        W, bias, _ = last.parameters
        parameters = [W, bias, (self.D, (O, I))]
        out = Stage("linear", last.inputs, last.outputs, parameters, observations=I)
        return NetworkStages(
            [scan],
            [([first, out], False)],
            overrides=overrides(self, StateSpaceModel, ("forward",)),
        )
