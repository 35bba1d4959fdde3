"""What the guide for users of SSM-MetaRL-Unified promises is there."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
from pathlib import Path

import pytest
import tyro

from ssm_fast.cli.options import Adapt, App, Train

pytestmark = pytest.mark.isa_independent

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/from_ssm_metarl.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
CALL = re.compile(r"([A-Z]\w+)(?:\.(\w+))?\((.*)\)")


def promises(section: str) -> list[list[str]]:
    """The code under "now", of each row of the table of a section."""
    rows = re.findall(r"^\| (.+) \| (.+) \|$", SECTIONS[section], re.MULTILINE)[1:]
    return [re.findall("`([^`]+)`", now) for _, now in rows]


@pytest.fixture(scope="module")
def names() -> dict[str, object]:
    """What the imports give."""
    found: dict[str, object] = {}
    for row in promises("Imports"):
        assert row
        for line in row:
            exec(line, found)  # noqa: S102
    return found


def test_imports(names: dict[str, object]) -> None:
    assert {"ImprovedSSM", "MetaMAML", "TestTimeAdapter", "discounted_returns"} <= names.keys()


@pytest.mark.parametrize("command", [command for row in promises("Commands") for command in row])
def test_commands(command: str) -> None:
    program, *arguments = shlex.split(command)
    if program == "ssm-fast":
        commands = {"train": Train, "adapt": Adapt, "app": App}
        tyro.extras.subcommand_cli_from_dict(commands, args=arguments)
        return
    assert program == "python"
    script = (ROOT / arguments[0]).read_text()
    for option in arguments[1::2]:
        assert re.search(rf"^    {option.removeprefix('--')}: ", script, re.MULTILINE), option


def test_options() -> None:
    fields = {f"--{field.name}" for field in dataclasses.fields(Train)}
    for row in promises("Options"):
        assert row[0] in fields
        assert {code.split()[0] for code in row if code.startswith("--")} <= fields


@pytest.mark.parametrize("row", promises("Classes"), ids=lambda row: row[0])
def test_classes(row: list[str], names: dict[str, object]) -> None:
    calls = [CALL.fullmatch(code) for code in row]
    assert calls[0] is not None
    for call in filter(None, calls):
        value = names[call[1]] if call[2] is None else getattr(names[call[1]], call[2])
        parameters = inspect.signature(value).parameters
        assert set(filter(None, call[3].split(", "))) <= parameters.keys()
