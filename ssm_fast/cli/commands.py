"""Running a command, and what its end says."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

from ssm_fast.cli.adapt import run_adaptation
from ssm_fast.cli.bench import run_bench
from ssm_fast.cli.evaluate import run_evaluation
from ssm_fast.cli.info import print_info
from ssm_fast.cli.messages import note, place_of, sentence
from ssm_fast.cli.options import Adapt, App, Bench, Evaluate, Train
from ssm_fast.cli.train import run_training
from ssm_fast.meta_rl.distributed import LostRank, World, join_world


def run_command(options: Any) -> int:
    """Runs the command that these are the options of.

    Returns:
        The exit code; see `ssm_fast.cli.main`.
    """
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
        except (ValueError, OSError) as error:
            return _fail(world, 2, _in_options(sentence(error), options) + place_of(error))
        except KeyboardInterrupt as interrupt:
            return _fail(world, 130, sentence(interrupt) or "interrupted")
    return 0


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


# Arguments that have another name on the command line.
_OPTION_OF = {"env_name": "env", "learning_rate": "lr", "adaptation_lr": "lr"}


def _in_options(message: str, options: Any) -> str:
    """A message that speaks of an argument, with the option that it was given by."""
    name, _, rest = message.partition(" ")
    option = _OPTION_OF.get(name, name)
    if getattr(options, option, None) is not None:
        return f"--{option} {rest}"
    return f"the environment {rest}" if name == "env_name" else message


def _fail(world: World, code: int, reason: str) -> int:
    if world.is_first_to_say(reason):
        note(f"ssm-fast: {reason}")
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    note(f"ssm-fast: warning: {sentence(message)}")
