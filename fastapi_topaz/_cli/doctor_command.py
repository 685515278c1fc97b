"""The command `doctor`: it runs the checks and prints what they found."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any, Final

import anyio
import attrs
from rich.table import Table
from rich.text import Text

from fastapi_topaz._cli.doctor.checkup import examine
from fastapi_topaz._cli.doctor.findings import Level
from fastapi_topaz._cli.output import Causes, new_console, say


if TYPE_CHECKING:
    from rich.console import Console

    from fastapi_topaz._cli.doctor.context import Settings
    from fastapi_topaz._cli.doctor.findings import Finding, Report


__all__ = ["diagnose", "findings_table", "merged", "verdict"]


_FIELDS: Final = {
    "cert": "cert_file_path",
    "client_cert": "client_cert_path",
    "client_key": "client_key_path",
}
"""The settings of options that have another name."""

_OF_TLS: Final = (
    *("cert_file_path", "client_cert_path", "client_key_path"),
    "server_name",
)

_STYLES: Final = {
    Level.OK: "green",
    Level.SKIPPED: "dim",
    Level.WARNING: "yellow",
    Level.PROBLEM: "bold red",
}


def merged(
    settings: Settings, theirs: dict[str, Any], given: dict[str, Any]
) -> Settings:
    """
    Return the settings of an application, with options of the command line.

    The environment does not take precedence over the application: it asks with its own
    settings.

    Args:
        settings: All options, with their defaults.
        theirs: The settings of the application.
        given: The options that were given on the command line, by name.
    """
    ours = {_FIELDS.get(name, name) for name in given}
    if given.get("insecure"):
        # Without TLS, the application's options of TLS mean nothing.
        theirs = theirs | dict.fromkeys(_OF_TLS)
    elif not ours.isdisjoint(_OF_TLS):
        theirs = theirs | {"insecure": False}
    rest = {name: value for name, value in theirs.items() if name not in ours}
    return attrs.evolve(settings, **rest)


def diagnose(settings: Settings, *, as_json: bool, backend: str) -> int:
    """Run all checks, print the report, and return the exit code."""
    console = new_console()
    spinner = console.status("Checking")

    async def run() -> Report:
        return await examine(
            settings, progress=lambda name: spinner.update(f"Checking: {name}")
        )

    # The checks log nothing, but the libraries below them may.
    with Causes(), contextlib.ExitStack() as showing:
        if console.is_terminal and not as_json:
            showing.enter_context(spinner)
        report = anyio.run(run, backend=backend)
    if as_json:
        sys.stdout.write(f"{json.dumps(report.as_dict(), indent=2)}\n")
    else:
        show(console, report)
    return report.exit_code


def show(console: Console, report: Report) -> None:
    """Print the report."""
    console.print(findings_table(report))
    say(console, "", verdict(report))


def findings_table(report: Report) -> Table:
    """Return all findings, each problem with its remedy below."""
    table = Table.grid(padding=(0, 2))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for each in report.findings:
        style = _STYLES[each.level]
        table.add_row(Text(each.level, style), Text(each.id, style), _said(each))
    return table


def _said(finding: Finding) -> Text:
    where = f"{', '.join(finding.addresses)}: " if finding.addresses else ""
    text = Text(f"{where}{finding.summary}.")
    if finding.remedy and finding.level in {Level.WARNING, Level.PROBLEM}:
        text.append(f"\nRemedy: {finding.remedy}", "bold")
    return text


def verdict(report: Report) -> str:
    """Return the last line of the report."""
    match report.problems:
        case 0:
            return "No problem found."
        case 1:
            return "1 problem found."
        case number:
            return f"{number} problems found."
