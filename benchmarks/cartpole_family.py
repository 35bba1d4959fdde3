"""How far the tasks of the CartPole families lie apart: who balances how many of them.

`PYTHONPATH=tests python benchmarks/cartpole_family.py [policy.safetensors ...]` plays the frozen
sets with the linear-quadratic regulator of each task, with that of CartPole-v1, and with policies
that `ssm-fast train --env CartPole-v1` left.
"""

from __future__ import annotations

import sys

import numpy as np
from cartpole_feedback import Feedback, gain, returns

import ssm_fast
from ssm_fast.env_runner import CartPoleTask, get_family

print(f"{'family':36} {'tasks':18} {'policy':24} mean return, share of tasks below 475")
for name in ("ssm_fast/CartPoleFamily-v0", "ssm_fast/CartPoleUnsignedFamily-v0"):
    for split in ("train_tasks", "test_tasks", "out_of_range_tasks"):
        tasks = getattr(get_family(name), split)
        policies = {
            "regulator of the task": Feedback(np.array([gain(task) for task in tasks])),
            "regulator of CartPole-v1": Feedback(np.tile(gain(CartPoleTask()), (len(tasks), 1))),
        }
        policies |= {path[-24:]: ssm_fast.load_policy(path) for path in sys.argv[1:]}
        for label, policy in policies.items():
            result = returns(name, tasks, policy)
            print(
                f"{name:36} {split:18} {label:24} {result.mean():6.1f} {(result < 475).mean():6.2f}"
            )
