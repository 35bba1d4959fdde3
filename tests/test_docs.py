"""Every Python block of the documents runs, and every command parses."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssm_fast.cli.parsing import parse
from ssm_fast.core import ImprovedSSM
from ssm_fast.env_runner import Environment

pytestmark = pytest.mark.isa_independent

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TORCHRUN = re.compile(r"# torchrun (.+)")  # the first line of a block for several processes
STUBBED = {"runs/halfcheetah-v5-seed0/policy.safetensors": "HalfCheetah-v5"}


def blocks(path: Path, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(path.read_text()) if found == language]


def documents_with(language: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in DOCUMENTS if blocks(path, language)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, but for what the documents have trained before."""
    monkeypatch.chdir(tmp_path)
    for name, env_id in STUBBED.items():
        Path(name).parent.mkdir(parents=True)
        with Environment(env_id) as env:
            sizes = {"state_dim": 4, "hidden_dim": 8, "num_layers": 1}
            model = ImprovedSSM(env.input_dim, env.action_dim, **sizes)
            model.save(name, env.policy_metadata())
    return tmp_path


# raised while torch imports its compiler
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("document", documents_with("python"))
def test_python(document: str, folder: Path) -> None:
    """The blocks of a document, one after the other."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    names: dict[str, object] = {"__name__": "document"}
    try:
        for text in blocks(ROOT / document, "python"):
            if TORCHRUN.match(text):
                run_together(text, folder)
                continue
            exec(compile(text, document, "exec"), names)  # noqa: S102
    finally:
        torch.set_num_threads(threads)


def run_together(text: str, folder: Path) -> None:
    """A block in the processes that its first line asks for."""
    line = TORCHRUN.match(text)
    assert line is not None
    *options, name = shlex.split(line[1])
    (folder / name).write_text(text)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for _ in range(3):
        result = subprocess.run(
            [*launcher, *options, name], capture_output=True, text=True, check=False, cwd=folder
        )
        # DistributedDataParallel keeps the process group alive. torch 2.13 aborts where a thread of
        # it lets go of a Python object while the interpreter ends: one run of a hundred.
        if "terminate called without an active exception" not in result.stderr:
            break
    assert result.returncode == 0, result.stderr


def commands() -> list[str]:
    lines = [
        line for path in DOCUMENTS for text in blocks(path, "bash") for line in text.splitlines()
    ]
    return sorted(
        {line.partition("#")[0].strip() for line in lines if line.startswith("ssm-fast ")}
    )


@pytest.mark.parametrize("command", commands())
def test_command(command: str) -> None:
    parse(shlex.split(command)[1:])


def test_something_is_found() -> None:
    assert len(documents_with("python")) >= 7
    assert len(commands()) >= 10
