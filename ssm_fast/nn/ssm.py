"""A stack of state-space layers with the calling convention of ``nn.GRU``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ssm_fast.checks import check_count
from ssm_fast.nn.cells import cell_of
from ssm_fast.nn.parameters import SPECTRAL_RADIUS
from ssm_fast.nn.ssm_layer import Norm, SSMLayer, is_called, run_layer, step_layer
from ssm_fast.ops.validation import check_dtype

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "relu": F.relu,
}


class SSM(nn.Module):
    """A drop-in for ``nn.GRU`` made of state-space layers.

    Each layer runs ``s_t = A (m_t s_{t-1}) + B x_t + bias``, ``y_t = C s_t + D x_t`` (see
    `SSMLayer`) and owns its state. Between layers, as in a residual block, the branch is
    ``dropout(activation(y))`` and the skip path is added to it where the sizes match; the last
    layer has neither dropout nor activation.

    What differs from ``nn.GRU``: the state has its own size, ``reset`` marks the first
    observation of an episode, ``step`` runs one step, and ``bidirectional`` and ``proj_size`` are
    not offered.

    Args:
        input_size: Number of input features ``I``.
        hidden_size: Number of output features ``H``.
        num_layers: Number of layers ``L``.
        bias: Whether each layer has a bias in its state.
        batch_first: ``[B, T, .]`` instead of ``[T, B, .]``; the state is ``[L, B, N]`` in both.
        dropout: Dropout probability on the output of each layer but the last, in training mode.
        state_size: Size ``N`` of each layer's state; ``hidden_size`` when ``None``.
        norm: LayerNorm of each layer: ``None``, ``"output"`` or ``"state"``.
        residual: Add a layer's input to its output where both have the same size.
        activation: ``"gelu"``, ``"silu"``, ``"tanh"``, ``"relu"`` or ``None``, between layers.
        spectral_radius: Of every ``A`` at first, in [0, 1): what is left of a state after one step.
        bidirectional: Not offered; there so that code written for ``nn.GRU`` gets a clear error.
        proj_size: Not offered; likewise.
        device: Device of the parameters.
        dtype: Floating-point type of the parameters.

    Raises:
        ValueError: If a size, ``dropout``, ``norm``, ``activation`` or ``spectral_radius`` is out of
            range, or ``bidirectional`` or ``proj_size`` is asked for.
        TypeError: If a size is not an integer.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        *,
        state_size: int | None = None,
        norm: Norm | None = None,
        residual: bool = False,
        activation: str | None = None,
        spectral_radius: float = SPECTRAL_RADIUS,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        state_size = hidden_size if state_size is None else state_size
        self.input_size = check_count("input_size", input_size)
        self.hidden_size = check_count("hidden_size", hidden_size)
        self.num_layers = check_count("num_layers", num_layers)
        self.state_size = check_count("state_size", state_size)
        cell_of("dense", norm)
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be in [0, 1], got {dropout}")
        if dropout > 0.0 and num_layers == 1:
            warnings.warn(
                "dropout acts on the output of each layer but the last: with num_layers=1 it does "
                f"nothing, got dropout={dropout}",
                UserWarning,
                stacklevel=2,
            )
        if activation is not None and activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation must be None or one of {sorted(_ACTIVATIONS)}, got {activation!r}"
            )
        if activation is not None and num_layers == 1:
            warnings.warn(
                "activation stands behind each layer but the last: with num_layers=1 it does "
                f"nothing, got activation={activation!r}; put a nonlinear read-out behind the layer",
                UserWarning,
                stacklevel=2,
            )
        if bidirectional:
            raise ValueError(
                "bidirectional must be False: SSM runs forward in time only; for both directions take "
                "a second one, on the flipped sequence"
            )
        if proj_size != 0:
            raise ValueError(
                f"proj_size must be 0, got {proj_size}: use hidden_size for the output and "
                "state_size for the state"
            )
        self.bias = bias
        self.batch_first = batch_first
        self.bidirectional, self.proj_size = False, 0  # for code that asks an nn.GRU
        self.dropout = dropout
        self.norm = norm
        self.residual = residual
        self.spectral_radius = spectral_radius
        self.activation = activation
        self.layers = nn.ModuleList(
            SSMLayer(
                input_size if i == 0 else hidden_size,
                hidden_size,
                state_size,
                bias,
                norm,
                spectral_radius=spectral_radius,
                device=device,
                dtype=dtype,
            )
            for i in range(num_layers)
        )

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        reset: PackedSequence | None = None,
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        reset: Tensor | PackedSequence | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run a sequence, as ``nn.GRU`` does.

        Args:
            input: ``[T, B, I]``, ``[B, T, I]`` with ``batch_first``, ``[T, I]`` unbatched, or a
                ``PackedSequence``.
            hx: State before the first step ``[L, B, N]``, unbatched ``[L, N]``; zeros when
                ``None``. It is not modified.
            reset: Boolean or 0/1, shaped as ``input`` without its features (a ``PackedSequence``
                packed like ``input`` when that is one): where it is set, the incoming state is
                zeroed before it is used.

        Returns:
            The output of the last layer, in the layout of ``input`` with ``H`` features, and the
            last state of every layer ``[L, B, N]`` (unbatched ``[L, N]``). Of a packed sequence
            it is each sequence's own last state.

        Raises:
            ValueError: If a shape does not fit.
            TypeError: If a dtype does not fit, or ``reset`` is packed and ``input`` is not, or
                the other way round.
        """
        if isinstance(input, PackedSequence):
            if reset is not None and not isinstance(reset, PackedSequence):
                raise TypeError("reset must be a PackedSequence, as input is one, got a tensor")
            return self._forward_packed(input, hx, reset)
        if isinstance(reset, PackedSequence):
            raise TypeError("reset must be a tensor, as input is one, got a PackedSequence")
        return self._forward_padded(input, hx, reset)

    def _forward_padded(
        self, x: Tensor, hx: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        _check_tensor("input", x)
        if x.ndim not in (2, 3) or x.shape[-1] != self.input_size:
            layout = "[B, T, I]" if self.batch_first else "[T, B, I]"
            raise ValueError(
                f"input must have shape {layout} or [T, I] with I = {self.input_size}, "
                f"got {list(x.shape)}"
            )
        self._check_dtypes(x, hx)
        if reset is not None and reset.shape != x.shape[:-1]:
            raise ValueError(
                f"reset must have shape {list(x.shape[:-1])}, as input without its features, "
                f"got {list(reset.shape)}"
            )
        batched = x.ndim == 3
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            x = x.unsqueeze(batch_dim)  # [1, T, I] or [T, 1, I]
            reset = None if reset is None else reset.unsqueeze(batch_dim)  # [1, T] or [T, 1]
        hx = self._check_state(hx, x.shape[batch_dim], batched)  # [L, B, N]

        h_n: list[Tensor] = []
        for i, layer in enumerate(self._ssm_layers()):
            s0 = None if hx is None else hx[i]  # [B, N]
            y, s = run_layer(layer, x, s0, reset, self.batch_first)  # as x with H features, [B, N]
            h_n.append(s)
            x = self._join(i, x, y)  # as x, H features
        h = torch.stack(h_n)  # [L, B, N]
        return (x, h) if batched else (x.squeeze(batch_dim), h.squeeze(1))

    def _forward_packed(
        self, packed: PackedSequence, hx: Tensor | None, reset: PackedSequence | None
    ) -> tuple[PackedSequence, Tensor]:
        x = packed.data  # [sum of lengths, I]
        if x.ndim != 2 or x.shape[1] != self.input_size:
            raise ValueError(
                f"input.data must have shape [sum of lengths, I] with I = {self.input_size}, "
                f"got {list(x.shape)}"
            )
        self._check_dtypes(x, hx)
        # Row t, b of the time-major padded form is row t * B + b of its flat form; packed data
        # holds the real ones in the same order.
        batch_sizes = packed.batch_sizes  # [T], on the CPU
        T, B = batch_sizes.shape[0], int(batch_sizes[0])
        real = torch.arange(B, device="cpu") < batch_sizes.unsqueeze(1)  # [T, B]
        rows = real.flatten().nonzero().squeeze(1).to(x.device)  # [sum of lengths]
        last = (real.sum(0) - 1).to(x.device)  # [B]
        every = torch.arange(B, device=x.device)  # [B]

        def pad(data: Tensor) -> Tensor:
            flat = data.new_zeros(T * B, *data.shape[1:]).index_copy(0, rows, data)
            return flat.view(T, B, *data.shape[1:])  # [T, B, ...]

        # Reset in every step of padding, so that a state cannot run away there and spoil gradients.
        padded_reset = ~real.to(x.device)  # [T, B]
        if reset is not None:
            padded_reset = padded_reset | (pad(self._check_packed_reset(reset, packed)) != 0)
        hx = self._check_state(hx, B, batched=True)  # [L, B, N]
        if hx is not None and packed.sorted_indices is not None:
            hx = hx.index_select(1, packed.sorted_indices)  # [L, B, N], longest first

        h_n: list[Tensor] = []
        for i, layer in enumerate(self._ssm_layers()):
            s0 = None if hx is None else hx[i]  # [B, N]
            if is_called(layer):
                y, s = run_layer(layer, pad(x), s0, padded_reset, False, every_state=True)
                y = y.flatten(0, 1).index_select(0, rows)  # [sum of lengths, H]
            else:  # only the real rows are read out
                s = layer.states(pad(x), s0, padded_reset, batch_first=False)  # [T, B, N]
                y = layer.readout(s.flatten(0, 1).index_select(0, rows), x)
            h_n.append(s[last, every])  # [B, N]: what padding drives the state to is never read
            x = self._join(i, x, y)  # [sum of lengths, H]
        h = torch.stack(h_n)  # [L, B, N]
        if packed.unsorted_indices is not None:
            h = h.index_select(1, packed.unsorted_indices)  # [L, B, N]
        out = PackedSequence(x, batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        return out, h

    def step(
        self, x: Tensor, h: Tensor | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run one step, without the cost of a sequence.

        Args:
            x: Input ``[B, I]``, or ``[I]`` unbatched.
            h: State of every layer ``[L, B, N]``, unbatched ``[L, N]``; zeros when ``None``. It
                is not modified.
            reset: ``[B]`` (unbatched ``[]``), boolean or 0/1.

        Returns:
            The output ``[B, H]`` (``[H]``) and the new state ``[L, B, N]`` (``[L, N]``).

        Raises:
            ValueError: If a shape does not fit.
            TypeError: If a dtype does not fit.
        """
        _check_tensor("x", x)
        if x.ndim not in (1, 2) or x.shape[-1] != self.input_size:
            raise ValueError(
                f"x must have shape [B, I] or [I] with I = {self.input_size}, got {list(x.shape)}"
            )
        self._check_dtypes(x, h)
        if reset is not None and reset.shape != x.shape[:-1]:
            raise ValueError(
                f"reset must have shape {list(x.shape[:-1])}, as x without its features, "
                f"got {list(reset.shape)}"
            )
        batched = x.ndim == 2
        if not batched:
            x = x.unsqueeze(0)  # [1, I]
            reset = None if reset is None else reset.unsqueeze(0)  # [1]
        h = self._check_state(h, x.shape[0], batched)  # [L, B, N]
        if h is not None and reset is not None:
            h = h.masked_fill(reset.bool().unsqueeze(1), 0.0)  # [L, B, N]
        h_next: list[Tensor] = []
        for i, layer in enumerate(self._ssm_layers()):
            y, s = step_layer(layer, x, None if h is None else h[i])  # [B, H], [B, N]
            h_next.append(s)
            x = self._join(i, x, y)  # [B, H]
        h = torch.stack(h_next)  # [L, B, N]
        return (x, h) if batched else (x.squeeze(0), h.squeeze(1))

    def replay(
        self, input: Tensor, states: Tensor, *, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run sequences that were stored with their states, as in a replay buffer.

        As ``forward`` from the first stored state, but where an episode begins inside a sequence
        it starts from the state stored there, and every state is returned.

        Args:
            input: ``[T, B, I]``, or ``[B, T, I]`` with ``batch_first``.
            states: State before each step, ``[T, B, L, N]`` or ``[B, T, L, N]``. It is read at the
                first step and where ``reset`` is set.
            reset: ``[T, B]`` or ``[B, T]``, boolean or 0/1: where an episode begins.

        Returns:
            The output of the last layer, in the layout of ``input`` with ``H`` features, and the
            state after each step, shaped as ``states``.

        Raises:
            ValueError: If a shape does not fit.
            TypeError: If a dtype does not fit.
        """
        time = 1 if self.batch_first else 0
        _check_tensor("input", input)
        if input.ndim != 3 or input.shape[-1] != self.input_size or input.shape[time] == 0:
            layout = "[B, T, I]" if self.batch_first else "[T, B, I]"
            raise ValueError(
                f"input must have shape {layout} with T >= 1 and I = {self.input_size}, "
                f"got {list(input.shape)}"
            )
        x = input
        self._check_dtypes(x, states)
        expected = [*x.shape[:2], self.num_layers, self.state_size]
        if list(states.shape) != expected:
            raise ValueError(f"states must have shape {expected}, got {list(states.shape)}")
        if reset is not None and reset.shape != x.shape[:2]:
            raise ValueError(f"reset must have shape {list(x.shape[:2])}, got {list(reset.shape)}")
        after: list[Tensor] = []
        for i, layer in enumerate(self._ssm_layers()):
            before = states[:, :, i]  # as x, N features
            s0 = before.select(time, 0)  # [B, N]
            y, s = run_layer(layer, x, s0, reset, self.batch_first, before, every_state=True)
            after.append(s)
            x = self._join(i, x, y)  # as x, H features
        return x, torch.stack(after, 2)

    def reset_parameters(self) -> None:
        """Draw the parameters of all layers anew."""
        for layer in self._ssm_layers():
            layer.reset_parameters()

    def flatten_parameters(self) -> None:
        """Do nothing: code written for ``nn.GRU`` calls it to please cuDNN."""

    def extra_repr(self) -> str:
        """Sizes and options, for ``print(module)``."""
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, "
            f"bias={self.bias}, batch_first={self.batch_first}, dropout={self.dropout}, "
            f"state_size={self.state_size}, norm={self.norm!r}, residual={self.residual}, "
            f"activation={self.activation!r}, spectral_radius={self.spectral_radius:g}"
        )

    def _ssm_layers(self) -> list[SSMLayer]:
        return cast("list[SSMLayer]", list(self.layers))

    def _join(self, i: int, x: Tensor, y: Tensor) -> Tensor:
        """What layer ``i`` hands on, from its input and its output."""
        if i < self.num_layers - 1:
            if self.activation is not None:
                y = _ACTIVATIONS[self.activation](y)
            if self.dropout > 0.0:
                y = F.dropout(y, self.dropout, self.training)
        if self.residual and x.shape[-1] == y.shape[-1]:
            y = x + y
        return y

    def _check_dtypes(self, x: Tensor, hx: Tensor | None) -> None:
        weight = self._ssm_layers()[0].A
        if hx is not None and not isinstance(hx, Tensor):
            raise TypeError(
                f"hx must be one tensor [L, B, N], got {type(hx).__name__}: there is no cell state"
            )
        check_dtype("input", x, weight)
        if hx is not None:
            check_dtype("hx", hx, weight)

    def _check_state(self, hx: Tensor | None, B: int, batched: bool) -> Tensor | None:
        """The state as ``[L, B, N]``, or ``None``."""
        if hx is None:
            return None
        names = "[L, B, N]" if batched else "[L, N]"
        expected = [self.num_layers, B, self.state_size]
        if not batched:
            del expected[1]
        if list(hx.shape) != expected:
            raise ValueError(f"hx must have shape {names} = {expected}, got {list(hx.shape)}")
        return hx if batched else hx.unsqueeze(1)

    def _check_packed_reset(self, reset: PackedSequence, packed: PackedSequence) -> Tensor:
        """The data of a reset that is packed exactly as the input."""
        same = torch.equal(reset.batch_sizes, packed.batch_sizes)
        if not same or reset.data.ndim != 1 or not torch.equal(_order(reset), _order(packed)):
            raise ValueError("reset must be packed like input (same lengths, same order), [T] each")
        return reset.data


def _check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def _order(packed: PackedSequence) -> Tensor:
    """Which sequence each sorted row is, ``[B]``."""
    if packed.sorted_indices is None:
        return torch.arange(int(packed.batch_sizes[0]), device=packed.data.device)
    return packed.sorted_indices
