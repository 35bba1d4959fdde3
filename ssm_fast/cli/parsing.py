"""Reading the command line."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

import ssm_fast
from ssm_fast.cli.options import COMMANDS

_registry = ConstructorRegistry()


def parse(args: Sequence[str]) -> Any:
    """The options of the command that is asked for; help and mistakes end the program.

    Args:
        args: The arguments, the command first.
    """
    if list(args) == ["--version"]:
        sys.stdout.write(f"ssm_fast {ssm_fast.__version__}\n")
        raise SystemExit(0)
    command = args[0] if args else ""
    with _registry:
        if command in COMMANDS:  # alone: what is said of a mistake then names its options alone
            return tyro.cli(COMMANDS[command], prog=f"ssm-fast {command}", args=args[1:])
        if command and not command.startswith("-"):
            _refuse(command)
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="ssm-fast",
            description="State-space-model policies: training, evaluation and adaptation. "
            "`ssm-fast --version` says which version this is.",
            args=args,
        )


def _refuse(command: str) -> NoReturn:
    """Ends the program: there is no such command."""
    alike = difflib.get_close_matches(command, COMMANDS, n=1)
    hint = f"did you mean {alike[0]}?" if alike else f"expected one of {', '.join(COMMANDS)}"
    sys.stderr.write(f"ssm-fast: {command!r} is not a command: {hint}\n")
    raise SystemExit(2)


@_registry.primitive_rule
def _optional(
    info: PrimitiveTypeInfo,
) -> PrimitiveConstructorSpec[Any] | UnsupportedTypeAnnotationError | None:
    """An option of type `X | None` takes an X: None is what it is where it is not given.

    By itself tyro would offer "None" as a choice, and speak of it in the messages of mistakes.
    """
    kinds = get_args(info.type)
    if info.type_origin not in (Union, UnionType) or len(kinds) != 2 or kinds[1] is not type(None):
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], info.markers))
    if isinstance(spec, UnsupportedTypeAnnotationError):
        return spec
    inner = spec
    return replace(
        inner,
        is_instance=lambda value: value is None or inner.is_instance(value),
        str_from_instance=lambda value: (
            ["None"] if value is None else inner.str_from_instance(value)
        ),
    )


@_registry.primitive_rule
def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """An empty path, as of a variable of the shell that is not set, is not the working folder."""
    if info.type is not Path:
        return None

    def read(given: list[str]) -> Path:
        if not given[0]:
            raise ValueError("a path must not be empty")
        return Path(given[0])

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


@_registry.primitive_rule
def _count(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    """An integer may be written as 1e6, too."""
    if info.type is not int:
        return None

    def read(given: list[str]) -> int:
        try:
            return int(given[0])
        except ValueError:
            value = float(given[0])
            if not value.is_integer():
                raise
            return int(value)

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    )
