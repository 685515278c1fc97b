"""Test that the site has each page and each public name."""

from __future__ import annotations

import contextlib
import inspect
import pkgutil
import re
from pathlib import Path

import yaml

import fastapi_topaz
import fastapi_topaz.exceptions
import fastapi_topaz.testing
import fastapi_topaz.testing.fixtures
from kit.examples import ROOT
from kit.pages import DOCS


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, and ignores the names of Python objects in it."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
SITE = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)


def leaves(nav):
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [leaf for part in parts for leaf in leaves(part)]


def shown():
    """Return the names that the pages of the API show."""
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    return re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)


def test_each_public_name_is_on_one_page_of_the_api():
    expected = {
        f"fastapi_topaz.{name}"
        for name in fastapi_topaz.__all__
        # The page of the exceptions shows their whole module.
        if name not in fastapi_topaz.exceptions.__all__
    }
    expected |= {f"fastapi_topaz.testing.{n}" for n in fastapi_topaz.testing.__all__}
    expected |= {"fastapi_topaz.exceptions", "fastapi_topaz.testing.fixtures"}
    assert sorted(shown()) == sorted(expected)


def test_each_page_of_the_api_links_the_files_with_its_docstrings():
    for page in (DOCS / "reference").glob("*.md"):
        text = page.read_text()
        linked = set(re.findall(r"\]\(\.\./\.\./(fastapi_topaz/[\w/]+\.py)\)", text))
        names = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
        files = {file for name in names if (file := file_of(name)) is not None}
        assert linked == files, page.name


def file_of(name):
    """Return the file that defines a public name. None for an alias of a type."""
    thing = pkgutil.resolve_name(name)
    if not (inspect.ismodule(thing) or inspect.isclass(thing) or callable(thing)):
        return None
    with contextlib.suppress(TypeError):
        file = Path(inspect.getfile(inspect.unwrap(thing)))
        # The package may be installed outside of the repository.
        return file.relative_to(Path(fastapi_topaz.__file__).parents[1]).as_posix()
    return None


def test_each_page_is_in_the_navigation_once():
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    listed = leaves(SITE["nav"])
    assert len(listed) == len(set(listed))
    inside = [leaf for leaf in listed if not leaf.startswith("repository/")]
    assert sorted(inside) == sorted(pages)
    for leaf in set(listed) - set(inside):
        assert (ROOT / leaf.removeprefix("repository/")).exists()


def test_the_site_uses_no_other_host():
    assert "site_url" not in SITE
    assert "repo_url" not in SITE
    assert SITE["theme"]["font"] is False
    text = (ROOT / "mkdocs.yml").read_text()
    assert not re.search(r"https?://", text)


def test_git_ignores_the_built_site():
    top = SITE["site_dir"].partition("/")[0]
    assert f"{top}/" in (ROOT / ".gitignore").read_text().splitlines()
