"""The same model and training loop with nn.GRU, nn.LSTM and ssm_fast.SSM, side by side.

Which of eight frequencies is buried in noise of twice its variance? Phases are random, and the
answer comes after the last step. The figures differ from processor to processor, as rounding does.

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
    "ssm_fast.SSM": lambda I, H: SSM(I, H, batch_first=True),
}
CLASSES = 8


class Classifier(nn.Module):
    """A recurrent layer and a read-out of its last output."""

    def __init__(self, layer: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.layer = layer
        self.readout = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.layer(x)  # [B, T, H]
        return self.readout(y[:, -1])  # [B, CLASSES]


def draw(B: int, T: int) -> tuple[Tensor, Tensor]:
    """Noisy waves and which frequency each has."""
    label = torch.randint(CLASSES, (B, 1))
    phase = 0.02 * 1.35**label * torch.arange(T) + torch.rand(B, 1)  # [B, T], in turns
    wave = torch.sin(2 * torch.pi * phase) + torch.randn(B, T)
    return wave.unsqueeze(2), label.squeeze(1)  # [B, T, 1], [B]


def train(model: nn.Module, steps: int, length: int) -> tuple[Tensor, Tensor, float]:
    """Loss and accuracy of each step, and the seconds that all took."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses, accuracies = [], []
    begin = time.perf_counter()
    for _ in range(steps):
        x, label = draw(64, length)
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, label)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        accuracies.append((logits.argmax(1) == label).float().mean())
    return torch.stack(losses), torch.stack(accuracies), time.perf_counter() - begin


def main(
    steps: int = 300, length: int = 100, hidden_size: int = 64, seed: int = 0
) -> dict[str, float]:
    """Train with each layer; return the accuracy of each over the last tenth of the steps."""
    results = {}
    for name, make in LAYERS.items():
        torch.manual_seed(seed)
        results[name] = train(Classifier(make(1, hidden_size), hidden_size), steps, length)
    print("loss by step" + "".join(f"{name:>14}" for name in results))
    part = max(1, steps // 10)
    for end in range(part, steps + 1, part):
        means = [losses[end - part : end].mean() for losses, _, _ in results.values()]
        print(f"{end:12}" + "".join(f"{mean:14.3f}" for mean in means))
    last = {name: float(accuracies[-part:].mean()) for name, (_, accuracies, _) in results.items()}
    print("    accuracy" + "".join(f"{value:14.3f}" for value in last.values()))
    print("     seconds" + "".join(f"{seconds:14.1f}" for _, _, seconds in results.values()))
    return last


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="nn.GRU, nn.LSTM and ssm_fast.SSM")
    for name, default in (("steps", 300), ("length", 100), ("hidden-size", 64), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    main(**vars(parser.parse_args()))
