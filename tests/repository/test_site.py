"""
Test the built site: its links, that it needs no other host, and the API.

`nox -s docs` builds it, and sets SITE to its folder.
"""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from kit.examples import ROOT
from kit.pages import DOCS


SITE = Path(os.environ.get("SITE", "nowhere"))

pytestmark = pytest.mark.skipif(
    "SITE" not in os.environ, reason="SITE names no built site: `nox -s docs` has one"
)

LOADED = {"link": "href", "script": "src", "img": "src", "iframe": "src"}
"""The elements that make a browser load something."""
NOT_LOADED = {
    "": "a comment",
    "mermaid": "the site has the script, and loads it first",
    "repos": "only if mkdocs.yml has a repo_url",
    "resize-observer-polyfill": "only if a browser lacks this class",
    "users": "only if mkdocs.yml has a repo_url",
}
"""What the scripts of the theme name on other hosts, and why they do not load it."""


class Page(HTMLParser):
    """The ids, links and loaded files of a page."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.ids, self.links, self.loaded, self.classes = set(), [], [], set()
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.classes.update((found.get("class") or "").split())
        self.ids.update(filter(None, (found.get("id"), found.get("name"))))
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        # A canonical link or a link to the next page loads nothing.
        if tag in LOADED and found.get("rel") not in {"canonical", "next", "prev"}:
            self.loaded += filter(None, [found.get(LOADED[tag])])


@pytest.fixture(scope="module")
def pages():
    # In 404.html all links begin at the root of the server.
    files = [path for path in SITE.rglob("*.html") if path.name != "404.html"]
    return {path.resolve(): Page(path) for path in files}


def test_each_link_and_anchor_has_a_target(pages):
    for page in pages.values():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme:
                continue
            target = (page.path.parent / unquote(url.path)).resolve()
            target = target if url.path else page.path.resolve()
            assert target.exists(), f"{page.path}: {link}"
            if url.fragment and target in pages:
                anchor = unquote(url.fragment)
                assert anchor in pages[target].ids, f"{page.path}: {link}"


def test_each_page_of_the_documentation_is_in_the_site(pages):
    for page in DOCS.rglob("*.md"):
        path = SITE / page.relative_to(DOCS).with_suffix(".html")
        assert path.resolve() in pages, page


def test_a_page_loads_nothing_from_another_host(pages):
    for page in pages.values():
        for loaded in page.loaded:
            url = urlsplit(loaded)
            assert url.netloc == "", page.path
            assert url.scheme in {"", "data"}, page.path
            if url.path and not url.scheme:
                assert (page.path.parent / unquote(url.path)).exists(), page.path
        assert "@import" not in page.text


def test_a_style_loads_nothing_from_another_host():
    for style in SITE.rglob("*.css"):
        for target in re.findall(r"url\(([^)]*)\)|@import ([^;]*)", style.read_text()):
            assert not re.match(r"""["']?(https?:)?//""", "".join(target)), style


def test_the_scripts_of_the_theme_know_nothing_else_on_other_hosts():
    found = set()
    for script in SITE.glob("assets/javascripts/*.js"):
        found.update(re.findall(r"https://[\w.]+/([\w-]*)", script.read_text()))
    assert found <= NOT_LOADED.keys()


def test_the_site_has_the_script_of_each_diagram(pages):
    with_diagram = [page for page in pages.values() if "mermaid" in page.classes]
    if "MERMAID" not in os.environ:
        assert with_diagram == []  # The theme would load the script from another host.
        pytest.skip("MERMAID names no script, so the diagrams are shown as text")
    assert {page.path.stem for page in with_diagram} == {"how-it-works"}
    for page in with_diagram:
        assert any(name.endswith("assets/mermaid.min.js") for name in page.loaded)


def test_the_site_has_both_colour_schemes_and_a_switch(pages):
    for page in pages.values():
        assert 'data-md-color-scheme="default"' in page.text
        assert 'data-md-color-scheme="slate"' in page.text
        assert page.text.count('name="__palette"') == 2


def test_the_search_finds_each_page(pages):
    index = json.loads((SITE / "search" / "search_index.json").read_text())
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    names = {path.relative_to(SITE.resolve()).as_posix() for path in pages}
    # The first page has the empty location.
    assert names - {"index.html"} <= found | {"index.html"}


def test_each_public_name_and_member_is_shown(pages):
    surface = (ROOT / "tests" / "repository" / "surface.txt").read_text()
    names = surface.partition("# loggers")[0]
    public = set(
        re.findall(r"^(?:class |async )?(fastapi_topaz\.[\w.]+)", names, re.MULTILINE)
    )
    sections = {}
    for page in pages.values():
        if page.path.parent.name == "reference":
            for part in re.split(r'(?=<h[2-6] id=")', page.text)[1:]:
                sections[part.split('"')[1]] = part
    missing = [name for name in sorted(public) if not is_shown(name, sections)]
    assert missing == []


def is_shown(name, sections):
    """Return whether a heading or the text of its class shows a public name."""
    # Errors are public in two modules, and shown once.
    public = {
        name,
        re.sub(r"^fastapi_topaz\.(?=[A-Z])", "fastapi_topaz.exceptions.", name),
    }
    if public & set(sections):
        return True
    owner, _, last = name.rpartition(".")
    # Long names of the members of an enum have the same numbers as the short ones.
    last = last.removeprefix("IDENTITY_TYPE_")
    text = sections.get(owner, "")
    short = f"{owner}.{last}" in sections or last == "UNKNOWN"
    return short or bool(re.search(rf"<code>(<span[^>]*>)?{last}<", text))
