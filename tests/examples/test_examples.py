"""The examples, cut short, run as scripts and learn."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.isa_independent

RUNS = {
    "swap_gru": ("--steps 100 --length 40", r"accuracy +\S+ +\S+ +(\S+)", 0.4),  # 1/8 by chance
    "sb3_cartpole": ("--steps 8192 --episodes 8", r"loaded: return (\S+)", 60.0),  # about 16 before
    "torchrl_cartpole": ("--frames 6144", r"after training: (\S+)", 60.0),
    "ppo_ssm": ("--total-steps 10000 --eval-episodes 8", r"after training: (\S+)", 60.0),
}


@pytest.mark.parametrize("name", RUNS)
def test_it_learns(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, pattern, enough = RUNS[name]
    monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments.split()])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    output = capsys.readouterr().out
    match = re.search(pattern, output)
    assert match, output
    assert float(match[1]) > enough, output


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == RUNS.keys()
