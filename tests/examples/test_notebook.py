"""The notebook runs from top to bottom, and is kept without what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

NOTEBOOK = Path(__file__).parents[2] / "examples/quickstart.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]

pytestmark = pytest.mark.isa_independent


def test_it_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    threads = torch.get_num_threads()
    names: dict[str, object] = {"__name__": "__main__"}
    try:
        for cell in CELLS:
            exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)  # noqa: S102
    finally:
        torch.set_num_threads(threads)
    assert names["evaluation"].mean > 300  # an untrained policy holds the pole for about 20 steps
    before, *after = names["returns"]
    assert before < 100, "the cell shows what adapting is for"
    assert min(after) > 400


def test_it_holds_no_outputs() -> None:
    assert not any(cell["outputs"] or cell["execution_count"] for cell in CELLS)
