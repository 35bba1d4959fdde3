"""Settings that were measured, by the name of a task."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import yaml

_FOLDER = files("ssm_fast") / "presets"


def preset_names() -> list[str]:
    """The presets that are there."""
    names = (entry.name for entry in _FOLDER.iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """The options of a preset, by the names that the command line has for them.

    Raises:
        ValueError: There is no such preset.
    """
    if name not in preset_names():
        raise ValueError(f"--preset must be one of {preset_names()}, got {name!r}")
    options: dict[str, Any] = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text("utf-8"))
    return options
