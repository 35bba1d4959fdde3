"""Formulas as MathML, which browsers draw by themselves: no script, and nothing is fetched."""

from __future__ import annotations

import html
import re

from math_core import LatexError, LatexToMathML
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)

_converter = LatexToMathML(fancy_error=False)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces what arithmatex has marked; a formula that is no LaTeX ends the build."""
    try:
        return FORMULA.sub(mathml, content)
    except LatexError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error


def mathml(formula: re.Match[str]) -> str:
    """One formula; a block of its own, which may scroll, where it stood between `$$`."""
    tag, tex = formula[1], html.unescape(formula[2])
    converted = _converter.convert_with_local_state(tex, displaystyle=tag == "div")
    return f'<{tag} class="formula">{converted}</{tag}>'
