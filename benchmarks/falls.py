"""How often policies of HalfCheetah-v5 fall: 100 deterministic episodes of each.

python benchmarks/falls.py runs/halfcheetah-v5-seed0 runs/halfcheetah-v5-seed1

HalfCheetah ends no episode that has gone wrong: its robot lies on its back until the time is over. So an episode with
less than four fifths of the median return counts as a fall.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np
import torch
import tyro
from contest import commit

import ssm_fast
from ssm_fast.env_runner import evaluate

EPISODES, SEED = 100, 3_000_000_000  # the first ten are those of the end of a training
SHARE = 0.8  # of the median, below which an episode is a fall


@dataclass(frozen=True)
class Options:
    """How often policies of HalfCheetah-v5 fall: 100 deterministic episodes of each."""

    policies: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders or policy files."""
    out: Path | None = None
    """Also write the returns there, as JSON."""


def main(options: Options) -> None:
    torch.set_num_threads(1)
    mujoco.set_mju_user_warning(lambda _: None)
    found = []
    sys.stdout.write("| policy | mean | median | falls |\n|---|---|---|---|\n")
    for path in options.policies:
        policy = ssm_fast.load_policy(path)
        returns = evaluate(policy, "HalfCheetah-v5", EPISODES, SEED, batch_size=EPISODES).returns
        median = float(np.median(returns))
        falls = int((returns < SHARE * median).sum())
        name = path.stem if path.is_file() else path.name
        sys.stdout.write(f"| {name} | {returns.mean():.0f} | {median:.0f} | {falls} |\n")
        found.append({"policy": name, "returns": returns.round(1).tolist(), "falls": falls})
    if options.out is not None:
        text = json.dumps({"commit": commit(), "episodes": EPISODES, "policies": found})
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
