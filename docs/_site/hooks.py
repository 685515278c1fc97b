"""
Hooks of MkDocs: the files outside `docs/` that pages link, and Mermaid.

Pages link files such as `../examples/gunicorn.conf.py`, so that the links work in the
repository. The site has no such folder. So the linked files become pages below
`repository/`, and the links are changed to these.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files


if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[2]
ASIDE = "repository"
"""The folder of the site for files outside `docs/`."""

LINK = re.compile(r"\]\((?![a-z]+:|#|/)([^)\s#]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json"}
IMAGES = {".png", ".svg"}

MERMAID = os.environ.get("MERMAID")
"""The path of `mermaid.min.js`. Without it, diagrams are shown as text."""
SCRIPT = "assets/mermaid.min.js"


def on_config(config: MkDocsConfig) -> None:
    """Use the local Mermaid. Otherwise the theme would fetch it from another host."""
    if MERMAID:
        config.extra_javascript.append(SCRIPT)
    else:
        config.mdx_configs["pymdownx.superfences"]["custom_fences"].clear()


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add each file outside `docs/` that a page links, and those that it links."""
    linking = [f"docs/{file.src_uri}" for file in files if file.is_documentation_page()]
    linking += [name for name in _named(config.nav) if name not in linking]
    found: set[str] = set()
    while linking:
        path = linking.pop()
        if not path.startswith("docs/") and path not in found:
            found.add(path)
            files.append(_file(path, config))
        if path.endswith(".md"):
            text = (ROOT / path).read_text()
            linked = {_linked(path, link) for link, _ in LINK.findall(text)}
            linking += filter(_is_added, linked - found)


def _named(nav: object) -> list[str]:
    """Return the files outside `docs/` that are named in *nav*."""
    if isinstance(nav, str):
        inside = nav.startswith(f"{ASIDE}/")
        return [nav.removeprefix(f"{ASIDE}/")] if inside else []
    parts = nav.values() if isinstance(nav, dict) else nav or []
    return [name for part in parts for name in _named(part)]


def _linked(path: str, link: str) -> str:
    """Return the path in the repository that *link* of the file *path* leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def _is_added(path: str) -> bool:
    return not path.startswith(("docs/", "..")) and (ROOT / path).is_file()


def _uri(path: str) -> str:
    """Return the source of the site for a path in the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    is_source = not path.endswith((".md", *IMAGES))
    return f"{ASIDE}/{path}" + (".md" if is_source else "")


def _file(path: str, config: MkDocsConfig) -> File:
    source = ROOT / path
    if source.suffix in {".md", *IMAGES}:
        return File.generated(config, _uri(path), abs_src_path=str(source))
    language = LANGUAGES.get(source.suffix, "text")
    text = source.read_text()
    page = f"# {path}\n\n`````{language}\n{text.rstrip()}\n`````\n"
    return File.generated(config, _uri(path), content=page)


def on_page_markdown(
    markdown: str, *, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Change links to files outside `docs/`. A link to a folder becomes its text."""
    del config
    uri = page.file.src_uri
    inside = not uri.startswith(f"{ASIDE}/")
    path = f"docs/{uri}" if inside else uri.removeprefix(f"{ASIDE}/")

    def change(match: re.Match[str]) -> str:
        target = _linked(path, match[1])
        if (inside and target.startswith("docs/")) or not (ROOT / target).exists():
            return match[0]
        source = _uri(target)
        if files.get_file_from_path(source) is None:
            return "]"
        here = posixpath.relpath(source, posixpath.dirname(uri) or ".")
        return f"]({here}{match[2] or ''})"

    return LINK.sub(change, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Copy the script of Mermaid into the site."""
    if MERMAID:
        target = Path(config.site_dir, SCRIPT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(MERMAID, target)
