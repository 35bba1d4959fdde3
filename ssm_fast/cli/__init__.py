"""The command line `ssm-fast`: train, evaluate, adapt, app, bench, info."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ssm_fast.cli.messages import prepare_output


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: The arguments; `sys.argv[1:]` by default.

    Returns:
        The exit code: 0, 1 when a contest has become slower, or when training, an adaptation or an
        evaluation broke down on NaN or infinity, or lost one of its processes, 2 for a mistake in
        the input, 130 after Ctrl-C or, in a training by one process, SIGTERM.
    """
    args = sys.argv[1:] if args is None else list(args)
    try:
        from ssm_fast.cli.parsing import parse

        options = parse(args)  # help and mistakes end here, before torch is imported
        from ssm_fast.cli.commands import run_command
    except ModuleNotFoundError as error:
        extra = "app" if args[:1] == ["app"] else "rl"
        sys.stderr.write(f"ssm-fast: {error.name} is missing: pip install 'ssm_fast[{extra}]'\n")
        return 2
    return run_command(options)


def run() -> NoReturn:
    """The command `ssm-fast`: runs `main` on the command line and ends the process with its code."""
    prepare_output()
    code = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Where the interpreter ends under a thread of gloo (torch 2.13), a process that has done its
        # part may abort, and torchrun then ends all others.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)
