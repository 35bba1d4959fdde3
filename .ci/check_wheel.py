"""Checks a wheel as it will be published, and prints what it measured.

By default in fresh environments, one per version of torch, without and with extras; with --here in that of this
Python, where the wheel is installed already.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
PINNED = re.search(r"^torch==(.+)$", CONSTRAINTS.read_text(), re.MULTILINE)[1]

SIZE_LIMIT = 10e6  # bytes
IMPORT_LIMIT = (
    0.050  # seconds of the processor over `import torch`: the clock counts what else it does
)
IMPORT = """
import time
import torch
clock, processor = time.perf_counter(), time.process_time()
import ssm_fast
print(time.perf_counter() - clock, time.process_time() - processor)
"""
ISAS = "from ssm_fast.ops.dispatch import native; print(*native.available_isas())"


def main() -> None:
    """Everything; exits with a message where a check fails."""
    options = parser().parse_args()
    check_file(options.wheel)
    if options.here:
        check_use(Path(sys.executable), [])
        return
    for version in options.torch:
        with tempfile.TemporaryDirectory() as folder:
            check_in_fresh_environment(options.wheel, version, options.extras, Path(folder))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Check a wheel as it will be published.")
    parser.add_argument("wheel", type=lambda path: Path(path).resolve(strict=True))
    parser.add_argument("--torch", nargs="+", default=[PINNED], metavar="VERSION")
    parser.add_argument("--extras", nargs="*", default=["rl", "gpu"], metavar="EXTRA")
    parser.add_argument("--here", action="store_true", help="make no environments")
    return parser


def check_file(wheel: Path) -> None:
    """Size, platform, and what the one library in it exports."""
    size = wheel.stat().st_size
    require(size < SIZE_LIMIT, f"{wheel.name} has {size} bytes; the limit is {SIZE_LIMIT:.0f}")
    platform = wheel.stem.split("-")[-1]
    require(
        "linux_" not in re.sub("manylinux", "", platform), f"{platform} is of this machine alone"
    )
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        libraries = [name for name in archive.namelist() if re.search(r"\.(so|dylib)\b", name)]
        require(len(libraries) == 1, f"{wheel.name} brings libraries along: {libraries}")
        exported = exports(Path(archive.extract(libraries[0], folder)))
    require(exported == ["PyInit__native"], f"{libraries[0]} exports {exported}")
    print(f"{wheel.name}\n  {size / 1e6:.2f} MB, exports {', '.join(exported)}")


def exports(library: Path) -> list[str]:
    """The symbols that a library shows to others."""
    macos = sys.platform == "darwin"
    command = ["nm", "-gU"] if macos else ["nm", "-D", "--defined-only"]
    names = [line.split()[-1] for line in run([*command, library]).splitlines()]
    return [name.removeprefix("_") for name in names] if macos else names


def check_in_fresh_environment(wheel: Path, version: str, extras: list[str], folder: Path) -> None:
    """Without the extras, then with them."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    constraints = ["-c", CONSTRAINTS] if version == PINNED else []
    pip = [python, "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += [*constraints, "--only-binary=:all:", f"torch=={version}"]
    run([*pip, wheel], alone(python))
    check_use(python, [])
    if extras:
        run([*pip, f"{wheel}[{','.join(extras)}]"], alone(python))
        check_use(python, extras)


def check_use(python: Path, extras: list[str]) -> None:
    """An op of each kind at every instruction set, what the extras add, and the time of the import."""
    environment = alone(python)
    isas = run([python, "-I", "-c", ISAS], environment).split()
    for isa in isas:
        with_extras = extras if isa == isas[-1] else []
        command = [python, "-I", ROOT / ".ci" / "use_wheel.py", *with_extras]
        found = run(command, environment | {"SSM_FAST_ISA": isa}).strip()
    took = [run([python, "-I", "-c", IMPORT], environment).split() for _ in range(9)]
    clock, processor = (statistics.median(map(float, times)) for times in zip(*took, strict=True))
    print(f"  {found}")
    print(f"    {', '.join(isas)}: ops as their references")
    print(f"    import over torch: {1e3 * processor:.0f} ms of the processor, {1e3 * clock:.0f} ms")
    require(processor <= IMPORT_LIMIT, f"the import may take {1e3 * IMPORT_LIMIT:.0f} ms")


def alone(python: Path) -> dict[str, str]:
    """The environment of a machine with this Python and no compiler."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return kept | {"PATH": str(python.parent), "CC": "", "CXX": ""}


def run(command: list[str | Path], environment: dict[str, str] | None = None) -> str:
    """What a command writes, away from the sources; ends the check where it fails."""
    result = subprocess.run(
        command,
        cwd=tempfile.gettempdir(),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    require(result.returncode == 0, f"{' '.join(map(str, command))}:\n{result.stderr}")
    return result.stdout


def require(condition: bool, message: str) -> None:
    """Ends the check with a message unless the condition holds."""
    if not condition:
        raise SystemExit(f"check_wheel: {message}")


if __name__ == "__main__":
    main()
