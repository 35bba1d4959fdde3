"""Reading the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from types import UnionType
from typing import Any, Union, get_args

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

import ssm_fast
from ssm_fast.cli.messages import say
from ssm_fast.cli.options import COMMANDS

_registry = ConstructorRegistry()


def parse(args: Sequence[str] | None = None) -> Any:
    """The options of the command that is asked for; help and mistakes end the program.

    Args:
        args: The arguments; `sys.argv[1:]` by default.
    """
    if list(sys.argv[1:] if args is None else args) == ["--version"]:
        say(f"ssm_fast {ssm_fast.__version__}")
        raise SystemExit(0)
    with _registry:
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="ssm-fast",
            description="State-space-model policies: training, evaluation and adaptation. "
            "`ssm-fast --version` says which version this is.",
            args=args,
        )


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
