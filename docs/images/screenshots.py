"""
Makes the pictures of docs/command-line.md: `python docs/images/screenshots.py`.

They show the real output of the commands, against an embedded authorizer.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import re
import tempfile

import anyio
from rich.console import Console

from fastapi_topaz import AuthorizerOptions
from fastapi_topaz._cli import demo_command, doctor_command, load_command
from fastapi_topaz._cli.doctor.context import Settings
from fastapi_topaz._cli.load import Plan, Tally, run
from fastapi_topaz.testing import EmbeddedAuthorizer


HERE = pathlib.Path(__file__).resolve().parent
POLICIES = {"myapp.GET.documents": True, "myapp.POST.documents": False}


def console() -> Console:
    """Return a console that records."""
    return Console(
        file=io.StringIO(),
        record=True,
        width=100,
        color_system="truecolor",
        highlight=False,
    )


def save(recorded: Console, name: str, line: str) -> None:
    """Write what *recorded* printed, with the command line as its title."""
    svg = recorded.export_svg(title=f"fastapi-topaz-pool {line}", unique_id=name)
    # Without the fonts, which a browser would load from another server.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    (HERE / f"{name}.svg").write_text(svg)


def doctor() -> None:
    """Draw `doctor`: the CA file is another one, and so is the policy root."""
    with (
        EmbeddedAuthorizer(POLICIES, tls=True, max_concurrent_streams=100) as topaz,
        EmbeddedAuthorizer(tls=True) as other,
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
    ):
        path = pathlib.Path("ca.pem")
        path.write_bytes(pathlib.Path(other.ca_cert_path or "").read_bytes())
        settings = Settings(
            url=f"localhost:{topaz.port}",
            cert_file_path=str(path),
            policy_root="shop",
        )
        recorded = console()
        doctor_command.new_console = lambda: recorded
        doctor_command.diagnose(settings, as_json=False, backend="asyncio")
    save(recorded, "doctor", "doctor --cert ca.pem --policy-root shop")


def demo() -> None:
    """Draw `demo`."""
    recorded = console()
    demo_command.new_console = lambda: recorded
    show = demo_command.Show(
        options=None,
        policy_root="myapp",
        requests=2000,
        concurrency=50,
        streams=1,
        has_faults=True,
    )
    demo_command.show_demo(show, "asyncio")
    save(recorded, "demo", "demo")


def load() -> None:
    """Draw `load` while it runs."""
    recorded = console()
    with EmbeddedAuthorizer(POLICIES) as topaz:
        options = AuthorizerOptions(url=topaz.url, insecure=True)
        settings = load_command.LoadSettings(
            options=options,
            plan=Plan(duration=10, rate=400),
            policy_path="myapp.GET.documents",
            check_timeout=5,
            connections=10,
            streams=10,
            allows_remote=False,
            as_json=False,
        )
        picture = anyio.run(_picture, settings)
    recorded.print(picture)
    line = "load --insecure --policy-path myapp.GET.documents --rate 400"
    save(recorded, "load", line)


async def _picture(settings: load_command.LoadSettings) -> object:
    config = load_command.configured(settings)
    tally, pace = Tally(), load_command.Pace()
    async with config.connection_pool as pool, anyio.create_task_group() as tasks:
        call = load_command.caller(settings, config)
        tasks.start_soon(run, settings.plan, call, tally)
        for second in range(1, 5):
            await anyio.sleep(1)
            rate = pace.now(tally, second)
        status = pool.status()
        picture = load_command.dashboard(settings, tally, status, second, rate)
        tasks.cancel_scope.cancel()
    return picture


if __name__ == "__main__":
    doctor()
    demo()
    load()
