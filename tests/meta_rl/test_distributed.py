"""Two processes on the loopback interface, and one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import sharded_runs
import torch
from sharded_runs import CLOCKS

from ssm_fast import cli
from ssm_fast.checkpoint import load_model
from ssm_fast.cli import commands
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.meta_rl.distributed import LostRank, Rows, World, join_world
from ssm_fast.meta_rl.ppo_trainer import PPOTrainer
from ssm_fast.meta_rl.run import RunDirectory

pytestmark = [pytest.mark.isa_independent, pytest.mark.usefixtures("one_thread")]

PATIENCE = 300.0  # seconds, for a busy machine
KILLS = """
import os
import signal
from pathlib import Path

import gymnasium
from gymnasium.envs.classic_control import PendulumEnv


class Kills(PendulumEnv):
    '''Pendulum in which rank 1 dies in its 200th step, once.'''

    steps = 0

    def step(self, action):
        Kills.steps += 1
        if Kills.steps == 200 and os.environ.get("RANK") == "1":
            try:
                Path(os.environ["KILLED"]).touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


gymnasium.register("Kills-v0", entry_point=Kills, max_episode_steps=10)
"""
# 8 iterations of 64 steps, after as many of warm-up, with a checkpoint in every fourth; rank 1 dies in the sixth
TRAIN = [
    *("train", "--env", "kills:Kills-v0", "--batch_size", "4", "--num_steps", "16"),
    *("--steps", "576", "--checkpoint_interval", "2", "--ppo_epochs", "2"),
    *("--state_dim", "4", "--hidden_dim", "8"),
]


def _environment(**more: str) -> dict[str, str]:
    ours = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "error"}
    return {**os.environ, **ours, **more}


@contextlib.contextmanager
def _two_processes(
    *args: str, cwd: Path | list[Path], **more: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """Python with these arguments as rank 0 and rank 1, as torchrun would start them."""
    folders = cwd if isinstance(cwd, list) else [cwd, cwd]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, *args],
            cwd=folders[rank],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(
                RANK=str(rank),
                WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                **more,
            ),
        )
        for rank in range(2)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `sharded_runs` comes to in two processes, by their ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    with _two_processes(sharded_runs.__file__, str(folder), cwd=folder) as processes:
        for process in processes:
            out, error = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, error
            assert out == ""
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


class TestTwoProcesses:
    """To rounding: sums over rows are taken in another order."""

    @pytest.mark.parametrize("kind", sharded_runs.PPO)
    def test_ppo(self, kind: str, of_two: list[dict[str, Any]]) -> None:
        ranks = [rank[f"ppo {kind}"] for rank in of_two]
        one = sharded_runs.train_ppo(kind, World())
        self._check(ranks, one)
        for name, x in one["return_norm"].items():
            torch.testing.assert_close(ranks[0]["return_norm"][name], x, rtol=1e-12, atol=0.0)
        assert ranks[0]["returns"] == pytest.approx(one["returns"], rel=1e-9)
        assert ranks[0]["lengths"] == one["lengths"]

    @pytest.mark.parametrize("kind", sharded_runs.META)
    def test_meta_rl(self, kind: str, of_two: list[dict[str, Any]]) -> None:
        ranks = [rank[f"meta_rl {kind}"] for rank in of_two]
        one = sharded_runs.train_meta_rl(kind, World())
        self._check(ranks, one)
        torch.testing.assert_close(ranks[0]["rates"], one["rates"], rtol=1e-9, atol=1e-12)
        assert ranks[0]["returns"] == pytest.approx(one["returns"], rel=1e-9)
        assert "test_return_1" in one["metrics"][1]

    def test_a_policy_that_breaks_down(self, of_two: list[dict[str, Any]]) -> None:
        """Every rank knows of it, and a training ends on all of them."""
        one = sharded_runs.break_down(World())
        for rank, said in zip(of_two, (one["said"], []), strict=True):
            found = rank["breakdown"]
            torch.testing.assert_close(
                found["returns"], one["returns"], rtol=1e-12, atol=0.0, equal_nan=True
            )
            assert found["said"] == said
            assert found["stopped"].replace("rank 1: ", "") == one["stopped"]
        assert one["returns"][1].isnan().flatten(1).all(1).tolist() == [False, False, True, False]
        assert one["said"][0].startswith("1 of 4 tasks broke down")
        assert "CartPoleTask(" in one["stopped"]

    def _check(self, ranks: list[dict[str, Any]], one: dict[str, Any]) -> None:
        for rank in ranks:
            for name, x in rank["model"].items():
                assert torch.equal(x, ranks[0]["model"][name]), "all ranks hold the same weights"
        model = ranks[0]["model"]
        torch.testing.assert_close(model, one["model"], rtol=1e-9, atol=1e-11)
        for name in ("obs_norm.mean", "obs_norm.var"):
            torch.testing.assert_close(model[name], one["model"][name], rtol=1e-12, atol=1e-13)
        assert torch.equal(model["obs_norm.count"], one["model"]["obs_norm.count"])
        assert ranks[0]["timesteps"] == one["timesteps"]
        for row, expected in zip(ranks[0]["metrics"], one["metrics"], strict=True):
            assert row == pytest.approx(expected, rel=1e-8, abs=1e-10)


class TestWorld:
    def test_of_two(self, of_two: list[dict[str, Any]]) -> None:
        torch.manual_seed(0)
        x = torch.randn(7, 3, dtype=torch.float64)
        first, second = (rank["talk"] for rank in of_two)
        assert (first["rows"], second["rows"]) == ((0, 4, 7), (4, 3, 7))
        assert first["own"]
        assert second["own"]
        assert first["parts"] == [([0, 2, 3], 0.75), ([0], 1.0)]
        assert second["parts"] == [([2], 0.25), ([0], 0.0)]
        assert first["split"] == [([0, 2], 0.5), ([0], 1.0)]
        assert second["split"] == [([3, 6], 0.5), ([0], 0.0)]
        both = x[[0, 2, 3, 6], 0]
        scaled = (both - both.mean()) / (both.std(correction=0) + 1e-8)
        torch.testing.assert_close(first["scaled"][0], scaled[:3], rtol=1e-12, atol=0.0)
        torch.testing.assert_close(second["scaled"][0], scaled[3:], rtol=1e-12, atol=0.0)
        assert float(first["scaled"][1]) == 0.0  # a minibatch of one, to its own mean
        for rank in (first, second):
            assert torch.equal(rank["gathered"], x)
            assert torch.equal(rank["gathered columns"], x.T > 0.0)
            torch.testing.assert_close(rank["average"], x.mean(0))
            torch.testing.assert_close(list(rank["averages"]), [x.mean(0), x.mean()])
            variances = [float(x.var(correction=0)), float(x[:, 1].var(correction=0))]
            assert rank["variances"] == pytest.approx(variances, rel=1e-12)
            seen = torch.cat([torch.ones(2, 3), x])
            assert int(rank["norm"]["count"]) == 9
            torch.testing.assert_close(rank["norm"]["mean"], seen.mean(0), rtol=1e-13, atol=1e-15)
            variance = seen.var(0, correction=0)
            torch.testing.assert_close(rank["norm"]["var"], variance, rtol=1e-13, atol=0.0)
            assert rank["first"] == {"rank": 0, "pi": math.pi, "name": "Größe", "none": None}
            assert rank["errors"] == ["row 0 is not finite", "rank 1: row 4 is not finite"]
        assert sorted([*first["said"], *second["said"]]) == [False, False, False, True]

    def test_of_one(self) -> None:
        x = torch.randn(5)
        with World() as world:
            assert list(world.share(5)) == [0, 1, 2, 3, 4]
            assert world.rows(5) == Rows(0, 5, 5)
            assert world.rows(5).of(x) is x
            assert world.rows(5).part(x) == (x, 1.0)
            assert world.split(x) == (x, 1.0)
            assert world.gather(x) is world.average(x, 1.0) is x
            assert world.first(x) is x
            with pytest.raises(ValueError, match="why"), world.share_errors():
                raise ValueError("why")

    @pytest.mark.parametrize(("total", "size"), [(7, 3), (3, 3), (2, 3), (64, 5)])
    def test_share(self, total: int, size: int) -> None:
        shares = []
        for rank in range(size):
            world = World()
            world.rank, world.size = rank, size
            shares.append(world.share(total))
        assert [i for share in shares for i in share] == list(range(total))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1

    def test_without_torchrun(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        assert type(join_world()) is World
        monkeypatch.setenv("WORLD_SIZE", "4")  # some schedulers set it for purposes of their own
        assert type(join_world()) is World
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(ValueError, match=r"\['MASTER_ADDR', 'MASTER_PORT'\] not: use torchrun"):
            join_world()
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert type(join_world()) is World
        with pytest.raises(ValueError, match="timeout"):
            join_world(0.0)

    def test_joins_nothing_unless_asked(self, tmp_path: Path) -> None:
        code = (
            "import sys, torch; before = {m for m in sys.modules if 'torch.dist' in m}\n"
            "import ssm_fast, ssm_fast.meta_rl.ppo_trainer, ssm_fast.meta_rl.meta_rl_trainer\n"
            "print(sorted({m for m in sys.modules if 'torch.dist' in m} - before))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.stdout == "[]\n", done.stderr

    def test_a_run_belongs_to_rank_0(self, tmp_path: Path) -> None:
        world = World()
        world.rank = 1
        trainer = PPOTrainer(ImprovedSSM(3, 1, 4, 8), num_steps=8, world=world)
        with pytest.raises(ValueError, match="run must be None on all ranks but rank 0"):
            trainer.train(gymnasium.make("Pendulum-v1"), 8, run=RunDirectory(tmp_path))


@pytest.fixture
def kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Variables that give a process the environment in which rank 1 dies."""
    (tmp_path / "kills.py").write_text(KILLS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield {"PYTHONPATH": str(tmp_path), "KILLED": str(tmp_path / "killed")}
    gymnasium.registry.pop("Kills-v0", None)
    sys.modules.pop("kills", None)


def _rows(run: str) -> list[dict[str, float]]:
    rows = RunDirectory(run, resume=True).read_rows()
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]


def _assert_like_a_run_of_one(run: str) -> None:
    """In float32, which the updates of 8 iterations carry on."""
    assert cli.main([*TRAIN, "--out", "whole"]) == 0
    for row, expected in zip(_rows(run), _rows("whole"), strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-4, nan_ok=True)
    policies = [load_model(Path(x, "policy.safetensors")).state_dict() for x in (run, "whole")]
    torch.testing.assert_close(*policies, rtol=1e-4, atol=1e-5)


class TestLostRank:
    def test_ends_the_run_which_one_process_continues(
        self, kills: dict[str, str], tmp_path: Path
    ) -> None:
        folders = [tmp_path / "zero", tmp_path / "one"]
        for folder in folders:
            folder.mkdir()
        args = ["-m", "ssm_fast", *TRAIN, "--out", "run"]
        with _two_processes(*args, cwd=folders, **kills) as (first, second):
            assert second.wait(PATIENCE) == -signal.SIGKILL
            killed = time.monotonic()
            out, error = first.communicate(timeout=PATIENCE)
            assert time.monotonic() - killed < 30.0
            assert first.returncode == 1
            assert "ssm-fast: training stopped: another process of this run is lost: " in error
            resume_it = "ssm-fast train --resume --out run --env kills:Kills-v0"
            assert error.endswith(f"the last checkpoint is intact, continue with: {resume_it}\n")
            assert error.count("\n") <= 2  # with a line of progress
            assert out == "training in kills:Kills-v0 (improved, seed 0); run folder run\n"
            assert second.communicate() == ("", "")
        assert list(folders[1].iterdir()) == []
        (tmp_path / "run").symlink_to(folders[0] / "run")
        assert [row["iteration"] for row in _rows("run")] == [1, 2, 3, 4, 5]
        assert cli.main([*TRAIN, "--resume", "--out", "run"]) == 0
        assert [row["iteration"] for row in _rows("run")] == [1, 2, 3, 4, 5, 6, 7, 8]
        _assert_like_a_run_of_one("run")

    def test_restarts_under_torchrun(self, kills: dict[str, str]) -> None:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        args = [*torchrun, "--max-restarts=1", "-m", "ssm_fast", *TRAIN, "--resume"]
        done = subprocess.run(
            [sys.executable, *args, "--out", "run"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            env=_environment(**kills, PYTHONWARNINGS="default"),
        )
        assert done.returncode == 0, done.stderr
        assert Path("killed").exists()
        assert done.stdout.startswith("run holds no run yet: starting one\n")
        assert done.stdout.count("training in kills:Kills-v0") == 2
        assert done.stdout.count("deterministic evaluation of 10 episodes") == 1
        assert json.loads(Path("run/evaluation.json").read_text())["timesteps"] == 576
        _assert_like_a_run_of_one("run")

    def test_that_does_not_answer(self, tmp_path: Path) -> None:
        code = (
            "import time, torch\n"
            "from ssm_fast.meta_rl.distributed import join_world\n"
            "world = join_world(timeout=5.0)\n"
            f"time.sleep({PATIENCE} * world.rank)\n"
            "world.gather(torch.zeros(1))"
        )
        with _two_processes("-c", code, cwd=tmp_path) as (first, second):
            _, error = first.communicate(timeout=PATIENCE)
            assert second.poll() is None
        assert first.returncode == 1
        last = error.splitlines()[-1]
        assert f"{LostRank.__name__}: another process of this run is lost: Timed out" in last


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--mode", "policy_gradient"], "--mode policy_gradient trains in one process"),
        (
            ["--env", "Pendulum-v1", "--batch_size", "1"],
            "--batch_size must be at least the number of processes, 2, got 1",
        ),
        (
            ["--mode", "meta_rl", "--tasks_per_epoch", "1"],
            "--tasks_per_epoch must be at least the number of processes, 2, got 1",
        ),
    ],
)
def test_options_that_two_processes_cannot_have(
    args: list[str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    world = World()
    world.size = 2
    monkeypatch.setattr(commands, "join_world", lambda: world)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *args, "--out", "run"]) == 2
    assert capsys.readouterr().err == f"ssm-fast: {text}\n"
    assert list(tmp_path.iterdir()) == []
