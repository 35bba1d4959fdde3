"""Shows files from outside of docs/ that the pages link to, so that one link serves site and repository.

A link leads where it leads in the repository: README.md is the first page, Python files and
notebooks become pages, a folder is its README.md, and anything else is copied.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
ALWAYS = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")

_sources: dict[str, str] = {}  # from the address of a page in the site to its path here


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what is linked to, and what that links to."""
    waiting = [*ALWAYS, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        address = address_of(path)
        _sources[address] = path
        if not path.startswith("docs/"):
            files.append(shown(path, address, config))
        if path.endswith(".md"):
            text = (ROOT / path).read_text(encoding="utf-8")
            targets = (target_of(path, link[1]) for link in LINK.finditer(text))
            waiting += [target for target in targets if target is not None]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links of the repository into links of the site."""
    here = page.file.src_uri
    path = _sources[here]

    def moved(link: re.Match[str]) -> str:
        target = target_of(path, link[1])
        if target is None:
            return link[0]  # a page beside this one, or no link at all
        address = posixpath.relpath(address_of(target), posixpath.dirname(here) or ".")
        return f"]({address}{link[2] or ''})"

    return LINK.sub(moved, markdown) if path.endswith(".md") else markdown


def target_of(path: str, link: str) -> str | None:
    """The file that a link of the file `path` leads to, unless both are in docs/."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    if (ROOT / target).is_dir():
        target = f"{target}/README.md"
    inside = path.startswith("docs/") and target.startswith("docs/")
    return target if not inside and (ROOT / target).is_file() else None


def address_of(path: str) -> str:
    """Where the site has a file of the repository."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{path}.md" if path.endswith((".py", ".ipynb")) else path


def shown(path: str, address: str, config: MkDocsConfig) -> File:
    """A file of the repository as the site has it."""
    source = ROOT / path
    if path.endswith(".py"):
        return File.generated(config, address, content=f"# {path}\n\n{block(source.read_text())}")
    if path.endswith(".ipynb"):
        return File.generated(config, address, content=notebook(source))
    return File.generated(config, address, abs_src_path=str(source))


def notebook(source: Path) -> str:
    """The cells of a notebook, without their outputs."""
    cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return "\n\n".join(text if kind == "markdown" else block(text) for kind, text in texts)


def block(code: str) -> str:
    """Python code as a block of Markdown."""
    return f"````python\n{code.rstrip()}\n````\n"
