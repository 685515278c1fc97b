"""
The code blocks of the pages, and a walk through a page that runs them as printed.

The info string of a block, and a comment before it, say what a walk does with it:

    ```python title="main.py"            is written to that file
    ```console                           is run in the first terminal
    ```console title="Second terminal"   is run in another terminal, not awaited
    ```text                              is what the commands before it have printed
    <!-- not run: REASON -->             the next block is not run
    <!-- stop: Second terminal -->       Ctrl-C in that terminal
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import signal
import socket
import subprocess
import textwrap
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

import attrs
import pytest

from .examples import ROOT
from .waiting import until


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>\w*)(?P<info>[^\n`]*)\n"
    r"(?P<code>.*?)^(?P=indent)(?P=fence) *$",
    re.DOTALL | re.MULTILINE,
)
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*\Z")
STOP = re.compile(r"<!-- stop: (.+?) -->\s*\Z")
TITLE = re.compile(r'title="([^"]+)"')

LISTENERS = {"topazd": 8282, "uvicorn": 8000, "gunicorn": 8000}
"""The port on which a program of a page listens when it is ready."""

PATIENCE = 60.0
"""Seconds that a program may take to start and to end."""
COMMAND = 150.0
"""Seconds that a command may take. One of the tutorial installs packages."""


@attrs.frozen
class Block:
    """A code block of a page."""

    page: str
    line: int
    language: str
    code: str
    title: str | None = None
    not_run: str | None = None
    """The reason, if the block cannot be run."""
    stop: str | None = None
    """The terminal that is stopped before the block."""

    @property
    def id(self) -> str:
        """The name of the block, for ids of tests."""
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return the code blocks of *page*, also those in lists."""
    text = page.read_text()
    found = []
    end = 0
    for match in FENCE.finditer(text):
        between = text[end : match.start()]
        end = match.end()
        title, not_run, stop = (
            each[1] if each else None
            for each in (
                TITLE.search(match["info"]),
                NOT_RUN.search(between),
                STOP.search(between),
            )
        )
        found.append(
            Block(
                page=page.relative_to(ROOT).as_posix(),
                line=text.count("\n", 0, match.start()) + 1,
                language=match["language"],
                code=textwrap.dedent(match["code"]),
                title=title,
                not_run=not_run,
                stop=stop,
            )
        )
    return found


def codes(page: Path, language: str) -> list[str]:
    """Return the texts of the blocks of *page* in *language*."""
    return [block.code for block in blocks(page) if block.language == language]


def is_terminal(title: str | None) -> bool:
    """Return whether a block with this title is run in a terminal of its own."""
    return title is not None and title.endswith("terminal")


class Terminal:
    """A shell that keeps its folder and its environment between blocks."""

    def __init__(self, home: Path, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=home,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            start_new_session=True,
        )
        self._numbers = itertools.count()

    def send(self, code: str) -> str:
        """Send commands, and return the text that is printed when they have ended."""
        end = f"--- end {next(self._numbers)} ---"
        # Not from the standard input, because that has the next commands.
        line = f"{{ set -e\n{code}\n}} </dev/null\nprintf '\\n%s\\n' '{end}'\n"
        self._process.stdin.write(line)
        self._process.stdin.flush()
        return end

    def run(self, code: str) -> str:
        """Run commands, and return their output. If one fails, the test fails."""
        end, printed = self.send(code), []
        # A command that hangs is ended, and the loop with it.
        watchdog = threading.Timer(COMMAND, self.kill)
        watchdog.start()
        try:
            for line in self._process.stdout:
                if line.rstrip("\n") == end:
                    return "".join(printed).removesuffix("\n")
                printed.append(line)
        finally:
            watchdog.cancel()
        pytest.fail(f"{code}failed:\n{''.join(printed)}")

    def interrupt(self) -> None:
        """Send Ctrl-C to the program that runs in the terminal, and await its end."""
        children = f"/proc/{self._process.pid}/task/{self._process.pid}/children"
        (child,) = Path(children).read_text().split()
        os.kill(int(child), signal.SIGINT)
        until(lambda: child not in Path(children).read_text().split(), PATIENCE)

    def kill(self) -> None:
        """End the shell and everything that runs in it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> str:
        """End everything that runs in the terminal, and return what it printed."""
        # Programs get the signal of a stop first, so that they end what they started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.communicate(timeout=20)[0]
        self.kill()
        return self._process.communicate()[0]


class Walk:
    """
    Runs the blocks of a page in a folder, in their order, as printed.

    Only ports differ: the test replaces each port of 127.0.0.1 by a free one.

    Args:
        page: The page.
        home: The folder in which each terminal starts.
        env: The environment of the commands.
        ports: Ports of the page that are replaced by these.
    """

    def __init__(
        self,
        page: Path,
        home: Path,
        env: Mapping[str, str],
        ports: Mapping[int, int] | None = None,
    ) -> None:
        self.page = page
        self.home = home
        self.ports = dict(ports or {})
        self._env = dict(env)
        self._printed = ""
        self._terminals: dict[str | None, Terminal] = {}
        self._free = contextlib.ExitStack()

    def __enter__(self) -> Self:
        for port in self._mentioned():
            if port not in self.ports:
                listener = self._free.enter_context(
                    socket.create_server(("127.0.0.1", 0))
                )
                self.ports[port] = listener.getsockname()[1]
        self._free.close()
        # The port of `uvicorn main:app` is not in the command.
        self._env["UVICORN_PORT"] = str(self.ports.get(8000, 8000))
        return self

    def __exit__(self, *_: object) -> None:
        for name, terminal in self._terminals.items():
            print(f"--- {name or 'First terminal'}\n{terminal.close()}")  # noqa: T201

    def _mentioned(self) -> Iterator[int]:
        """Yield each port of the page and of the files that it copies."""
        yield from LISTENERS.values()
        copied = ROOT / "examples" / "quickstart" / "topaz.yaml"
        texts = [block.code for block in blocks(self.page)] + [copied.read_text()]
        for text in texts:
            yield from map(int, re.findall(r"(?:127\.0\.0\.1|localhost):(\d{4})", text))

    def here(self, text: str) -> str:
        """Return *text* with the ports of this walk."""

        def change(match: re.Match[str]) -> str:
            return str(self.ports.get(int(match[0]), match[0]))

        return re.sub(r"(?<=:)\d{4}\b", change, text)

    def as_printed(self, text: str) -> str:
        """Return *text* with the ports of the page, and without times."""
        for port, mine in self.ports.items():
            text = text.replace(f":{mine}", f":{port}")
        return re.sub(r"\bin \d+\.\d\ds", "in 0.00s", text)

    def run(self) -> None:
        """Run all blocks of the page."""
        for block in blocks(self.page):
            self._step(block)

    def _step(self, block: Block) -> None:
        if block.stop:
            self._terminals[block.stop].interrupt()
        if block.not_run:
            return
        if block.language == "console":
            self._command(block)
        elif block.title:
            file = self._folder() / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(self.here(block.code))
        elif block.language == "text":
            printed = self.as_printed(self._printed)
            assert printed.rstrip("\n") == self.as_printed(block.code).rstrip("\n")

    def _folder(self) -> Path:
        return Path(self._terminal(None).run("pwd").strip())

    def _terminal(self, title: str | None) -> Terminal:
        if title not in self._terminals:
            self._terminals[title] = Terminal(self.home, self._env)
        return self._terminals[title]

    def _command(self, block: Block) -> None:
        terminal = self._terminal(block.title)
        code = self.here(block.code)
        if not is_terminal(block.title):
            self._printed = terminal.run(code)
            if re.search(r"^cp .*topaz.yaml", code, re.MULTILINE):
                # The copy listens on the ports of the page, too.
                file = self._folder() / "topaz.yaml"
                file.write_text(self.here(file.read_text()))
            return
        *_, last = code.strip().splitlines()
        port = self.ports[LISTENERS[shlex.split(last)[0]]]
        terminal.send(code)
        until(lambda: listens(port), PATIENCE)


def listens(port: int) -> bool:
    """Return whether a server accepts connections on *port*."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
