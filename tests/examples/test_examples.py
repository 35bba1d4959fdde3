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


def test_sinusoids_are_fitted_by_a_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--updates 400 --meta-sgd --tasks 30"
    monkeypatch.setattr("sys.argv", ["sinusoid_maml.py", *arguments.split()])
    runpy.run_path(str(EXAMPLES / "sinusoid_maml.py"), run_name="__main__")
    output = capsys.readouterr().out
    found = re.findall(r"^ *(\d+) steps: error (\S+)$", output, re.MULTILINE)
    errors = {int(steps): float(error) for steps, error in found}
    assert errors.keys() == {0, 1, 5, 10}, output
    assert errors[1] < 0.75 * errors[0], output
    assert errors[10] < errors[0], output


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*RUNS, "sinusoid_maml"}
