"""Test that the page about the command line says what the commands do."""

from __future__ import annotations

import json
import re
import shlex
import socket

import anyio
import pytest
from typer.main import get_command

from fastapi_topaz._cli.commands import commands
from fastapi_topaz._cli.doctor.checkup import examine
from fastapi_topaz._cli.doctor.context import Settings
from fastapi_topaz._cli.doctor.findings import CATALOGUE, Level
from kit.examples import ROOT


PAGE = (ROOT / "docs" / "command-line.md").read_text()
COMMANDS = get_command(commands).commands


@pytest.fixture
def nothing_listens():
    """Yield an address that refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def options_of(command):
    return {
        flag for each in command.params for flag in (*each.opts, *each.secondary_opts)
    }


def test_the_table_lists_each_finding_with_its_level_and_remedy():
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \| (.+) \|$", PAGE, re.MULTILINE)
    assert rows == [
        (name, level.value, remedy)
        for name, (level, remedy) in CATALOGUE.items()
        if remedy
    ]


def test_the_finding_in_json_is_a_real_one(nothing_listens):
    [shown] = re.findall(r"```json\n(.+?)```", PAGE, re.DOTALL)
    report = anyio.run(examine, Settings(url=nothing_listens, insecure=True))
    [finding] = [each for each in report.findings if each.level is Level.PROBLEM]
    real = json.dumps(finding.as_dict(), indent=2)
    assert shown.strip() == real.replace(nothing_listens, "127.0.0.1:8282")


def test_each_command_has_a_section():
    sections = re.findall(r"^## `(\w+)`", PAGE, re.MULTILINE)
    assert sections == ["doctor", "routes", "load", "demo"]
    assert set(COMMANDS) == set(sections)


@pytest.mark.parametrize(
    "line", re.findall(r"^fastapi-topaz-pool .+$", PAGE, re.MULTILINE)
)
def test_each_command_line_has_only_options_that_exist(line):
    _, name, *arguments = shlex.split(line)
    # It raises an error of wrong usage.
    COMMANDS[name].make_context(name, arguments)


def test_each_option_on_the_page_exists():
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE))
    every = {flag for command in COMMANDS.values() for flag in options_of(command)}
    assert named <= every


def test_each_picture_exists_and_loads_nothing_from_elsewhere():
    pictures = re.findall(r"\]\((images/\w+\.svg)\)", PAGE)
    assert len(pictures) == 3
    for picture in pictures:
        svg = (ROOT / "docs" / picture).read_text()
        urls = set(re.findall(r"https?://[^\s\"')]+", svg))
        assert urls <= {"http://www.w3.org/2000/svg", "https://www.textualize.io"}
