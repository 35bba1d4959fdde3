"""The command line `ssm-fast`: train, evaluate, adapt, app, bench, info."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

try:
    from ssm_fast.cli.adapt import run_adaptation
    from ssm_fast.cli.bench import run_bench
    from ssm_fast.cli.evaluate import run_evaluation
    from ssm_fast.cli.info import print_info
    from ssm_fast.cli.messages import place_of, sentence
    from ssm_fast.cli.options import Adapt, App, Bench, Evaluate, Train
    from ssm_fast.cli.parsing import parse
    from ssm_fast.cli.train import run_training
    from ssm_fast.meta_rl.distributed import LostRank, World, join_world
except ModuleNotFoundError as error:
    extra = "app" if sys.argv[1:2] == ["app"] else "rl"
    sys.stderr.write(f"ssm-fast: {error.name} is missing: pip install 'ssm_fast[{extra}]'\n")
    raise SystemExit(2) from None


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: The arguments; `sys.argv[1:]` by default.

    Returns:
        The exit code: 0, 1 when a contest has become slower, or when training, an adaptation or an
        evaluation broke down on NaN or infinity, or lost one of its processes, or nobody reads the
        output any more, 2 for a mistake in the input, 130 after Ctrl-C or, in a
        training by one process, SIGTERM.
    """
    options = parse(args)
    world = World()
    with warnings.catch_warnings(), ExitStack() as leaving:
        warnings.showwarning = _show_warning
        try:
            if isinstance(options, Train):
                world = leaving.enter_context(join_world())
                # torchrun ends its processes by SIGTERM, also where they wait for a lost one.
                if world.size == 1:
                    leaving.enter_context(_terminated_as_interrupted())
                run_training(options, world)
            elif isinstance(options, Evaluate):
                run_evaluation(options)
            elif isinstance(options, Adapt):
                run_adaptation(options)
            elif isinstance(options, App):
                _run_app(options)
            elif isinstance(options, Bench):
                return 0 if run_bench(options) else 1
            else:
                print_info()
        except (FloatingPointError, LostRank) as error:
            names = {Train: "training", Adapt: "adaptation", Evaluate: "evaluation"}
            stopped = names.get(type(options), "the command")
            return _fail(world, 1, f"{stopped} stopped: {sentence(error)}")
        except BrokenPipeError:  # whoever read the output has gone, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (ValueError, OSError) as error:
            return _fail(world, 2, sentence(error) + place_of(error))
        except KeyboardInterrupt as interrupt:
            return _fail(world, 130, sentence(interrupt) or "interrupted")
    return 0


def run() -> NoReturn:
    """The command `ssm-fast`: runs `main` on the command line and ends the process with its code."""
    code = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Where the interpreter ends under a thread of gloo (torch 2.13), a process that has done its
        # part may abort, and torchrun then ends all others.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, as of `kill`, `timeout` or a batch system, does what Ctrl-C does, and one of it is enough.

    Where it is ignored, or has a handler already, it stays so.
    """
    usual = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is interrupt:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run_app(options: App) -> None:
    """Starts the web app; what it needs is an extra of its own."""
    from ssm_fast.app.server import run_app

    try:
        run_app(options)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing: pip install 'ssm_fast[app]'") from None


def _fail(world: World, code: int, reason: str) -> int:
    if world.is_first_to_say(reason):
        sys.stderr.write(f"ssm-fast: {reason}\n")
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    sys.stderr.write(f"ssm-fast: warning: {sentence(message)}\n")
