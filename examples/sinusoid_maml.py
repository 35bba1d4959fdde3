"""Few-shot regression: MAML on sinusoids, five points of each (Finn et al. 2017, section 5.1).

A task is a sinusoid with an amplitude in [0.1, 5] and a phase in [0, pi]. A network of two hidden
layers of 40 units learns to fit a new one by a gradient step on five of its points.

pip install .
python examples/sinusoid_maml.py
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ssm_fast.meta_rl.meta_maml import MetaMAML

SHOTS = 5
STEPS = (0, 1, 5, 10)


def draw(tasks: int, points: int) -> tuple[Tensor, Tensor]:
    """Points of as many sinusoids, ``[tasks, points, 1]`` each."""
    amplitude = torch.empty(tasks, 1, 1).uniform_(0.1, 5.0)
    phase = torch.empty(tasks, 1, 1).uniform_(0.0, math.pi)
    x = torch.empty(tasks, points, 1).uniform_(-5.0, 5.0)
    return x, amplitude * torch.sin(x - phase)


@torch.no_grad()
def evaluate(maml: MetaMAML, tasks: int) -> dict[int, float]:
    """The mean squared error at 100 other points of new sinusoids, by the number of steps."""
    x, y = draw(tasks, SHOTS + 100)
    errors = {}
    for steps in STEPS:
        error = 0.0
        for x_g, y_g in zip(x, y, strict=True):
            weights = maml.adapt_task(x_g[:SHOTS], y_g[:SHOTS], num_steps=steps)
            output = functional_call(maml.model, weights, (x_g[SHOTS:],))
            error += float(nn.functional.mse_loss(output, y_g[SHOTS:])) / tasks
        errors[steps] = error
    return errors


def main(updates: int, meta_sgd: bool, inner_steps: int, tasks: int) -> dict[int, float]:
    """Meta-learn, and print and return the errors after gradient steps on new sinusoids."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(1, 40), nn.ReLU()), *(nn.Linear(40, 40), nn.ReLU()), nn.Linear(40, 1)
    )
    maml = MetaMAML(model, inner_lr=0.01, inner_steps=inner_steps, learn_inner_lr=meta_sgd)
    for update in range(1, updates + 1):
        x, y = draw(25, 2 * SHOTS)
        parts = x[:, :SHOTS], y[:, :SHOTS], x[:, SHOTS:], y[:, SHOTS:]
        loss = maml.meta_update(list(zip(*parts, strict=True)))
        if update % max(1, updates // 10) == 0:
            print(f"update {update}: query loss {loss:.3f}")
    errors = evaluate(maml, tasks)
    print(*(f"{steps:2} steps: error {error:.3f}" for steps, error in errors.items()), sep="\n")
    return errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="MAML on sinusoids")
    parser.add_argument("--updates", type=int, default=6000)
    parser.add_argument("--meta-sgd", action="store_true", help="learn the inner rates")
    parser.add_argument("--inner-steps", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=200, help="sinusoids to evaluate on")
    main(**vars(parser.parse_args()))
