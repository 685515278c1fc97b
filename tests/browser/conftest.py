"""Chromium, driven by Playwright, and pages whose console must stay empty."""

from __future__ import annotations

import contextlib
import importlib.util
import os

import pytest

from fastapi_topaz._cli.demo import serving


def pytest_collection_modifyitems(items):
    reason = None
    if "CHROMIUM" not in os.environ:
        reason = "CHROMIUM does not name the binary: `nox -s browser`"
    elif importlib.util.find_spec("playwright") is None:
        reason = "Playwright is not installed: `nox -s browser`"
    for item in items:
        if reason and "browser" in item.fixturenames:
            item.add_marker(pytest.mark.skip(reason))


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=os.environ["CHROMIUM"])
        yield running
        running.close()


@pytest.fixture
def complaints():
    """
    What the console and the Content-Security-Policy complained about.

    A test that expects a complaint removes it. At the end none may be left.
    """
    found = []
    yield found
    assert found == []


@pytest.fixture
def serve():
    """Serve an application, by default on asyncio; return its URL."""
    with contextlib.ExitStack() as running:
        yield lambda app, backend="asyncio": running.enter_context(
            serving(app, backend)
        )


# After `serve`, so that the pages are closed before their servers are.
@pytest.fixture
def new_page(browser, complaints, serve):
    """Open a page in a context of its own, with these options of Playwright."""
    contexts = []

    def opened(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        # Before the page: its policy applies to reports of violations, too.
        context.add_init_script(
            "document.addEventListener('securitypolicyviolation', (event) =>"
            " console.error('CSP: ' + event.violatedDirective));"
        )
        page = context.new_page()
        page.on("console", lambda message: _heard(complaints, message))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: _dismissed(complaints, dialog))
        return page

    yield opened
    for context in contexts:
        context.close()


def _heard(complaints, message):
    if message.type in {"error", "warning"}:
        complaints.append(message.text)


def _dismissed(complaints, dialog):
    complaints.append(f"a dialog: {dialog.message}")
    dialog.dismiss()
