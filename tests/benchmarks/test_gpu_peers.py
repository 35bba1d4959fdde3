from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.isa_independent

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def gpu_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with peers of its own in ``tmp_path``."""
    monkeypatch.syspath_prepend(GPU)
    monkeypatch.syspath_prepend(tmp_path)
    import gpu_peers

    names = ("good", "missing", "other_version", "moved", "unlinked", "uncompiled")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(gpu_peers, "PEERS", {name: (name, "scan") for name in names})
    gpu_peers._find.cache_clear()
    for name, text in {
        "good": "def scan(): return 5",
        "other_version": "import torch; torch.no_such_function",
        "moved": "",
        "unlinked": "raise OSError('libcudart.so.11.0: cannot open shared object file')",
        "uncompiled": "raise RuntimeError('Error building extension:\\n nvcc\\t| ' + 300 * '.')",
    }.items():
        (tmp_path / f"{name}.py").write_text(text + "\n")
    return gpu_peers


def test_absent_peers_are_named_with_the_reason(gpu_peers: ModuleType) -> None:
    assert gpu_peers.importable("good")() == 5
    absent = gpu_peers.absent()
    assert absent == {
        "missing": "ModuleNotFoundError: No module named 'missing'",
        "other_version": "AttributeError: module 'torch' has no attribute 'no_such_function'",
        "moved": "AttributeError: module 'moved' has no attribute 'scan'",
        "unlinked": "OSError: libcudart.so.11.0: cannot open shared object file",
        "uncompiled": absent["uncompiled"],
    }
    assert absent["uncompiled"].startswith("RuntimeError: Error building extension: nvcc | ...")
    assert len(absent["uncompiled"]) == 200  # one line of a table
    assert all(gpu_peers.importable(peer) is None for peer in absent)


def test_a_peer_is_imported_once(gpu_peers: ModuleType, tmp_path: Path) -> None:
    counted = "from pathlib import Path\nwith Path(__file__).with_suffix('.log').open('a') as f:"
    (tmp_path / "uncompiled.py").write_text(f"{counted}\n    f.write('x')\nraise RuntimeError()\n")
    for _ in range(3):
        assert gpu_peers.absent()["uncompiled"] == "RuntimeError:"
    assert (tmp_path / "uncompiled.log").read_text() == "x"


def test_mistakes_are_not_swallowed(gpu_peers: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        gpu_peers.importable("good")
