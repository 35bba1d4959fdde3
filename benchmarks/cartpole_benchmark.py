"""The ways to adapt in the family of CartPole tasks: gradient steps, recurrent state, both, or neither.

python benchmarks/cartpole_benchmark.py

Five seeds of each, as `meta_benchmark.py --env cartpole --seeds 5` runs them; see there for what is written.
"""

from __future__ import annotations

import tyro
from meta_benchmark import Options, main

if __name__ == "__main__":
    main(tyro.cli(Options, default=Options(env="cartpole", seeds=5)))
