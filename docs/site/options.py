"""The options of the command line as tables, read from `ssm_fast/cli/options.py` without importing it."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

SOURCE = Path(__file__).parents[2] / "ssm_fast/cli/options.py"
PLACE = re.compile(r"^\*(\w+): `ssm-fast \w+ --help` prints its options\.\*$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the text and the table of a command where the page asks for them."""
    if PLACE.search(markdown) is None:
        return markdown
    nodes = ast.parse(SOURCE.read_text(encoding="utf-8")).body
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    return PLACE.sub(lambda place: described(classes[place[1]]), markdown)


def described(command: ast.ClassDef) -> str:
    """The docstring of a command and a row for each of its options."""
    rows = [
        row(field, text.value.value)
        for field, text in zip(command.body, command.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    ]
    table = ["| option | default | |", "|---|---|---|", *rows] if rows else []
    return "\n".join([ast.get_docstring(command) or "", "", *table])


def row(field: ast.AnnAssign, text: str) -> str:
    """The name of an option, its default in words, and what it is."""
    name, default = f"`--{ast.unparse(field.target)}`", field.value
    shown = "" if default is None else f"`{ast.unparse(default)}`"
    if shown in ("`None`", "`False`"):
        shown = ""
    if "Positional" in ast.unparse(field.annotation):
        name = f"`{ast.unparse(field.target).upper()}`"
    for call in ast.walk(field.annotation):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "_default":
            shown = ast.literal_eval(call.args[0])
    meaning = " ".join(inspect.cleandoc(text).split()).replace("|", "\\|")
    return f"| {name} | {shown} | {meaning} |"
