from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import ssm_fast
from ssm_fast import cli
from ssm_fast.checkpoint import load_inner_rates, load_model, read_metadata, save_model
from ssm_fast.cli import progress
from ssm_fast.cli.options import EVALUATION_SEED, Train
from ssm_fast.cli.presets import load_preset, preset_names
from ssm_fast.cli.settings import (
    MODEL_OPTIONS,
    TRAINER_OPTIONS,
    default_folder,
    make_environment,
    make_trainer,
    settings_of,
)
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.core.ssm import StateSpaceModel
from ssm_fast.env_runner import Environment, evaluate, get_family
from ssm_fast.meta_rl.meta_rl_trainer import MetaRLTrainer
from ssm_fast.meta_rl.run import RunDirectory

pytestmark = pytest.mark.isa_independent

REINFORCE = ["train", "--mode", "policy_gradient", "--batch_size", "4", "--episodes", "12"]
PPO = [
    *("train", "--mode", "improved", "--env", "Pendulum-v1", "--batch_size", "2"),
    *("--num_steps", "40", "--ppo_epochs", "2", "--state_dim", "4", "--hidden_dim", "8"),
]
META = [
    *("train", "--mode", "meta_rl", "--env", "CartPole-v1", "--tasks_per_epoch", "2"),
    *("--batch_size", "3", "--num_steps", "12", "--state_dim", "4", "--hidden_dim", "6"),
    *("--evaluation_interval", "2", "--outer_epochs", "1"),
]
FAMILY = "ssm_fast/CartPoleFamily-v0"
TIMED = ("seconds", "steps_per_second", "playing")


class Breaks(gymnasium.Wrapper[Any, Any, Any, Any]):
    """CartPole that returns NaN at its 150th step."""

    nan_at = 150

    def __init__(self) -> None:
        super().__init__(gymnasium.make("CartPole-v1"))
        self.steps = 0

    def step(self, action: Any) -> Any:
        obs, *rest = super().step(action)
        self.steps += 1
        return (obs * np.nan if self.steps == self.nan_at else obs, *rest)


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    gymnasium.register("Breaks-v0", entry_point=Breaks)
    gymnasium.register("Endless-v0", entry_point="gymnasium.envs.classic_control:PendulumEnv")
    yield
    del gymnasium.registry["Breaks-v0"], gymnasium.registry["Endless-v0"]
    torch.set_num_threads(threads)


def _rows(path: Path | str) -> list[dict[str, float]]:
    """The learning curve without what a clock says; NaN is left out, which no NaN equals."""
    rows = RunDirectory(path, resume=True).read_rows()
    return [{k: v for k, v in row.items() if k not in TIMED and not math.isnan(v)} for row in rows]


def _assert_same_policy(*runs: str) -> None:
    one, other = (dict(load_model(Path(run, "policy.safetensors")).state_dict()) for run in runs)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


class TestTrain:
    @pytest.mark.parametrize(
        ("args", "env_id", "model"),
        [
            ([*REINFORCE, "--state_dim", "5", "--hidden-dim", "6"], "CartPole-v1", StateSpaceModel),
            ([*PPO, "--steps", "160", "--num_layers", "1"], "Pendulum-v1", ImprovedSSM),
        ],
    )
    def test_leaves_a_whole_run(
        self, args: list[str], env_id: str, model: type, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main([*args, "--seed", "3", "--lr", "1e-3", "--out", "out"]) == 0
        out = Path("out")
        config = json.loads((out / "config.json").read_text())
        assert (config["env"], config["seed"], config["learning_rate"]) == (env_id, 3, 1e-3)
        assert config["versions"]["torch"] == torch.__version__
        assert config.get("gradients") == ("native" if model is ImprovedSSM else None)
        assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
        assert len(list((out / "tensorboard").glob("events.*"))) == 1
        assert len(list((out / "checkpoints").iterdir())) >= 1
        rows = _rows(out)
        assert rows[-1]["timesteps"] > 0

        policy = ssm_fast.load_policy(out / "policy.safetensors")
        assert type(policy.model) is model
        assert (policy.action_low is None) == (env_id == "CartPole-v1")
        report = json.loads((out / "evaluation.json").read_text())
        want = evaluate(policy, env_id, 10, report["seed"])
        assert report["returns"] == want.returns.tolist()
        assert report["timesteps"] == rows[-1]["timesteps"]

        text = capsys.readouterr().out
        returns = sorted(want.returns)
        line = (
            f"deterministic evaluation of 10 episodes of {env_id}: "
            f"return {want.mean:.1f} +- {want.std:.1f} (min {returns[0]:.1f}, "
            f"median {(returns[4] + returns[5]) / 2:.1f}, max {returns[-1]:.1f})\n"
        )
        assert text.endswith(line)
        assert cli.main(["evaluate", "out"]) == 0
        assert capsys.readouterr().out.startswith(line)

    def test_meta_rl(self, capsys: pytest.CaptureFixture[str]) -> None:
        hyphens = [word.replace("_", "-") if word.startswith("--") else word for word in META]
        rates = ["--inner-lr", "0.5", "--lr", "2e-3", "--inner_steps", "2", "--seed", "3"]
        assert cli.main([*hyphens, *rates, "--epochs", "3", "--out", "out"]) == 0
        config = json.loads(Path("out/config.json").read_text())
        wanted = {"env": FAMILY, "outer_lr": 2e-3, "inner_lr": 0.5, "epochs": 3, "inner_steps": 2}
        assert {name: config[name] for name in wanted} == wanted
        rows = _rows("out")
        assert [row["iteration"] for row in rows] == [1, 2, 3]
        assert "test_return_3" in rows[1]
        assert Path("out/curve.png").read_bytes().startswith(b"\x89PNG")

        report = json.loads(Path("out/evaluation.json").read_text())
        family = get_family(FAMILY)
        env = Environment(FAMILY, 6)
        model = ImprovedSSM.load("out/policy.safetensors")
        settings = {"inner_lr": 0.5, "tasks_per_epoch": 2, "num_steps": 12}
        torch.manual_seed(3)
        trainer = MetaRLTrainer(model, **settings)
        for what, tasks in (
            ("test_tasks", family.test_tasks),
            ("out_of_range_tasks", family.out_of_range_tasks),
        ):
            found = report[what]
            assert [row["gradient_steps"] for row in found] == [0, 1, 2, 3]
            assert [len(row["tasks"]) for row in found] == [len(tasks)] * 4
            returns = trainer.evaluate(env, tasks, 0, seed=report["seed"])
            # other draws of the same policies
            assert found[0]["mean"] == pytest.approx(returns.mean(), rel=0.1)
        text = capsys.readouterr().out
        assert cli.main(["evaluate", "out"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[: len(lines) // 2] == text.splitlines()[-len(lines) // 2 :]
        titles = [line.split()[0] for line in lines if line.endswith(FAMILY)]
        assert titles == ["stochastic"] * 2 + ["deterministic"] * 2
        for option, value in (("--env", FAMILY), ("--episodes", "3")):
            assert cli.main(["evaluate", "out", option, value]) == 2
            assert f"{option} must not be given" in capsys.readouterr().err
        _, _, table = text.partition(f"stochastic return in 40 test tasks of {FAMILY}\n")
        cells = [re.findall(r"[\d.]+", line) for line in table.splitlines()]
        for row in report["test_tasks"]:
            figures = f"{row['mean']:.1f}", f"{row['std_over_tasks']:.1f}"
            assert [str(row["gradient_steps"]), *figures] in cells

    def test_meta_rl_whose_evaluation_breaks_down(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """What was trained is kept, and what is known is told."""
        whole = MetaRLTrainer.evaluate

        def breaks(self: MetaRLTrainer, env: Any, tasks: Any, *rest: Any) -> Any:
            returns = whole(self, env, tasks, *rest)
            if len(tasks) == 40:
                returns[2:, 7] = np.nan
                returns[3:] = np.nan
            return returns

        monkeypatch.setattr(MetaRLTrainer, "evaluate", breaks)
        assert cli.main([*META, "--epochs", "1", "--out", "out"]) == 0
        rows = json.loads(Path("out/evaluation.json").read_text())["test_tasks"]
        assert rows[1]["tasks"].count(None) == 0
        assert [i for i, x in enumerate(rows[2]["tasks"]) if x is None] == [7]
        assert rows[2]["mean"] == pytest.approx(np.mean([x for x in rows[2]["tasks"] if x]))
        assert rows[3]["mean"] is None
        assert "tasks 0, 1, 2" in capsys.readouterr().out

    def test_looking_at_a_run_changes_nothing(self) -> None:
        assert cli.main([*META, "--epochs", "1", "--out", "out"]) == 0
        Path("out/checkpoints/.unfinished-1").mkdir()  # as of a run that is training
        before = {path: path.stat().st_mtime_ns for path in sorted(Path("out").rglob("*"))}
        assert cli.main(["evaluate", "out", "--no-deterministic"]) == 0
        assert cli.main(["adapt", "out", "--method", "gradient", "--episodes", "2"]) == 0
        assert {path: path.stat().st_mtime_ns for path in sorted(Path("out").rglob("*"))} == before
        Path("copy").mkdir()
        Path("copy/policy.safetensors").write_bytes(Path("out/policy.safetensors").read_bytes())
        assert cli.main(["evaluate", "copy", "--env", FAMILY, "--episodes", "1"]) == 0
        assert [path.name for path in Path("copy").iterdir()] == ["policy.safetensors"]

    def test_meta_rl_of_a_family_without_tasks_out_of_range(self) -> None:
        args = [*META, "--env", "ssm_fast/HalfCheetahDir-v0", "--epochs", "1", "--out", "out"]
        assert cli.main(args) == 0
        report = json.loads(Path("out/evaluation.json").read_text())
        assert [len(row["tasks"]) for row in report["test_tasks"]] == [2] * 4
        assert "out_of_range_tasks" not in report

    def test_meta_rl_of_trials(self, capsys: pytest.CaptureFixture[str]) -> None:
        trials = ["--inner_steps", "0", "--trial_episodes", "2", "--epochs", "1", "--out", "out"]
        assert cli.main([*META, *trials]) == 0
        assert ImprovedSSM.load("out/policy.safetensors").input_dim == 4 + 2 + 2
        report = json.loads(Path("out/evaluation.json").read_text())
        assert [len(row["mean_of_episodes"]) for row in report["test_tasks"]] == [2]
        line = capsys.readouterr().out.splitlines()[-1]
        assert cli.main(["evaluate", "out", "--no-deterministic"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == line
        for command in ("evaluate", "adapt"):
            assert cli.main([command, "out/policy.safetensors"]) == 2
            text = "plays trials of 2 episodes: evaluate its run folder instead"
            assert text in capsys.readouterr().err

    def test_evaluation_has_seeds_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seeds: list[int] = []
        reset = Environment.reset

        def record(self: Environment, seed: Any = None, **options: Any) -> Any:
            seeds.append(seed)
            return reset(self, seed, **options)

        monkeypatch.setattr(Environment, "reset", record)
        assert cli.main(REINFORCE) == 0
        assert cli.main([*PPO, "--steps", "160"]) == 0
        evaluations = [seed for seed in seeds if seed >= 2**31]
        assert evaluations == [EVALUATION_SEED] * 2
        assert len(seeds) > 4
        assert max(set(seeds) - set(evaluations)) + 1000 < EVALUATION_SEED

    def test_default_folder_and_a_second_run(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*REINFORCE, "--seed", "1"]) == 0
        assert Path("runs/policy_gradient-CartPole-v1-seed1/policy.safetensors").exists()
        before = _rows("runs/policy_gradient-CartPole-v1-seed1")
        capsys.readouterr()
        assert cli.main([*REINFORCE, "--seed", "1"]) == 2
        assert "holds a run already" in capsys.readouterr().err
        assert _rows("runs/policy_gradient-CartPole-v1-seed1") == before

    def test_limits(self) -> None:
        assert cli.main([*REINFORCE, "--episodes", "10", "--out", "a"]) == 0
        assert [row["episodes"] for row in _rows("a")] == [4, 4, 2]
        assert cli.main([*REINFORCE, "--episodes", "400", "--steps", "150", "--out", "b"]) == 0
        rows = _rows("b")
        assert rows[-2]["timesteps"] < 150 <= rows[-1]["timesteps"]
        # Pendulum's episodes have 200 steps: 2 environments end one each in every fifth rollout
        assert cli.main([*PPO, "--episodes", "4", "--out", "c"]) == 0
        assert [row["episodes"] for row in _rows("c")] == [0, 0, 0, 0, 2, 0, 0, 0, 0, 2]

    def test_episodes_of_ppo_across_resets(self) -> None:
        # an interval is 3 iterations of 40 steps: 5 episodes of 23 steps a row, and 5 steps lost
        gymnasium.register(
            "Short-v0",
            entry_point="gymnasium.envs.classic_control:PendulumEnv",
            max_episode_steps=23,
        )
        try:
            args = [*PPO, "--env", "Short-v0", "--checkpoint_interval", "1"]
            assert cli.main([*args, "--episodes", "29", "--out", "out"]) == 0
        finally:
            del gymnasium.registry["Short-v0"]
        rows = _rows("out")
        ended = np.cumsum([row["episodes"] for row in rows])
        assert ended[-1] >= 29
        assert (ended[:-1] < 29).all()
        # as if the warm-up, which is as long as a rollout, were the first of the rollouts
        assert rows[-1]["learning_rate"] == pytest.approx(2e-4 * 2 / (len(rows) + 1))

    def test_policy_is_the_newest_where_episodes_end_a_run_early(self) -> None:
        args = ["train", "--env", "CartPole-v1", "--batch_size", "2", "--num_steps", "40"]
        assert cli.main([*args, "--episodes", "6", "--out", "out"]) == 0
        rows = _rows("out")
        ended = np.cumsum([row["episodes"] for row in rows])
        assert ended[-1] >= 6
        assert (ended[:-1] < 6).all()
        assert Path("out/policy.safetensors").exists()
        assert cli.main(["evaluate", "out", "--episodes", "2"]) == 0

    def test_progress_lines(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
        assert cli.main(REINFORCE) == 0
        lines = capsys.readouterr().err.splitlines()
        assert lines[:2] == ["4 steps so far", "8 steps so far"]
        lines = [line for line in lines if not line.endswith(" so far")]
        assert [line.split(",")[0] for line in lines] == [f"{n} of 12 episodes" for n in (4, 8, 12)]
        assert re.fullmatch(r".* return \d+\.\d, [\d,]+ steps/s", lines[0])

    def test_progress_before_the_first_episode_ends(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
        assert cli.main([*PPO, "--episodes", "1"]) == 0
        assert "0 of 1 episodes, no episode yet, " in capsys.readouterr().err

    def test_progress_bar(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "120")
        assert cli.main(REINFORCE) == 0
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
        assert "━" in plain
        assert "12/12 episodes" in plain


def test_options_of_the_modes() -> None:
    """The arguments of the models and trainers, each an option of its mode."""
    sizes = {"state_dim", "hidden_dim"}
    assert {mode: set(names) for mode, names in MODEL_OPTIONS.items()} == {
        "policy_gradient": sizes,
        "improved": {*sizes, "num_layers", "log_std_init", "critic_dim"},
        "meta_rl": {*sizes, "num_layers", "log_std_init"},
    }
    shared = {"gamma", "max_grad_norm", "anneal_lr", "checkpoint_interval", "device"}
    ppo = {"gae_lambda", "clip_epsilon", "num_steps"}
    inner = {"inner_lr", "inner_steps", "first_order", "learn_inner_lr"}
    outer = {"outer_lr", "outer_epochs", "tasks_per_epoch", "tasks_per_minibatch"}
    assert {mode: set(names) for mode, names in TRAINER_OPTIONS.items()} == {
        "policy_gradient": {*shared, "learning_rate", "entropy_coef", "recurrent_lr_scale"},
        "improved": {
            *(*shared, *ppo, "learning_rate", "entropy_coef", "value_coef", "ppo_epochs"),
            *("mini_batch_size", "sequence_length", "target_kl", "desired_kl"),
            *("recurrent_lr_scale", "staggered_resets"),
        },
        "meta_rl": {*shared, *ppo, *inner, *outer, "evaluation_interval"},
    }


def test_a_run_keeps_the_defaults_it_was_started_with() -> None:
    assert cli.main([*META, "--epochs", "1", "--out", "out"]) == 0
    config = json.loads(Path("out/config.json").read_text())
    trainer = MetaRLTrainer(ImprovedSSM(4, 2, discrete=True))
    names = ("inner_lr", "inner_steps", "outer_lr", "gamma", "learn_inner_lr", "clip_epsilon")
    assert {name: config[name] for name in names} == {
        name: getattr(trainer, name) for name in names
    }
    assert None not in config.values()


@pytest.mark.filterwarnings("default:other programs are at work")
class TestBench:
    QUICK = ("bench", "--quick", "--seconds", "0.01", "--threads", "1", "--ops", "output_norm")

    @pytest.mark.parametrize(("threads", "hint"), [(1, False), (3, True)])
    def test_a_busy_machine(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        threads: int,
        hint: bool,
    ) -> None:
        monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 9.0, 9.0))
        monkeypatch.setattr(os, "cpu_count", lambda: 3)
        monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        assert cli.main([*self.QUICK]) == 0
        printed = capsys.readouterr().err
        assert "warning: other programs are at work here (load 9.0)" in printed
        assert ("--threads 2 leaves them a core" in printed) == hint

    def test_measures_and_compares(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*self.QUICK]) == 0
        contests = json.loads(Path("bench/bench.json").read_text())["contests"]
        assert [contest["name"] for contest in contests] == [
            "output_norm B8 T256 N64, forward",
            "output_norm B8 T256 N64, with gradients",
        ]
        assert "| output_norm B8 T256 N64, forward |" in Path("bench/bench.md").read_text()
        assert Path("bench/bench.png").stat().st_size > 10_000
        again = [*self.QUICK, "--compare", "bench/bench.json", "--tolerance", "99", "--out", "now"]
        assert cli.main(again) == 0
        assert "2 contests of bench/bench.json: 0 slower" in capsys.readouterr().out

    def test_says_what_has_become_slower(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*self.QUICK, "--out", "old"]) == 0
        path = Path("old/bench.json")
        saved = json.loads(path.read_text())
        for contest in saved["contests"]:
            contest["milliseconds"]["output_norm"] /= 1e3
        path.write_text(json.dumps(saved))
        assert cli.main([*self.QUICK, "--compare", str(path)]) == 1
        assert "slower: output_norm B8 T256 N64, forward," in capsys.readouterr().out
        saved["machine"] |= {"processor": "another", "threads": 7}
        path.write_text(json.dumps(saved))
        assert cli.main([*self.QUICK, "--compare", str(path)]) == 1
        assert "differs in processor (another, now" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            (["--seconds", "0"], "--seconds must be"),
            (["--threads", "0"], "--threads must be at least 1"),
            (["--compare", "missing.json"], "missing.json"),
            (["--compare", "bench/bench.json"], "--out would overwrite bench/bench.json"),
            (["--device", "cuda"], "--device: this torch sees no GPU"),
        ],
    )
    def test_mistakes(
        self,
        options: list[str],
        text: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert cli.main([*self.QUICK, *options]) == 2
        assert text in capsys.readouterr().err


class TestPresets:
    @pytest.mark.parametrize("name", preset_names())
    def test_is_complete(self, name: str) -> None:
        options = load_preset(name)
        settings = settings_of(Train(preset=name), Path("out"))
        assert {"mode", "env"} < set(options) <= {field.name for field in fields(Train)}
        assert settings == settings_of(Train(**options), Path("out"))
        assert options["env"] in gymnasium.registry
        small = settings | {"batch_size": 2, "tasks_per_epoch": 2}
        with make_environment(small) as env:
            make_trainer(small, env)

    def test_trains(self) -> None:
        command = ["train", "--preset", "cartpole-family", *META[5:], "--epochs", "1"]
        assert cli.main(command) == 0
        config = json.loads(Path("runs/cartpole-family-seed0/config.json").read_text())
        assert (config["mode"], config["env"], config["epochs"]) == ("meta_rl", FAMILY, 1)

    def test_what_is_given_goes_before(self) -> None:
        preset = load_preset("halfcheetah-v5")
        assert "lr" in preset
        changed = settings_of(Train(preset="halfcheetah-v5", lr=0.5, episodes=3), Path("out"))
        assert (changed["learning_rate"], changed["episodes"], changed["steps"]) == (0.5, 3, None)
        assert changed["gamma"] == preset["gamma"]

        family = Train(preset="cartpole-family", env="CartPole-v1")
        assert settings_of(family, Path("out"))["env"] == FAMILY

    def test_mistakes(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["train", "--preset", "cheetah"]) == 2
        assert "--preset must be one of ['ant-v5', 'cartpole-family'," in capsys.readouterr().err
        assert cli.main(["train", "--preset", "halfcheetah-v5", "--mode", "meta_rl"]) == 2
        assert "--preset halfcheetah-v5 is for --mode improved" in capsys.readouterr().err

    def test_in_another_environment(self, capsys: pytest.CaptureFixture[str]) -> None:
        options = Train(preset="halfcheetah-v5", env="Swimmer-v5", steps=1000)
        settings = settings_of(options, Path("out"))
        said = "settings of HalfCheetah-v5, which were not measured in Swimmer-v5\n"
        assert capsys.readouterr().out == said
        assert (settings["env"], settings["gamma"], settings["steps"]) == ("Swimmer-v5", 0.98, 1000)
        assert default_folder(options) == Path("runs/halfcheetah-v5-Swimmer-v5-seed0")
        own = Train(preset="halfcheetah-v5", env="HalfCheetah-v5")
        assert default_folder(own) == Path("runs/halfcheetah-v5-seed0")
        around = Train(preset="cartpole-family", env="CartPole-v1")
        assert default_folder(around) == Path("runs/cartpole-family-seed0")


class TestAdapt:
    @pytest.mark.parametrize("method", ["standard", "hybrid", "test_time"])
    def test_writes_the_adapted_policy(
        self, method: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        torch.manual_seed(0)
        ImprovedSSM(4, 2, 4, 8, 1, discrete=True).save("policy.safetensors")
        before = Path("policy.safetensors").read_bytes()
        args = ["adapt", "policy.safetensors", "--env", "ssm_fast/CartPoleFamily-v0"]
        args += ["--task", "3", "--method", method, "--episodes", "6", "--rows", "2"]
        args += ["--lr", "1e-2", "--adapt-every", "20", "--max_kl", "0.1", "--seed", "5"]
        texts = []
        for out in ("one.safetensors", "two.safetensors"):
            assert cli.main([*args, "--out", out]) == 0
            texts.append(capsys.readouterr().out.replace(out, ""))
        assert texts[0] == texts[1]
        lines = texts[0].splitlines()
        assert lines[0].split() == ["episode", "without", "adapting"]
        rows = [[float(x) for x in line.split()[1:]] for line in lines[1:7]]
        assert [float(x) for x in lines[7].split()[1:]] == pytest.approx(np.mean(rows, 0), abs=0.06)
        assert re.fullmatch(r" *deterministic +\d+\.\d +\d+\.\d", lines[8])
        assert lines[9].startswith(f"adapted to ssm_fast/CartPoleFamily-v0 by {method}, seed 5")
        assert Path("policy.safetensors").read_bytes() == before
        old, new = load_model("policy.safetensors"), load_model("one.safetensors")
        assert not torch.equal(old.state_dict()["actor.weight"], new.state_dict()["actor.weight"])
        family = get_family("ssm_fast/CartPoleFamily-v0")
        task = json.loads(read_metadata("one.safetensors")["task"])
        assert family.task_type(**task) == family.test_tasks[3]
        play = ["evaluate", "one.safetensors", "--episodes", "2"]
        for options, task in (
            ([], family.test_tasks[3]),
            (["--task", "5", "--split", "train"], family.train_tasks[5]),
        ):
            assert cli.main([*play, *options]) == 0
            lines = capsys.readouterr().out.splitlines()
            assert lines[0] == "in the task"
            for name, value in task.as_dict().items():
                assert any(line.split()[1::2] == [name, f"{value:.4g}"] for line in lines)
            result = evaluate(
                ssm_fast.load_policy("one.safetensors"), FAMILY, 2, EVALUATION_SEED, task=task
            )
            assert f"return {result.mean:.1f} +- {result.std:.1f}" in lines[-1]
        again = ["adapt", "one.safetensors", "--method", "standard", "--episodes", "2"]
        again += ["--adapt-every", "5"]
        assert cli.main([*again, "--out", "three.safetensors"]) == 0
        assert capsys.readouterr().out.startswith("in the task\n")
        adapted_before = read_metadata("one.safetensors")
        assert adapted_before["adapted"] == method
        assert read_metadata("three.safetensors") == adapted_before | {"adapted": "standard"}
        assert cli.main([*play, "--video", "one.mp4"]) == 0
        assert re.fullmatch(
            r"one\.mp4: return \d+\.0 after \d+ steps", capsys.readouterr().out.splitlines()[-1]
        )
        assert Path("one.mp4").stat().st_size > 1000
        assert cli.main([*play, "--video", "nowhere/one.mp4"]) == 2
        assert "--video: there is no folder nowhere" in capsys.readouterr().err
        assert cli.main([*play, "--video", "one.gif"]) == 2
        assert "--video: a film must be an .mp4 file" in capsys.readouterr().err
        for bad in ('{"length": "long"}', "[" * 100_000, f'{{"length": 1{"0" * 400}}}'):
            save_model("other.safetensors", new, {"env_id": FAMILY, "task": bad})
            assert cli.main(["evaluate", "other.safetensors"]) == 2
            assert "names a task that is none of" in capsys.readouterr().err

    @pytest.mark.filterwarnings("default:the policy was trained in")
    def test_any_environment(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*PPO, "--steps", "160", "--out", "run"]) == 0
        for end in ("", " (another one was there before)"):
            capsys.readouterr()
            assert cli.main(["adapt", "run", "--episodes", "1"]) == 0
            last_line = capsys.readouterr().out.splitlines()[-1]
            assert last_line == (
                "adapted to Pendulum-v1 by test_time, seed 0; policy adapted.safetensors" + end
            )
        assert ssm_fast.load_policy("adapted.safetensors").action_low is not None

    def test_the_defaults_adapt(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Without an option, a policy plays what it has not learnt, and changes on the way."""
        torch.manual_seed(0)
        model = ImprovedSSM(4, 2, 4, 8, 1, discrete=True)
        save_model("policy.safetensors", model, {"env_id": "CartPole-v1"})
        assert cli.main(["adapt", "policy.safetensors", "--max_episode_steps", "40"]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        lines = captured.out.splitlines()
        assert lines[0] == f"test task 0 of {FAMILY}; --task chooses another one"
        rows = [line.split()[1:] for line in lines if re.match(r" +\d ", line)]
        assert any(without != adapting for without, adapting in rows[:-1])
        task = json.loads(read_metadata("adapted.safetensors")["task"])
        family = get_family(FAMILY)
        assert family.task_type(**task) == family.test_tasks[0]

    @pytest.mark.filterwarnings("default:the policy was trained in")
    def test_in_the_environment_that_it_was_trained_in(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = ImprovedSSM(4, 2, 4, 8, 1, discrete=True)
        save_model("policy.safetensors", model, {"env_id": "CartPole-v1"})
        args = ["adapt", "policy.safetensors", "--episodes", "1", "--env", "CartPole-v1"]
        assert cli.main(args) == 0
        captured = capsys.readouterr()
        assert captured.err.startswith(
            "ssm-fast: warning: the policy was trained in CartPole-v1 itself"
        )
        assert "adapted to CartPole-v1 by test_time" in captured.out

    def test_a_file_that_holds_its_gradient_steps(self, capsys: pytest.CaptureFixture[str]) -> None:
        """A policy that was downloaded adapts, and what it adapted to adapts on."""
        start = [*META, "--epochs", "1", "--inner_lr", "3", "--num_steps", "60", "--out", "run"]
        assert cli.main(start) == 0
        shutil.move("run/policy.safetensors", "mine.safetensors")
        shutil.rmtree("run")
        play = ["evaluate", "mine.safetensors", "--task", "1", "--episodes", "1"]
        capsys.readouterr()
        assert cli.main(play) == 0
        command = "ssm-fast adapt mine.safetensors --task 1 --split test"
        assert capsys.readouterr().out.splitlines()[-1] == (
            f"this is before any gradient step; after some: {command}"
        )
        assert cli.main([*shlex.split(command)[1:], "--out", "one.safetensors"]) == 0
        assert "by gradient, seed 0" in capsys.readouterr().out
        assert cli.main(["adapt", "one.safetensors", "--out", "two.safetensors"]) == 0
        assert "by gradient, seed 0" in capsys.readouterr().out
        weights = [load_model(f"{n}.safetensors").state_dict() for n in ("mine", "one", "two")]
        for before, after in pairwise(weights):
            assert not torch.equal(before["actor.weight"], after["actor.weight"])
        rates = [load_inner_rates(f"{n}.safetensors") for n in ("mine", "two")]
        torch.testing.assert_close(*rates, rtol=0, atol=0)
        assert cli.main(["evaluate", "two.safetensors", "--episodes", "1"]) == 0
        assert "gradient step" not in capsys.readouterr().out

    def test_a_file_without_gradient_steps(self, capsys: pytest.CaptureFixture[str]) -> None:
        model = ImprovedSSM(4, 2, 4, 8, 1, discrete=True)
        save_model("old.safetensors", model, {"env_id": FAMILY, "critic": "untrained"})
        assert cli.main(["evaluate", "old.safetensors", "--episodes", "1"]) == 0
        assert "gradient" not in capsys.readouterr().out
        assert cli.main(["adapt", "old.safetensors", "--method", "gradient"]) == 2
        error = capsys.readouterr().err
        assert "--method gradient: old.safetensors must hold inner rates" in error
        assert error.count("\n") == 1

    def test_where_it_was_trained_is_said_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        model = ImprovedSSM(4, 2, 4, 8, 1, discrete=True)
        save_model("policy.safetensors", model, {"env_id": "Acrobot-v1"})
        args = ["adapt", "policy.safetensors", "--env", "CartPole-v1", "--episodes", "1"]
        assert cli.main(args) == 0
        assert capsys.readouterr().out.count("the policy was trained in Acrobot-v1") == 1

    def test_a_task_of_the_family_around_an_environment(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        ImprovedSSM(4, 2, 4, 8, 1, discrete=True).save("policy.safetensors")
        args = ["adapt", "policy.safetensors", "--env", "CartPole-v1", "--episodes", "1"]
        assert cli.main([*args, "--task", "0"]) == 0
        assert f"adapted to {FAMILY} by test_time" in capsys.readouterr().out

    @pytest.mark.filterwarnings("default:the critic of")
    @pytest.mark.parametrize("options", [["--task", "1"], ["--env", "CartPole-v1"]])
    def test_by_the_gradient_steps_of_a_run(
        self, options: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        start = [*META, "--epochs", "1", "--inner_lr", "3", "--num_steps", "60", "--out", "run"]
        assert cli.main(start) == 0
        before = Path("run/policy.safetensors").read_bytes()
        assert read_metadata("run/policy.safetensors")["critic"] == "untrained"
        capsys.readouterr()
        args = ["adapt", "run", "--seed", "5", *options]  # the method that such a run is for
        texts = []
        for out in ("one.safetensors", "two.safetensors"):
            assert cli.main([*args, "--out", out]) == 0
            captured = capsys.readouterr()
            assert captured.err == ""
            texts.append(captured.out.replace(out, ""))
        assert texts[0] == texts[1]
        rows = [[float(x) for x in line.split()[1:]] for line in texts[0].splitlines()[1:5]]
        assert rows[0][0] == rows[0][1]  # nothing is learnt before the first round
        assert any(without != adapting for without, adapting in rows[1:])
        assert "by gradient, seed 5" in texts[0]
        assert Path("run/policy.safetensors").read_bytes() == before
        old, new = (load_model(path) for path in ("run/policy.safetensors", "one.safetensors"))
        changed = [
            name
            for name, w in old.state_dict().items()
            if not torch.equal(w, new.state_dict()[name])
        ]
        assert "actor.weight" in changed
        assert "critic.weight" not in changed
        assert read_metadata("one.safetensors")["critic"] == "untrained"
        assert (
            cli.main(["adapt", "run", "--method", "test_time", "--task", "0", "--episodes", "1"])
            == 0
        )
        assert "warning: the critic of run/policy.safetensors was not" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("run", "options", "text"),
        [
            ([], ["--lr", "0.1"], "--lr is not an option of --method gradient"),
            ([], ["--episodes", "1"], "--episodes must be at least 2"),
            (["--inner_steps", "0"], [], "run/policy.safetensors must hold inner rates"),
            (["--trial_episodes", "2"], [], "plays trials of 2 episodes"),
            (PPO[1:], [], "--method gradient: run/policy.safetensors must hold inner rates"),
        ],
    )
    def test_gradient_steps_that_a_run_does_not_have(
        self, run: list[str], options: list[str], text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        start = (
            [PPO[0], *run, "--steps", "160"] if run == PPO[1:] else [*META, *run, "--epochs", "1"]
        )
        assert cli.main([*start, "--out", "run"]) == 0
        capsys.readouterr()
        assert cli.main(["adapt", "run", "--method", "gradient", *options]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1

    @pytest.mark.parametrize(
        ("out", "text"),
        [
            ("policy.safetensors", "--out must be another file than policy.safetensors"),
            ("nowhere/adapted.safetensors", "--out: there is no folder nowhere"),
            (".", "--out must be a file, . is a folder"),
        ],
    )
    def test_where_to_write(self, out: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
        ImprovedSSM(4, 2, 4, 8, 1, discrete=True).save("policy.safetensors")
        before = Path("policy.safetensors").read_bytes()
        args = ["adapt", "policy.safetensors", "--env", "CartPole-v1", "--out", out]
        assert cli.main(args) == 2
        assert text in capsys.readouterr().err
        assert Path("policy.safetensors").read_bytes() == before

    def test_nan(self, capsys: pytest.CaptureFixture[str]) -> None:
        ImprovedSSM(4, 2, 4, 8, 1, discrete=True).save("policy.safetensors")
        args = ["adapt", "policy.safetensors", "--env", "Breaks-v0", "--episodes", "20"]
        assert cli.main([*args, "--max_episode_steps", "30"]) == 1
        assert capsys.readouterr().err.startswith("ssm-fast: adaptation stopped: Breaks-v0: ")
        assert not Path("adapted.safetensors").exists()

    @pytest.mark.parametrize(
        ("args", "text"),
        [
            (["--env", "Pendulum-v1", "--task", "1"], "'Pendulum-v1' is no task family"),
            (["--env", "ssm_fast/CartPoleFamily-v0", "--task", "40"], "--task must lie in [0, 40)"),
            (
                ["--env", "Pendulum-v1"],
                "Pendulum-v1 has 3 observations and 1 continuous action, the model is for 4",
            ),
            (["--env", "Endless-v0"], "--max_episode_steps is needed"),
            (["--env", "Nope-v0"], "'Nope-v0' cannot be made"),
            (["--env", "CartPole-v1", "--episodes", "0"], "--episodes must be at least 1"),
            (["--env", "CartPole-v1", "--rows", "0"], "--rows must be at least 1"),
            (["--env", "CartPole-v1", "--lr", "0"], "--lr must be finite"),
            (["--env", "CartPole-v1", "--seed", "-1"], "--seed must be at least 0"),
            (
                ["--env", "CartPole-v1", "--experience_weight", "0.3"],
                "is not an option of --method",
            ),
            (
                ["--env", "CartPole-v1", "--method", "hybrid", "--experience_weight", "2"],
                "experience_weight must be finite and in [0, 1], got 2.0",
            ),
            ([], "does not say which environment it is for: give --env"),
        ],
    )
    def test_a_mistake_is_one_sentence(
        self, args: list[str], text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        ImprovedSSM(4, 2, 4, 8, 1, discrete=True).save("policy.safetensors")
        assert cli.main(["adapt", "policy.safetensors", *args]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1

    def test_another_kind_of_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        StateSpaceModel().save("policy.safetensors")
        assert cli.main(["adapt", "policy.safetensors", "--env", "CartPole-v1"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("ssm-fast: policy.safetensors is of --mode policy_gradient, whose")


class TestErrors:
    @pytest.mark.parametrize("mode", [REINFORCE, [*PPO, "--steps", "80"], META])
    def test_without_a_gpu(
        self,
        mode: list[str],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert cli.main([*mode, "--device", "cuda", "--out", "out"]) == 2
        assert capsys.readouterr().err == "ssm-fast: --device: this torch sees no GPU\n"
        assert not Path("out").exists()

    @pytest.mark.parametrize(
        ("args", "text"),
        [
            (["train", "--env", "Nope-v0"], "'Nope-v0' cannot be made"),
            (["train", "--env", "FrozenLake-v1"], "observation space must be a Box"),
            ([*REINFORCE, "--env", "Pendulum-v1"], "needs discrete actions; Pendulum-v1 has Box"),
            ([*REINFORCE, "--lr", "-1"], "--lr must be finite and positive, got -1.0"),
            ([*REINFORCE, "--lr", "nan"], "--lr must be finite"),
            ([*REINFORCE, "--episodes", "0"], "--episodes must be at least 1, got 0"),
            ([*REINFORCE, "--batch_size", "0"], "batch_size must be at least 1, got 0"),
            ([*REINFORCE, "--state_dim", "0"], "state_dim"),
            ([*REINFORCE, "--seed", "-1"], "--seed must be at least 0, got -1"),
            ([*REINFORCE, "--seed", "9" * 20], f"--seed must be at most {2**63 - 1}, got 999"),
            ([*REINFORCE, "--threads", "9" * 20], "--threads must be at most 1024"),
            ([*REINFORCE, "--state_dim", "10000000"], "the model of this size cannot be made"),
            ([*REINFORCE, "--threads", "0"], "--threads must be at least 1, got 0"),
            ([*REINFORCE, "--clip_epsilon", "0.1"], "--clip_epsilon is not an option of --mode"),
            ([*PPO, "--steps", "0"], "--steps must be at least 1, got 0"),
            ([*PPO, "--sequence_length", "7"], "sequence_length"),
            ([*PPO, "--env", "Endless-v0", "--episodes", "3"], "--steps is needed"),
        ],
    )
    def test_a_mistake_in_training_is_one_sentence(
        self, args: list[str], text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main([*args, "--out", "out"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("ssm-fast: ")
        assert text in error
        assert error.count("\n") == 1
        assert not Path("out/config.json").exists(), "the folder must stay free"

    @pytest.mark.parametrize("command", ["train", "evaluate", "adapt", "video"])
    @pytest.mark.parametrize(
        ("entry_point", "text"),
        [
            ("own_env:Typo", "has no attribute 'Typo'"),
            ("no_such_module:Typo", "No module named 'no_such_module'"),
            ("needs_box2d:Lander", "Box2D is not installed"),
        ],
    )
    def test_an_environment_that_cannot_be_made(
        self,
        command: str,
        entry_point: str,
        text: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """A missing extra, a mistyped class and a missing module."""
        (tmp_path / "own_env.py").touch()
        (tmp_path / "needs_box2d.py").write_text(
            "import gymnasium\n"
            "raise gymnasium.error.DependencyNotInstalled('Box2D is not installed')\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        gymnasium.register("Bad-v0", entry_point=entry_point)
        ImprovedSSM(4, 2, 4, 8, 1, discrete=True).save("policy.safetensors")
        args = [command, *(["--out", "out"] if command == "train" else ["policy.safetensors"])]
        if command == "video":
            args = ["evaluate", "policy.safetensors", "--video", "film.mp4"]
        try:
            assert cli.main([*args, "--env", "Bad-v0"]) == 2
        finally:
            del gymnasium.registry["Bad-v0"]
            sys.modules.pop("own_env", None)
        error = capsys.readouterr().err
        assert error.startswith("ssm-fast: --env 'Bad-v0' cannot be made: ")
        assert text in error
        assert error.count("\n") == 1
        assert not Path("out").exists()

    def test_an_environment_of_a_file_that_cannot_be_made(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        StateSpaceModel().save("policy.safetensors", {"env_id": "Nope-v0"})
        assert cli.main(["evaluate", "policy.safetensors"]) == 2
        assert capsys.readouterr().err.startswith("ssm-fast: the environment 'Nope-v0' cannot be")

    def test_a_crash_before_anything_is_learnt_leaves_the_folder_free(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def crash(*_: Any) -> Any:
            raise KeyError("speed")

        monkeypatch.setattr(Breaks, "step", crash)
        with pytest.raises(KeyError, match="speed"):
            cli.main([*REINFORCE, "--env", "Breaks-v0", "--out", "out"])
        assert not Path("out/config.json").exists()

    @pytest.mark.parametrize("option", [["--lr", "abc"], ["--no-such"], ["--mode", "meta"]])
    def test_a_mistake_in_the_command_line(
        self, option: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as stopped:
            cli.main([*REINFORCE, *option])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert option[0] in error
        assert "None" not in error

    def test_of_code_of_ones_own(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "own.py").write_text(
            "import gymnasium\n"
            "from gymnasium.envs.classic_control import PendulumEnv\n"
            "class Own(PendulumEnv):\n"
            "    def step(self, action):\n"
            "        return [1, 2].index(3)\n"
            "gymnasium.register('Own-v0', Own, max_episode_steps=9)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        try:
            args = ["--env", "own:Own-v0", "--steps", "1e2", "--out", "out"]
            assert cli.main(["train", *args]) == 2
        finally:
            gymnasium.registry.pop("Own-v0", None)
            sys.modules.pop("own", None)
        assert capsys.readouterr().err.splitlines()[-1] == (
            "ssm-fast: 3 is not in list; in environment 0 of own:Own-v0, at step 1 of its episode "
            f"(ValueError at {tmp_path / 'own.py'}:5, in step)"
        )

    def test_without_a_time_limit(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The evaluation of a policy that never fails has to end, too."""
        monkeypatch.setattr("ssm_fast.env_runner.evaluation.LONGEST_EVALUATION", 30)
        args = [*PPO, "--steps", "80", "--checkpoint_interval", "1", "--out", "out"]
        args[args.index("Pendulum-v1")] = "Endless-v0"
        assert cli.main(args) == 0
        assert "Endless-v0 has no time limit: the evaluation ends" in capsys.readouterr().out
        assert len(json.loads(Path("out/evaluation.json").read_text())["returns"]) == 10
        monkeypatch.setattr("ssm_fast.env_runner.evaluation.LONGEST_EVALUATION", 20)
        assert cli.main(["evaluate", "out"]) == 0
        assert "the evaluation ends episodes after 20 steps" in capsys.readouterr().out
        play = ["evaluate", "out", "--max-episode-steps", "20", "--episodes", "2"]
        assert cli.main(play) == 0
        assert "evaluation of 2 episodes of Endless-v0" in capsys.readouterr().out

    def test_an_unwritable_folder(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("file").write_text("")
        assert cli.main([*REINFORCE, "--out", "file/run"]) == 2
        assert "file/run cannot be written to" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("args", "text"),
        [
            (["missing.safetensors"], "'missing.safetensors': cannot be read"),
            (["garbage.safetensors"], "'garbage.safetensors': truncated, or not"),
            (["empty"], "empty is no run folder"),
            (["nowhere.safetensors"], "give --env"),
            (["nowhere.safetensors", "--env", "Acrobot-v1"], "the model is for 4 observations"),
            (["nowhere.safetensors", "--env", "Pendulum-v1"], "Pendulum-v1 has 3 observations"),
            (["nowhere.safetensors", "--env", "Nope-v0"], "'Nope-v0' cannot be made"),
            (["nowhere.safetensors", "--env", "CartPole-v1", "--episodes", "0"], "episodes"),
        ],
    )
    def test_a_mistake_in_evaluation_is_one_sentence(
        self, args: list[str], text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("garbage.safetensors").write_text("not a checkpoint")
        Path("empty").mkdir()
        StateSpaceModel().save("nowhere.safetensors")
        assert cli.main(["evaluate", *args]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1

    @pytest.mark.parametrize(
        ("env_id", "text"), [("LunarLander-v3", "Box2D"), ("Mistyped-v0", "'CartPoolEnv'")]
    )
    def test_an_environment_that_cannot_be_made_is_one_sentence(
        self,
        env_id: str,
        text: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setitem(sys.modules, "Box2D", None)  # an extra that is missing
        monkeypatch.delitem(sys.modules, "gymnasium.envs.box2d", raising=False)
        entry_point = "gymnasium.envs.classic_control:CartPoolEnv"
        gymnasium.register("Mistyped-v0", entry_point=entry_point)
        ImprovedSSM(8, 4, discrete=True).save("policy.safetensors")
        try:
            for args in (
                ["train", "--steps", "80", "--out", "out"],
                ["evaluate", "policy.safetensors"],
                ["evaluate", "policy.safetensors", "--video", "film.mp4"],
                ["adapt", "policy.safetensors", "--out", "adapted.safetensors"],
            ):
                assert cli.main([*args, "--env", env_id]) == 2
                error = capsys.readouterr().err
                assert error.startswith(f"ssm-fast: --env '{env_id}' cannot be made: ")
                assert text in error
                assert error.count("\n") == 1
        finally:
            del gymnasium.registry["Mistyped-v0"]
        assert not Path("out").exists()

    def test_nan_in_an_evaluation(self, capsys: pytest.CaptureFixture[str]) -> None:
        StateSpaceModel().save("policy.safetensors")
        args = ["evaluate", "policy.safetensors", "--env", "Breaks-v0", "--episodes", "1"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Breaks, "nan_at", 3)
            assert cli.main(args) == 1
        assert capsys.readouterr().err.startswith("ssm-fast: evaluation stopped: Breaks-v0: ")

    def test_a_file_cannot_make_an_environment_import_a_module(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "marked.py").write_text(
            "from pathlib import Path\nimport gymnasium\nPath('marker').touch()\n"
            "gymnasium.register('Marked-v0', "
            "entry_point='gymnasium.envs.classic_control:CartPoleEnv', max_episode_steps=9)\n"
        )
        env_id = "marked:Marked-v0"
        StateSpaceModel().save("policy.safetensors", {"env_id": env_id})
        assert cli.main([*REINFORCE, "--out", "out"]) == 0
        config = json.loads(Path("out/config.json").read_text())
        Path("out/config.json").write_text(json.dumps({**config, "env": env_id}))
        evaluate_it = ["evaluate", "policy.safetensors", "--episodes", "2"]
        resume_it = ["train", "--resume", "--episodes", "20", "--out", "out"]
        for args in (evaluate_it, resume_it):
            capsys.readouterr()
            assert cli.main(args) == 2
            assert "give --env if you trust it" in capsys.readouterr().err
            assert not Path("marker").exists()
        try:
            assert cli.main([*evaluate_it, "--env", env_id]) == 0
            assert Path("marker").exists()
            assert cli.main([*resume_it, "--env", env_id]) == 0
        finally:
            gymnasium.registry.pop("Marked-v0", None)

    def test_nan_keeps_the_last_checkpoint(self, capsys: pytest.CaptureFixture[str]) -> None:
        args = [*REINFORCE, "--env", "Breaks-v0", "--episodes", "400"]
        assert cli.main([*args, "--checkpoint_interval", "1", "--out", "out"]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.search(
            r"iteration \d+: Breaks-v0: environment \d .* non-finite observation", error
        )
        assert error.endswith("continue with: ssm-fast train --resume --out out")
        checkpoint = RunDirectory("out", resume=True).latest_checkpoint()
        assert checkpoint is not None
        assert checkpoint.iteration >= 1


# A suite in the background of a shell has SIGINT ignored, and its children inherit that.
MAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from ssm_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""


class TestResume:
    args = (
        *("train", "--mode", "policy_gradient", "--batch_size", "4", "--episodes", "160"),
        *("--lr", "1e-3", "--checkpoint_interval", "2"),
    )

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_equals_the_uninterrupted_run(
        self, number: signal.Signals, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main([*self.args, "--out", "whole"]) == 0
        process = subprocess.Popen(
            [sys.executable, "-c", MAIN, *self.args, "--out", "part"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        checkpoint = Path("part/checkpoints/iteration_00000008")
        deadline = time.monotonic() + 120.0
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(number)
        if number == signal.SIGTERM:
            process.send_signal(number)  # as some that wait for an end do
        _, error = process.communicate(timeout=60)
        assert not Path("part/evaluation.json").exists(), "the signal must come before the end"
        if number != signal.SIGKILL:
            assert process.returncode == 130
            assert error.splitlines()[-1] == (
                "ssm-fast: interrupted; the last checkpoint is intact, continue with: "
                "ssm-fast train --resume --out part"
            )
            assert "Traceback" not in error
        else:
            assert process.returncode == -signal.SIGKILL
        assert len(_rows("part")) < 40

        capsys.readouterr()
        assert cli.main(["train", "--resume", "--out", "part"]) == 0
        assert _rows("part") == _rows("whole")
        assert len(_rows("part")) == 40
        _assert_same_policy("part", "whole")
        assert Path("part/config.json").read_bytes() == Path("whole/config.json").read_bytes()
        reports = [json.loads(Path(x, "evaluation.json").read_text()) for x in ("part", "whole")]
        assert reports[0]["returns"] == reports[1]["returns"]

    @pytest.mark.parametrize(
        "limit", [["--steps", "800"], ["--env", "CartPole-v1", "--episodes", "50"]]
    )
    def test_ppo(self, limit: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        # episodes short enough for an interval of 3 iterations
        for env_id in ("Pendulum-v1", "CartPole-v1"):
            monkeypatch.setattr(gymnasium.registry[env_id], "max_episode_steps", 24)
        args = [*PPO, *limit, "--checkpoint_interval", "3"]
        assert cli.main([*args, "--out", "whole"]) == 0
        append = RunDirectory.append_row

        def interrupt(self: RunDirectory, row: Any) -> None:
            append(self, row)
            if row["iteration"] == 8:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(RunDirectory, "append_row", interrupt)
            assert cli.main([*args, "--out", "part"]) == 130
        assert Path("part/checkpoints/iteration_00000006").exists()
        assert cli.main([*args, "--out", "part", "--resume"]) == 0
        assert len(_rows("part")) > 8
        assert _rows("part") == _rows("whole")
        _assert_same_policy("part", "whole")

    def test_meta_rl(self, capsys: pytest.CaptureFixture[str]) -> None:
        constant = [*META, "--anneal_lr", "False"]
        assert cli.main([*constant, "--epochs", "3", "--out", "whole"]) == 0
        assert cli.main([*constant, "--epochs", "1", "--out", "part"]) == 0
        more = ["train", "--resume", "--env", "CartPole-v1", "--epochs", "3", "--out", "part"]
        assert cli.main(more) == 0
        _assert_same_policy("part", "whole")
        assert len(_rows("part")) == 3
        assert cli.main([*more, "--lr", "0.5"]) == 2
        assert "--outer_lr must be 0.001 as in the run in part, got 0.5" in capsys.readouterr().err

    def test_of_a_run_of_an_older_version(self) -> None:
        path = Path("out/config.json")
        args = [*PPO, "--episodes", "2", "--recurrent_lr_scale", "0.2", "--out", "out"]
        assert cli.main(args) == 0
        config = json.loads(path.read_text())
        config["memory_pace"] = config.pop("recurrent_lr_scale")
        path.write_text(json.dumps(config))
        assert cli.main(["train", "--resume", "--out", "out"]) == 0
        assert json.loads(path.read_text())["recurrent_lr_scale"] == 0.2

    def test_of_a_finished_run_evaluates_again(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*PPO, "--episodes", "2", "--out", "out"]) == 0
        line, rows = capsys.readouterr().out.splitlines()[-1], _rows("out")
        assert cli.main(["train", "--resume", "--out", "out"]) == 0
        out = capsys.readouterr().out
        assert out.splitlines()[-1] == line
        assert re.search(
            r"^nothing is left to train: \d+ of 2 episodes are done$", out, re.MULTILINE
        )
        assert _rows("out") == rows

    def test_with_more_episodes(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*REINFORCE, "--out", "out"]) == 0
        capsys.readouterr()
        assert cli.main(["train", "--resume", "--episodes", "20", "--out", "out"]) == 0
        first_line = capsys.readouterr().out.splitlines()[0]
        assert first_line.endswith("from here on the learning rate is that of a run of this length")
        assert sum(row["episodes"] for row in _rows("out")) == 20
        assert json.loads(Path("out/config.json").read_text())["episodes"] == 20

    def test_with_more_episodes_of_ppo(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*PPO, "--episodes", "1", "--out", "out"]) == 0  # in the midst of episodes
        for _ in range(2):
            capsys.readouterr()
            assert cli.main(["train", "--resume", "--episodes", "12", "--out", "out"]) == 0
            assert sum(row["episodes"] for row in _rows("out")) == 12
        assert "nothing is left to train: 12 of 12 episodes are done" in capsys.readouterr().out

    def test_with_the_other_limit(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*PPO, "--episodes", "2", "--out", "out"]) == 0
        assert list(Path("out/checkpoints").iterdir()), "saved where the episodes ended it"
        capsys.readouterr()
        assert cli.main(["train", "--resume", "--steps", "1000", "--out", "out"]) == 0
        assert json.loads(Path("out/evaluation.json").read_text())["timesteps"] >= 1000
        settings = json.loads(Path("out/config.json").read_text())
        assert (settings["episodes"], settings["steps"]) == (None, 1000)

    def test_two_limits(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*REINFORCE, "--steps", "100", "--out", "out"]) == 0
        assert "it ends after 12 episodes or 100 steps, whatever comes first" in (
            capsys.readouterr().out
        )
        assert cli.main(["train", "--resume", "--out", "out"]) == 0
        out = capsys.readouterr().out
        assert re.search(
            r"^nothing is left to train: \d+ of 100 steps are done$", out, re.MULTILINE
        )

    def test_before_the_first_checkpoint(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def interrupt(self: RunDirectory, row: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(RunDirectory, "append_row", interrupt)
        assert cli.main([*PPO, "--steps", "800", "--out", "out"]) == 130
        assert capsys.readouterr().err.splitlines()[-1] == (
            "ssm-fast: interrupted; there was no checkpoint yet: ssm-fast train --resume --out out "
            "starts afresh"
        )
        assert load_model("out/policy.safetensors", ImprovedSSM).input_dim == 3

    @pytest.mark.parametrize(
        "args", [[*PPO, "--steps", "480"], REINFORCE, [*META, "--epochs", "3"]]
    )
    def test_before_the_first_checkpoint_is_due(
        self,
        args: list[str],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        args = [*args, "--checkpoint_interval", "100"]
        assert cli.main([*args, "--out", "whole"]) == 0
        append = RunDirectory.append_row

        def interrupt(self: RunDirectory, row: Any) -> None:
            if row["iteration"] == 3:
                raise KeyboardInterrupt
            append(self, row)

        with monkeypatch.context() as patch:
            patch.setattr(RunDirectory, "append_row", interrupt)
            assert cli.main([*args, "--out", "part"]) == 130
        resume_it = ["train", "--resume", "--out", "part"]
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"ssm-fast: interrupted; the last checkpoint is intact, continue with: ssm-fast {' '.join(resume_it)}"
        )
        assert [p.name for p in Path("part/checkpoints").iterdir()] == ["iteration_00000002"]
        assert cli.main(resume_it) == 0
        assert _rows("part") == _rows("whole")
        _assert_same_policy("part", "whole")

    def test_in_a_folder_that_another_process_has(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*REINFORCE, "--out", "out"]) == 0
        config = Path("out/config.json").read_bytes()
        hold = (
            "from ssm_fast.meta_rl.run import RunDirectory\n"
            "run = RunDirectory('out', resume=True)\n"
            "input('it has the folder\\n')"
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([sys.executable, "-c", hold], **pipes) as process:
            assert process.stdout.readline() == "it has the folder\n"
            capsys.readouterr()
            assert cli.main(["train", "--resume", "--out", "out"]) == 2
            process.communicate("\n")
        assert capsys.readouterr().err == (
            "ssm-fast: --out is in use: another process trains there; wait for its end or choose another "
            "folder (--out)\n"
        )
        assert Path("out/config.json").read_bytes() == config

    @pytest.mark.parametrize("kind", [TypeError, KeyError, ValueError, OSError])
    def test_an_environment_that_fails_at_once_leaves_the_folder_free(
        self, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> Any:
            raise kind("something")

        args = ["train", "--mode", "policy_gradient", "--env", "Breaks-v0", "--episodes", "8"]
        with monkeypatch.context() as patch:
            patch.setattr(Breaks, "step", fail)
            if kind in (ValueError, OSError):
                assert cli.main([*args, "--out", "out"]) == 2
            else:
                with pytest.raises(kind):
                    cli.main([*args, "--out", "out"])
        monkeypatch.setattr(Breaks, "nan_at", None)
        assert cli.main([*args, "--out", "out"]) == 0

    def test_a_full_disk(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        append = RunDirectory.append_row

        def full(self: RunDirectory, row: Any) -> None:
            if row["iteration"] == 3:
                raise OSError(28, "No space left on device", "out/curve.csv")
            append(self, row)

        monkeypatch.setattr(RunDirectory, "append_row", full)
        assert cli.main([*REINFORCE, "--checkpoint_interval", "1", "--out", "out"]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            "ssm-fast: 'out/curve.csv': No space left on device; the last checkpoint is intact, continue "
            "with: ssm-fast train --resume --out out"
        )

    def test_a_mistake_leaves_the_run(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Also one whose curve has been lost."""
        assert cli.main([*REINFORCE, "--out", "out"]) == 0
        Path("out/curve.csv").unlink()
        checkpoint = max(Path("out/checkpoints").iterdir())
        state = torch.load(checkpoint / "training.pt", weights_only=True)
        shutil.rmtree(checkpoint)
        RunDirectory("out", resume=True).save_checkpoint(3, state | {"version": -1})
        assert cli.main(["train", "--resume", "--episodes", "20", "--out", "out"]) == 2
        assert "version must be" in capsys.readouterr().err
        assert Path("out/config.json").exists()

    def test_without_a_run_starts_one(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*REINFORCE, "--resume", "--out", "out"]) == 0
        assert "out holds no run yet: starting one" in capsys.readouterr().out

    def test_without_a_run_and_a_word_of_what_to_start(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["train", "--resume", "--out", "typo"]) == 2
        assert "typo holds no run to resume" in capsys.readouterr().err
        assert not Path("typo").exists()

    @pytest.mark.parametrize(
        ("option", "text"),
        [
            (["--lr", "0.5"], "--lr must be 0.001 as in the run in out, got 0.5"),
            (["--seed", "5"], "--seed must be 0"),
            (["--env", "Acrobot-v1"], "--env must be CartPole-v1"),
            (["--mode", "improved"], "--mode must be policy_gradient"),
            (["--gae_lambda", "0.9"], "--gae_lambda must be None"),
        ],
    )
    def test_with_another_setting(
        self, option: list[str], text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main([*REINFORCE, "--lr", "0.001", "--out", "out"]) == 0
        assert cli.main(["train", "--resume", "--out", "out", *option]) == 2
        assert text in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"mode": "meta"}, "mode must be one of"),
            ({"mode": []}, "mode must be one of"),
            ({"threads": 0}, "--threads must be at least 1, got 0"),
            ({"seed": "0"}, "seed must be int, got '0'"),
            ({"batch_size": None}, "batch_size must be int, got None"),
            ({"gamma": True}, "gamma must be float, got True"),
            ({"device": "tpu"}, "device must be one of ['cpu', 'cuda'], got 'tpu'"),
            ({"device": 0}, "device must be one of ['cpu', 'cuda'], got 0"),
            ({"state_dim": 33}, "does not fit"),
        ],
    )
    def test_with_a_tampered_config(
        self, change: dict[str, Any], text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main([*REINFORCE, "--out", "out"]) == 0
        path = Path("out/config.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        assert cli.main(["train", "--resume", "--episodes", "99", "--out", "out"]) == 2
        assert text in capsys.readouterr().err

    def test_threads_are_those_of_the_run(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*REINFORCE, "--threads", "2", "--out", "out"]) == 0
        torch.set_num_threads(1)
        resume_it = ["train", "--resume", "--episodes", "16", "--out", "out"]
        assert cli.main([*resume_it, "--threads", "1"]) == 2
        assert "--threads must be 2 as in the run in out, got 1" in capsys.readouterr().err
        assert cli.main(resume_it) == 0
        assert torch.get_num_threads() == 2
        assert json.loads(Path("out/config.json").read_text())["threads"] == 2

    def test_on_another_device(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert cli.main([*META, "--inner_steps", "0", "--epochs", "1", "--out", "out"]) == 0
        path = Path("out/config.json")
        assert json.loads(path.read_text())["device"] == "cpu"
        path.write_text(json.dumps({**json.loads(path.read_text()), "device": "cuda"}))
        assert cli.main(["evaluate", "out"]) == 0  # on the CPU, wherever it was trained
        resume_it = ["train", "--resume", "--epochs", "2", "--out", "out"]
        assert cli.main(resume_it) == 2
        assert "--device: this torch sees no GPU" in capsys.readouterr().err
        assert cli.main([*resume_it, "--device", "cpu"]) == 0
        assert json.loads(path.read_text())["device"] == "cpu"

    @pytest.mark.parametrize("header", ["", "step,x", "iteration,timesteps,episode_return", "\xff"])
    def test_with_a_damaged_curve(self, header: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*REINFORCE, "--out", "out"]) == 0
        path = Path("out/curve.csv")
        path.write_bytes(header.encode("latin-1") + b"\n1,2,3\n")
        assert cli.main(["train", "--resume", "--episodes", "20", "--out", "out"]) == 2
        assert "curve.csv" in capsys.readouterr().err

    @pytest.mark.filterwarnings("default")
    def test_with_damaged_checkpoints(self, capsys: pytest.CaptureFixture[str]) -> None:
        args = [*REINFORCE, "--checkpoint_interval", "1"]
        assert cli.main([*args, "--out", "out"]) == 0
        rows = _rows("out")
        states = sorted(Path("out/checkpoints").glob("*/training.pt"))
        states[-1].write_bytes(states[-1].read_bytes()[:-7])
        assert cli.main(["train", "--resume", "--out", "out"]) == 0
        error = capsys.readouterr().err
        assert error.count("ssm-fast: warning: skipped a damaged checkpoint") == 1
        assert _rows("out") == rows
        for state in Path("out/checkpoints").glob("*/training.pt"):
            state.write_bytes(b"garbage")
        assert cli.main(["train", "--resume", "--out", "out"]) == 2
        assert "no intact checkpoint in out" in capsys.readouterr().err


class TestCommands:
    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as end:
            cli.main(["--version"])
        assert end.value.code == 0
        assert capsys.readouterr().out == f"ssm_fast {ssm_fast.__version__}\n"

    def test_info(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["info"]) == 0
        text = capsys.readouterr().out
        for name, version in (
            ("ssm_fast", ssm_fast.__version__),
            ("torch", torch.__version__),
            ("gymnasium", gymnasium.__version__),
        ):
            assert re.search(rf"^{name} +{re.escape(version)}$", text, re.MULTILINE)
        assert re.search(r"^ISA +\w+ \(available: .*baseline", text, re.MULTILINE)
        assert re.search(rf"^threads +{torch.get_num_threads()} of", text, re.MULTILINE)
        assert re.search(r"^GPU ", text, re.MULTILINE)

    def test_stochastic_evaluation_is_reproducible(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        torch.manual_seed(0)
        StateSpaceModel().save("policy.safetensors")
        args = ["evaluate", "policy.safetensors", "--env", "CartPole-v1"]
        texts = []
        for option in ([], [], ["--seed", "5"], ["--deterministic"]):
            kind = option if option == ["--deterministic"] else ["--no-deterministic", *option]
            assert cli.main([*args, *kind]) == 0
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1]
        assert texts[0].startswith("stochastic evaluation of 10 episodes")
        assert len(set(texts)) == 3

    def test_a_reader_that_has_gone(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "ssm_fast", "info"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.close()
        _, error = process.communicate(timeout=60)
        assert error == b""
        assert process.returncode == 0

    def test_python_m(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "ssm_fast", "train", "--env", "Nope-v0"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.startswith("ssm-fast: --env 'Nope-v0' cannot be made")
        assert done.stderr.count("\n") == 1


class TestOverwrite:
    def test_replaces_the_run_and_nothing_else(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*REINFORCE, "--seed", "1", "--out", "out"]) == 0
        for name in ("notes.txt", "checkpoints/mine.pt", "tensorboard/other.log"):
            Path("out", name).write_text("mine")
        assert cli.main([*REINFORCE, "--out", "out"]) == 2
        assert "replace it (--overwrite)" in capsys.readouterr().err
        assert cli.main([*REINFORCE, "--lr", "-1", "--overwrite", "--out", "out"]) == 2
        assert Path("out/policy.safetensors").exists(), "a mistake removes nothing"
        assert cli.main([*REINFORCE, "--overwrite", "--out", "out"]) == 0
        assert cli.main([*REINFORCE, "--out", "fresh"]) == 0
        _assert_same_policy("out", "fresh")
        assert _rows("out") == _rows("fresh")
        assert len(list(Path("out/tensorboard").glob("events.*"))) == 1
        for name in ("notes.txt", "checkpoints/mine.pt", "tensorboard/other.log"):
            assert Path("out", name).read_text() == "mine"
        assert cli.main([*REINFORCE, "--overwrite", "--resume", "--out", "out"]) == 2
        assert "--resume and --overwrite exclude each other" in capsys.readouterr().err

    @pytest.mark.parametrize("config", [None, '{"mode": "fast"}', '{"versions": 3}', "{"])
    def test_never_a_foreign_folder(
        self, config: str | None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("out/checkpoints/iteration_00000010").mkdir(parents=True)
        files = [Path("out/policy.safetensors"), Path("out/checkpoints/iteration_00000010/w.pt")]
        if config is not None:
            files.append(Path("out/config.json"))
        for file in files:
            file.write_text(config or "mine")
        assert cli.main([*REINFORCE, "--overwrite", "--out", "out"]) == 2
        error = capsys.readouterr().err
        assert "out/config.json" in error
        assert error.count("\n") == 1
        assert all(file.read_text() == (config or "mine") for file in files)


COMMAND = [sys.executable, "-m", "ssm_fast"]


class TestOutput:
    """A training is worth more than what it prints."""

    def test_a_closed_one(self) -> None:
        done = subprocess.run(
            ["sh", "-c", f"exec {shlex.join([*COMMAND, *REINFORCE])} --out out >&- 2>&-"],
            check=False,
        )
        assert done.returncode == 0
        assert json.loads(Path("out/config.json").read_text())["mode"] == "policy_gradient"
        assert Path("out/evaluation.json").exists()

    def test_one_whose_reader_has_gone(self) -> None:
        process = subprocess.Popen(
            [*COMMAND, *REINFORCE, "--episodes", "40", "--out", "out"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline().startswith("training in CartPole-v1")
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert Path("out/evaluation.json").exists()

    def test_one_of_ascii(self) -> None:
        done = subprocess.run(
            [*COMMAND, *REINFORCE, "--out", "läufe/日本"],
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert rb"run folder l\xe4ufe/\u65e5\u672c" in done.stdout
        assert Path("läufe/日本/evaluation.json").exists()

    def test_a_full_one_leaves_the_folder_free(self) -> None:
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*COMMAND, *REINFORCE, "--out", "out"],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert done.returncode == 2
        assert done.stderr.startswith("ssm-fast: [Errno 28] No space left on device")
        assert not Path("out/config.json").exists()

    @pytest.mark.filterwarnings("default:.*Using the latest versioned environment")
    def test_warnings_have_no_colours(self, capsys: pytest.CaptureFixture[str]) -> None:
        StateSpaceModel().save("policy.safetensors")
        args = ["evaluate", "policy.safetensors", "--env", "CartPole", "--episodes", "1"]
        assert cli.main(args) == 0
        error = capsys.readouterr().err
        assert "ssm-fast: warning: WARN: Using the latest versioned environment" in error
        assert "\x1b" not in error


class TestParsing:
    def _said(self, capsys: pytest.CaptureFixture[str], *args: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            cli.main(args)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    @pytest.mark.parametrize(
        ("command", "hint"),
        [
            ("trian", "did you mean train?"),
            ("eval", "did you mean evaluate?"),
            ("xyz", "expected one of train, evaluate, adapt, app, bench, info"),
        ],
    )
    def test_a_mistyped_command(
        self, command: str, hint: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        said = self._said(capsys, command, "--steps", "100")
        assert said == f"ssm-fast: {command!r} is not a command: {hint}\n"

    def test_suggestions_are_of_the_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        said = self._said(capsys, "train", "--step", "100")
        assert "--num-steps" in said
        assert "adapt" not in said
        assert "--max-episode-steps" not in said  # of adapt and evaluate

    @pytest.mark.parametrize(
        "args", [["train", "--out", ""], ["bench", "--out="], ["evaluate", ""], ["adapt", ""]]
    )
    def test_an_empty_path(self, args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert "a path must not be empty" in " ".join(self._said(capsys, *args).split())
        assert list(Path().iterdir()) == []

    @pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["trian"], ["train", "--x"]])
    def test_help_and_mistakes_import_no_torch(self, args: list[str]) -> None:
        code = (
            "import atexit, runpy, sys\n"
            "atexit.register(lambda: print('imported', {'torch', 'gymnasium', 'numpy'} & set(sys.modules)))\n"
            "sys.argv[0] = 'ssm-fast'\n"
            "import ssm_fast.__main__\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *args], capture_output=True, text=True, check=False
        )
        assert done.stdout.endswith("imported set()\n"), done.stderr

    def test_import_registers_the_ops(self) -> None:
        """Without the command line, as for a file of torch.export."""
        code = "import torch, ssm_fast; print(torch.ops.ssm_fast.dense_scan, ssm_fast.SSM)"
        done = subprocess.run([sys.executable, "-c", code], check=False)
        assert done.returncode == 0

    def test_an_environment_that_imports_the_package(self) -> None:
        Path("mine.py").write_text(
            "import torch, gymnasium, ssm_fast\n"
            "from ssm_fast import SSM, load_policy, ops\n"
            "assert torch.ops.ssm_fast.dense_scan and SSM and load_policy and ops.gae\n"
            "gymnasium.register('Mine-v0', 'gymnasium.envs.classic_control:CartPoleEnv')\n"
        )
        done = subprocess.run(
            [*COMMAND, *REINFORCE, "--env", "mine:Mine-v0", "--out", "out"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([".", *sys.path])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
