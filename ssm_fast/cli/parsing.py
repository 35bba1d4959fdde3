"""Reading the command line."""

from __future__ import annotations

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

from ssm_fast.cli.options import COMMANDS

_registry = ConstructorRegistry()


def parse(args: Sequence[str] | None = None) -> Any:
    """The options of the command that is asked for; help and mistakes end the program.

    Args:
        args: The arguments; `sys.argv[1:]` by default.
    """
    with _registry:
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="ssm-fast",
            description="State-space-model policies: training, evaluation and adaptation.",
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
