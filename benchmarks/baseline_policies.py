"""Policies without memory, or with that of a GRU, in the place of an SSM in the same trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ssm_fast.core.improved_ssm import ImprovedSSM


class Block(nn.Module, ABC):
    """What an `SSMLayer` is replaced by: features of a step `[B, H]`, from those before and a state."""

    @abstractmethod
    def step(self, h: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The features `[B, H]` and the next state `[B, N]`."""


class GRUBlock(Block):
    """A GRU and a linear layer behind it."""

    def __init__(self, hidden_dim: int, state_dim: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(hidden_dim, state_dim)
        self.readout = nn.Linear(state_dim, hidden_dim)

    def step(self, h: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = self.cell(h, state)
        return self.readout(state), state


class MLPBlock(Block):
    """A linear layer; the state stays as it is."""

    def __init__(self, hidden_dim: int, state_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_dim, hidden_dim)

    def step(self, h: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(h), state


class BaselinePolicy(ImprovedSSM):
    """`ImprovedSSM` with other layers between the same encoder and the same heads.

    Layer norm, tanh and residual are around each layer as there.
    """

    block: type[Block]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        H, N = self.hidden_dim, self.state_dim
        self.layers = nn.ModuleList(self.block(H, N) for _ in range(self.num_layers))
        norms = [nn.LayerNorm(H) if self.use_layer_norm else nn.Identity() for _ in self.layers]
        self.norms = nn.ModuleList(norms)
        if self.orthogonal_init:
            for name, p in self.layers.named_parameters():
                if p.ndim == 2:
                    nn.init.orthogonal_(p, gain=1.0 if "cell" in name else 2.0**0.5)
                else:
                    nn.init.zeros_(p)

    def _features(
        self,
        x: Tensor,
        hidden_state: Tensor | None,
        reset: Tensor | None,
        every_state: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        one_step = x.ndim == 2
        if one_step:
            x, reset = x.unsqueeze(1), None if reset is None else reset.unsqueeze(1)
        h = self.encoder(x).tanh()  # [B, T, H]
        if hidden_state is None:
            hidden_state = self.init_hidden(len(x))
        states = []
        for layer, norm, state in zip(self.layers, self.norms, hidden_state, strict=True):
            outputs, of_layer = [], []
            for t, h_t in enumerate(h.unbind(1)):
                if reset is not None:
                    state = state.masked_fill(reset[:, t : t + 1].bool(), 0.0)
                y, state = layer.step(h_t, state)
                outputs.append(y)
                of_layer.append(state)
            y = norm(torch.stack(outputs, 1)).tanh()
            h = h + y if self.use_residual else y
            states.append(torch.stack(of_layer, 1) if every_state else state)
        return h.squeeze(1) if one_step else h, states


class GRUPolicy(BaselinePolicy):
    """Memory of a GRU."""

    block = GRUBlock


class MLPPolicy(BaselinePolicy):
    """No memory. Its state is an array of zeros, so that the trainer needs no other path."""

    block = MLPBlock
