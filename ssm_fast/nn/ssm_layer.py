"""One state-space layer: a projection in, a scan over time, a projection out."""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_fast._torch import is_hooked
from ssm_fast.checks import check_count, is_replaced
from ssm_fast.nn.stages import Stage, check_methods, layer_norm_parameters
from ssm_fast.ops import dense_scan, norm_scan
from ssm_fast.ops.dispatch import needs_autograd
from ssm_fast.ops.layer_norm import normalised
from ssm_fast.ops.linear import linear
from ssm_fast.ops.output_norm import fused_output
from ssm_fast.ops.validation import check_dtype, in_autocast

Norm = Literal["output", "state"]

SPECTRAL_RADIUS = (
    0.9  # of A at first: every mode forgets by this factor a step, in a plane of its own
)

ROWS = 256  # from which on `linear` is faster than torch's product, whose call costs less

TRANSITION_PACE = 0.1  # of transition matrices in a gradient step, in learning rates


def transition_pace(name: str) -> float:
    """The length of the steps of a weight, as a part of the learning rate.

    A step that is small for other weights takes an eigenvalue of a transition matrix beyond 1,
    where the state grows until it overflows.

    Args:
        name: Of the parameter, as in ``named_parameters()``.
    """
    return TRANSITION_PACE if name.rpartition(".")[2] == "A" else 1.0


def memory_weights(model: nn.Module) -> set[str]:
    """Names of the weights that lead into the states of its layers, through them and out of them."""
    names = set()
    for prefix, module in model.named_modules():
        if isinstance(module, SSMLayer):
            inside = ("norm.weight", "norm.bias") if module.normalize_state else ()
            own = ("A", "B", "bias", "C", *inside)
            names |= {f"{prefix}.{name}" if prefix else name for name in own}
    return names


class SSMLayer(nn.Module):
    """A state-space layer with a dense transition matrix.

    With ``m_t = 1 - reset_t`` (the incoming state is zeroed where an episode begins)::

        s_t = A (m_t s_{t-1}) + B x_t + bias
        y_t = C s_t + D x_t

    ``norm="output"`` normalises what comes out, ``y_t = LN(C s_t + D x_t)``; ``norm="state"``
    normalises inside the recurrence, ``s_t = LN(A (m_t s_{t-1}) + B x_t + bias)``.

    A starts as an orthogonal matrix times ``spectral_radius``; B, C and D start (semi-)orthogonal,
    scaled so that white input of unit variance gives a drive ``B x``, and without a norm an output,
    of unit variance.

    Args:
        input_size: Number of input features ``I``.
        hidden_size: Number of output features ``H``.
        state_size: Size of the state ``N``.
        bias: Whether the projection into the state has a bias ``[N]``.
        norm: Where the LayerNorm stands: ``None``, ``"output"`` or ``"state"``.
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
        ValueError: If a size is less than 1, ``norm`` is unknown or ``spectral_radius`` out of range.
        TypeError: If a size is not an integer.
    """

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
        spectral_radius: float = SPECTRAL_RADIUS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size = check_count("input_size", input_size)
        self.hidden_size = check_count("hidden_size", hidden_size)
        self.state_size = check_count("state_size", state_size)
        check_norm(norm)
        self.spectral_radius = check_radius(spectral_radius)
        self.normalize_state = norm == "state"

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.A = parameter(state_size, state_size)
        self.B = parameter(state_size, input_size)
        self.C = parameter(hidden_size, state_size)
        self.D = parameter(hidden_size, input_size)
        if bias:
            self.bias = parameter(state_size)
        else:
            self.register_parameter("bias", None)
        if norm is None:
            self.register_module("norm", None)
        else:
            features = state_size if norm == "state" else hidden_size
            self.norm = nn.LayerNorm(features, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew (see the class docstring)."""
        # A unit-variance drive gives a state of variance 1 / (1 - radius^2), or 1 behind the norm;
        # the two summands of y share its unit variance equally.
        radius = self.spectral_radius
        state_std = 1.0 if self.normalize_state else 1.0 / math.sqrt(1.0 - radius**2)
        orthogonal_(self.A, radius)
        unit_variance_(self.B, 1.0)
        unit_variance_(self.C, math.sqrt(0.5) / state_std)
        unit_variance_(self.D, math.sqrt(0.5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.norm is not None:
            self.norm.reset_parameters()

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
        z = F.linear(x, self.B, self.bias)  # [B, N]
        if s is not None:
            z = torch.addmm(z, s, self.A.t())  # [B, N]
        norm = self.norm
        if self.normalize_state and norm is not None:
            z = layer_norm(norm, z)  # [B, N]
        y = torch.addmm(F.linear(x, self.D), z, self.C.t())  # [B, H]
        if norm is not None and not self.normalize_state:
            y = layer_norm(norm, y)  # [B, H]
        return y, z

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
        u = product(x, self.B, self.bias)  # [B, T, N] or [T, B, N]
        if reset is not None and restart is not None:
            # The scan zeroes the state there, so that A r comes in with the drive.
            r = restart.masked_fill((reset == 0).unsqueeze(-1), 0.0)  # [B, T, N] or [T, B, N]
            u = product(r, self.A, add=u)
        if not batch_first:
            u = u.transpose(0, 1)  # [B, T, N]
            reset = None if reset is None else reset.transpose(0, 1)  # [B, T]
        norm = self.norm
        if self.normalize_state and norm is not None:
            if is_changed(norm):
                s = self._states_by_steps(u, norm, s0, reset)  # [B, T, N]
            else:
                s = norm_scan(u, self.A, norm.weight, norm.bias, s0, reset, norm.eps)  # [B, T, N]
        else:
            s = dense_scan(u, self.A, s0, reset)  # [B, T, N]
        return s if batch_first else s.transpose(0, 1)

    def _states_by_steps(
        self, u: Tensor, norm: nn.Module, s: Tensor | None, reset: Tensor | None
    ) -> Tensor:
        """`norm_scan` with a norm that has to be called: somebody else's, or one with hooks."""
        states = []
        for t in range(u.shape[1]):
            if s is not None and reset is not None:
                s = s.masked_fill(reset[:, t].bool().unsqueeze(1), 0.0)  # [B, N]
            s = norm(u[:, t] if s is None else torch.addmm(u[:, t], s, self.A.t()))  # [B, N]
            states.append(s)
        return torch.stack(states, 1) if states else u

    def readout(
        self, s: Tensor, x: Tensor, *, tanh: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """Outputs from states, ``C s + D x`` and the output norm.

        Args:
            s: States ``[..., N]``.
            x: Inputs ``[..., I]``.
            tanh: Whether to take the hyperbolic tangent of the outputs.
            residual: What to add last ``[..., H]``.

        Returns:
            Outputs ``[..., H]``.
        """
        z = product(s, self.C, add=product(x, self.D))  # [..., H]
        norm = None if self.normalize_state else self.norm
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
        *affine, eps = layer_norm_parameters(f"{name}.norm", self.norm)
        of_state = affine if self.normalize_state else (None, None)
        of_output = (None, None) if self.normalize_state else tuple(affine)
        sizes = self.input_size, self.hidden_size, self.state_size
        parameters = (self.A, self.B, self.bias, self.C, self.D, *of_state)
        cell = Stage("dense", sizes, parameters, eps)
        return Stage("layer", (), of_output, eps, residual, cell)

    def extra_repr(self) -> str:
        """Sizes and options, for ``print(layer)``."""
        norm = None if self.norm is None else "state" if self.normalize_state else "output"
        return (
            f"{self.input_size}, {self.hidden_size}, state_size={self.state_size}, "
            f"bias={self.bias is not None}, norm={norm!r}, spectral_radius={self.spectral_radius:g}"
        )


def runs_fused(x: Tensor) -> bool:
    """Whether `ops.linear` is the faster one for rows ``x``.

    torch's own product is so for few rows, on a GPU, in half precision and under a compiler. The
    compiler is asked first: it would make the number of rows a condition of the compiled code.
    """
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and x.numel() >= ROWS * x.shape[-1]
    )


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None
) -> Tensor:
    """``x Wᵀ``, plus a bias ``[O]`` or plus ``add`` ``[..., O]``."""
    if runs_fused(x):
        return linear(x, weight, bias, add)
    if add is None:
        return F.linear(x, weight, bias)
    rows = torch.addmm(add.flatten(0, -2), x.flatten(0, -2), weight.t())
    return rows.view(add.shape)


def linear_layer(layer: nn.Module, x: Tensor, add: Tensor | None = None) -> Tensor:
    """A linear layer, without a bias and with a sum in its place where there is one to `add`."""
    if type(layer) is nn.Linear and is_untouched(layer) and (add is None or layer.bias is None):
        return product(x, layer.weight, layer.bias, add)
    y: Tensor = layer(x)
    return y if add is None else y + add


def tanh_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """The hyperbolic tangent of a linear layer, in one pass where it is as torch makes it."""
    if type(layer) is nn.Linear and is_untouched(layer) and runs_fused(x):
        return linear(x, layer.weight, layer.bias, tanh=True)
    return fused_output(layer(x), None, None, None, 1e-5, True)


def is_untouched(module: nn.Module) -> bool:
    """Whether nobody has put a hook on it, or on all modules, or another method into it."""
    own = module.__dict__
    return not (_calls_more(module) or "step" in own or "states" in own or "readout" in own)


def _calls_more(module: nn.Module) -> bool:
    """Whether a call of the module does something beside its class's ``forward``."""
    return is_hooked(module) or "forward" in module.__dict__


def is_called(layer: SSMLayer) -> bool:
    """Whether a layer has to be called for its hooks, or its own ``forward``, to run."""
    return _calls_more(layer) or type(layer).forward is not SSMLayer.forward


def is_changed(norm: nn.Module) -> bool:
    """Whether a norm is not torch's with a weight and a bias, or has hooks: then it has to be called."""
    return (
        type(norm) is not nn.LayerNorm
        or norm.weight is None
        or norm.bias is None
        or _calls_more(norm)
    )


def layer_norm(norm: nn.LayerNorm, z: Tensor) -> Tensor:
    """The norm of rows ``[B, H]``, with right derivatives of every order, which torch's has not."""
    if is_changed(norm):
        normed: Tensor = norm(z)
        return normed
    if not needs_autograd(z, norm.weight, norm.bias):
        return F.layer_norm(z, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    if z.device.type == "cpu" and z.dtype not in (torch.float32, torch.float64):
        return normalised(z, norm.eps)[0] * norm.weight + norm.bias
    return fused_output(z, norm.weight, norm.bias, None, norm.eps, False)


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


def orthogonal_(weight: Tensor, gain: float) -> None:
    """Fill a matrix with a (semi-)orthogonal one times ``gain``, whatever its dtype."""
    # QR exists for float32 and float64 only.
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    q = torch.empty(weight.shape, device=weight.device, dtype=dtype)
    nn.init.orthogonal_(q, gain)
    with torch.no_grad():
        weight.copy_(q)


def unit_variance_(weight: Tensor, std: float) -> None:
    """Fill ``[out, in]`` so that inputs of unit variance give outputs of variance ``std^2``."""
    n_out, n_in = weight.shape
    orthogonal_(weight, std * math.sqrt(max(1.0, n_out / n_in)))


def check_norm(norm: str | None) -> None:
    """Raise unless ``norm`` is one of the places where the LayerNorm can stand."""
    if norm not in (None, "output", "state"):
        raise ValueError(f"norm must be None, 'output' or 'state', got {norm!r}")


def check_radius(spectral_radius: float) -> float:
    """Returns a spectral radius at which states fade."""
    if isinstance(spectral_radius, bool) or not isinstance(spectral_radius, numbers.Real):
        raise TypeError(f"spectral_radius must be a number, got {type(spectral_radius).__name__}")
    if not 0.0 <= spectral_radius < 1.0:
        raise ValueError(f"spectral_radius must be in [0, 1), got {spectral_radius}")
    return float(spectral_radius)
