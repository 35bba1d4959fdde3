"""The same model and training loop with nn.GRU, nn.LSTM and ssm_fast.SSM, side by side.

The adding problem (Hochreiter and Schmidhuber 1997): of a sequence of random numbers, add the two
that are marked. Answering the mean scores 0.167; a model that remembers gets below 0.01.

pip install .
python examples/swap_gru.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssm_fast import SSM

LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "nn.GRU": lambda I, H: nn.GRU(I, H, batch_first=True),
    "nn.LSTM": lambda I, H: nn.LSTM(I, H, batch_first=True),
    "ssm_fast.SSM": lambda I, H: SSM(I, H, batch_first=True, norm="state"),
}


class Adder(nn.Module):
    """A recurrent layer and a read-out of its last output."""

    def __init__(self, layer: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.layer = layer
        self.readout = nn.Linear(hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.layer(x)  # [B, T, H]
        return self.readout(y[:, -1]).squeeze(1)


def draw(B: int, T: int) -> tuple[Tensor, Tensor]:
    """Numbers in [0, 1) with a mark in each half, and the sum of the two marked ones."""
    numbers, marks = torch.rand(B, T), torch.zeros(B, T)
    for first in (0, T // 2):
        marks.scatter_(1, torch.randint(first, first + T // 2, (B, 1)), 1.0)
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(1)  # [B, T, 2], [B]


def train(layer: nn.Module, hidden_size: int, steps: int, length: int) -> tuple[list[float], float]:
    """Mean losses of ten parts of the training, and the seconds that it took."""
    model = Adder(layer, hidden_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    begin = time.perf_counter()
    for _ in range(steps):
        x, target = draw(64, length)
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - begin
    parts = torch.tensor(losses).chunk(10)
    return [float(part.mean()) for part in parts], seconds


def main(steps: int = 600, length: int = 100, hidden_size: int = 64) -> dict[str, float]:
    """Train with each layer; return the last part's mean loss of each."""
    results = {}
    for name, make in LAYERS.items():
        torch.manual_seed(0)
        results[name] = train(make(2, hidden_size), hidden_size, steps, length)
    print("steps" + "".join(f"{name:>14}" for name in results))
    for i, losses in enumerate(zip(*(losses for losses, _ in results.values()), strict=True)):
        print(f"{(i + 1) * steps // 10:5}" + "".join(f"{loss:14.4f}" for loss in losses))
    print("  s  " + "".join(f"{seconds:14.1f}" for _, seconds in results.values()))
    return {name: losses[-1] for name, (losses, _) in results.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("steps", 600), ("length", 100), ("hidden-size", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    main(**vars(parser.parse_args()))
