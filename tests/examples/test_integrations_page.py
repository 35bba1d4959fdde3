"""The code of docs/integrations.md."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/integrations.md").read_text(encoding="utf-8")
SECTION = r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```"  # its title and its first block
BLOCKS = dict(re.findall(SECTION, PAGE, re.MULTILINE | re.DOTALL))

pytestmark = pytest.mark.isa_independent


def test_every_section_has_a_block() -> None:
    assert len(BLOCKS) == len(re.findall("^## ", PAGE, re.MULTILINE)) == PAGE.count("```python")


# raised while torch imports its compiler
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("title", [title for title in BLOCKS if "Distributed" not in title])
def test_a_block_runs(title: str, tmp_path: Path) -> None:
    path = tmp_path / "block.py"
    path.write_text(BLOCKS[title], encoding="utf-8")
    torch._dynamo.reset()
    runpy.run_path(str(path), run_name="__main__")


def test_the_distributed_block_runs(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(BLOCKS["DistributedDataParallel"], encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
