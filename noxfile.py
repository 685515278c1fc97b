"""
The sessions of nox. `nox` runs the checks of every change.

`nox -s nightly` runs the long checks. `nox -s tests` runs the tests on every Python
that is found.
"""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nox


nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True

SUPPORTED = ["3.11", "3.12", "3.13", "3.14"]
# The lower bounds of pyproject.toml. The resolver itself would choose newer versions.
OLDEST = [
    "anyio==4.16.0",
    "attrs==24.2.0",
    "aserto-authorizer==0.20.7",
    "fastapi==0.115.0",
    "grpcio==1.80.0",
    "hpack==4.1.0",
    "opentelemetry-api==1.30.0",
    "opentelemetry-sdk==1.30.0",
    "opentelemetry-exporter-prometheus==0.51b0",
    "protobuf==6.30.1",
    "starlette==0.37.2",
    "trio==0.32.0",
]

# FastAPI before and after a change of its routing. pip chooses the Starlette for each.
FASTAPI = ["0.115.0", "0.136.*", "0.137.0", "newest"]
FASTAPI_TESTS = [
    "tests/_app",
    "tests/_authorizer/test_rego.py",
    "tests/behaviour/test_status.py",
    "tests/repository/test_guide.py",
    "tests/testing/test_unguarded.py",
]

OVER_GRPCIO = "not slow and not soak and not nightly and not native"
"""The tests that `grpcio` runs, as an expression of pytest."""

# A release whose Go module and dependencies can be downloaded. The checksum of its
# files was recorded when it was pinned here.
TOPAZ = "github.com/aserto-dev/topaz"
TOPAZ_RELEASE = "v0.32.58"
TOPAZ_SUM = "h1:ffw6MPHhfMn268z+NqmFmBR6fqrr4uHKOCiqhxWdGi4="

# The package of npm that draws the diagrams of the documentation, and the SHA-256 of
# its script.
MERMAID = "mermaid@11.17.2"
MERMAID_SUM = "581ed7d74bd9048d0e3a91363927d72ef22942d7722546b27f7cc29e35390eb8"


def found_pythons() -> list[str]:
    """Return every supported Python version that starts on this machine."""
    # pyenv may have versions that its own `pythonX.Y` command refuses to start.
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in SUPPORTED:
        for aside in sorted(root.glob(f"{version}.*/bin")):
            os.environ["PATH"] = f"{aside}{os.pathsep}{os.environ['PATH']}"
    return [version for version in SUPPORTED if starts(f"python{version}", "-c", "")]


def starts(*command: str) -> bool:
    """Return whether *command* runs without an error."""
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def told(
    session: nox.Session, option: str, default: str, given: list[str] | None = None
) -> tuple[str, list[str]]:
    """Return the value of *option*, and the other arguments after `--`."""
    parser = argparse.ArgumentParser()
    parser.add_argument(option, default=default)
    options, rest = parser.parse_known_args(session.posargs if given is None else given)
    return getattr(options, option.removeprefix("--")), rest


PYTHONS = found_pythons()
RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"

# These sessions do not judge times, so they pass on a slow machine. Sessions that take
# long are in `nightly`.
nox.options.sessions = [
    "lint",
    "typing",
    "package",
    "alerts",
    "topaz",
    "demo",
    "docs",
    "fastapi",
    "oldest",
    # The command in the README runs the tests on the Python that runs nox.
    *(f"tests-{python}" for python in PYTHONS[-1:] if python != RUNNING),
    "grpcio",
    "slow",
    "gopeer",
    "proxies",
    "browser",
    "shuffled",
    "soak",
    "bench",
]

# The sessions of `nightly`, with their arguments. The seed changes every day.
TODAY = str(dt.datetime.now(dt.UTC).date().toordinal())
NIGHTLY = {
    "soak": ["--minutes", "30", "--seed", TODAY],
    "model": ["--seed", TODAY],
    "shuffled": ["--shuffle=100"],
    "mutants": ["state", "pool"],
    "oracles": [],
    "atheris": [],
    "proxies": ["--transport", "grpcio"],
    "prometheus": [],
    "redis": [],
    **{f"tests-{python}": [] for python in PYTHONS[:-1] if python != RUNNING},
    "bench": ["--full"],
    "fleet": ["--full", "--seed", TODAY],
}
# Small sizes, which only show that each session runs.
NIGHTLY_QUICK = {
    "soak": ["--minutes", "1"],
    "model": ["--hypothesis-profile=unhurried"],
    "shuffled": ["--shuffle=1"],
    "mutants": ["state", "--modules", "backoff"],
    "oracles": ["--share", "0.1", "-k", "not overload and not fleet"],
    "atheris": ["--seconds", "10"],
    "proxies": ["--transport", "grpcio"],
    "prometheus": [],
    "redis": [],
    "bench": [],
    "fleet": [],
}


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    session.install("--group", "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def typing(session: nox.Session) -> None:
    """Check the types of the package, of its public names and of a user's program."""
    session.install(".", "--group", "typing")
    session.run("mypy")
    python = session.virtualenv.bin + "/python"
    session.run("pyright", "--pythonpath", python)
    session.run("pyright", "--project", "benchmarks", "--pythonpath", python)
    # In another folder, so that pyright checks the installed package.
    with session.chdir(session.create_tmp()):
        session.run("pyright", "--ignoreexternal", "--verifytypes", "fastapi_topaz")
    session.run("python", "tests/repository/snippets.py")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the tests on each Python that is found."""
    # Not editable, so that a wheel is tested and not the sources beside the tests: the
    # one in WHEEL, or a new one.
    session.install(os.environ.get("WHEEL", "."), "--group", "test")
    session.run("pytest", *session.posargs)


@nox.session(python=False)
def nightly(session: nox.Session) -> None:
    """
    Run the long checks: soak, models, mutants, oracles, benchmarks and more.

    `-- soak mutants` runs only these parts. `-- --quick` runs each with a small size.
    Each part is a session of its own, and runs even if another one failed. At the end,
    nox lists the result and duration of each part.
    """
    parser = argparse.ArgumentParser(prog="nox -s nightly --")
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(NIGHTLY)}")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(session.posargs)
    if unknown := set(options.parts) - set(NIGHTLY):
        session.error(f"no part is called {', '.join(unknown)}: {', '.join(NIGHTLY)}")
    for part, given in (NIGHTLY_QUICK if options.quick else NIGHTLY).items():
        if not options.parts or part in options.parts:
            session.notify(part, given)


@nox.session
def fastapi(session: nox.Session) -> None:
    """Run the FastAPI tests on several versions of FastAPI. For one: `-- 0.137.0`."""
    # One virtualenv for all versions, because only FastAPI and Starlette change.
    session.install("-e", ".", "--group", "test")
    failed = []
    for version in session.posargs or FASTAPI:
        wanted = "fastapi" if version == "newest" else f"fastapi=={version}"
        # Starlette is named, because pip otherwise keeps the installed one if it can.
        session.install("--upgrade", wanted, "starlette")
        # Deprecation warnings inside the oldest libraries cannot be fixed here.
        warnings = ["-W", "default"] if version == FASTAPI[0] else []
        try:
            session.run("pytest", *warnings, *FASTAPI_TESTS)
        except nox.command.CommandFailed:
            failed.append(version)
    if failed:
        session.error(f"the tests fail with FastAPI {', '.join(failed)}")


@nox.session
def grpcio(session: nox.Session) -> None:
    """Run the tests of behaviour and of faults over `grpcio`, on asyncio."""
    session.install("-e", ".", "--group", "test")
    environment = {"FASTAPI_TOPAZ_TRANSPORT": "grpcio"}
    if topazd := found_topazd(Path(session.cache_dir).resolve() / "topazd"):
        environment["TOPAZD"] = topazd
    files = ["_app", "_authorizer", "_grpcio", "_telemetry", "behaviour", "testing"]
    files += ["transports"]
    names = ["cancel_everywhere", "cancel_outcomes", "cancel_steps"]
    files += [f"proof/test_{name}.py" for name in names]
    paths = [f"tests/{name}" for name in files]
    chosen = ("-n4", "-m", OVER_GRPCIO)
    session.run("pytest", *chosen, *paths, *session.posargs, env=environment)
    if binary := built_gopeer(Path(session.cache_dir).resolve() / "gopeer"):
        environment["GOPEER"] = binary
        chosen = ("-m", "slow and not native", "-n2")
        session.run(
            "pytest", *chosen, "tests/transports/test_gopeer.py", env=environment
        )


@nox.session
def slow(session: nox.Session) -> None:
    """Run the tests that take long."""
    session.install("-e", ".", "--group", "test")
    # Fewer processes than by default: hundreds of callers need the processor.
    session.run("pytest", "-n4", "-m", "slow and not nightly", *session.posargs)


@nox.session
def model(session: nox.Session) -> None:
    """Run many more examples of models and fuzzing. Other examples: `-- --seed 17`."""
    seed, rest = told(session, "--seed", "1")
    session.install("-e", ".", "--group", "test")
    models = ["state", "pool", "decisions", "bus", "circuit"]
    fuzzed = ["fuzz", "fuzz_calls", "fuzz_connectors", "differential"]
    names = [*(f"model_{name}" for name in models), *fuzzed]
    files = [f"tests/proof/test_{name}.py" for name in names]
    files += ["tests/_authorizer/test_hostile_answers.py"]
    files += ["tests/_http2/test_connection.py"]
    deep = ("-rP", "--timeout=0", "--hypothesis-profile=deep")
    deep += (f"--hypothesis-seed={seed}",)
    session.run("pytest", *deep, *files, *rest)


@nox.session
def oracles(session: nox.Session) -> None:
    """Run the longest tests. Some can be smaller: `-- --share 0.1`."""
    share, rest = told(session, "--share", "1")
    session.install("-e", ".", "--group", "test")
    environment = {"NIGHTLY_SHARE": share}
    if binary := built_gopeer(Path(session.cache_dir).resolve() / "gopeer"):
        environment["GOPEER"] = binary
    pytest = ("pytest", "-m", "nightly", "-n0", "-s")
    session.run(*pytest, *rest, env=environment)
    # Also against grpc-go. `slow` runs them against the embedded authorizer.
    frozen = ("pytest", "-m", "slow", "-n0", "tests/_http2/test_frozen.py")
    session.run(*frozen, env=environment)


@nox.session
def atheris(session: nox.Session) -> None:
    """Fuzz the HTTP/2 client with atheris, which not all have: `-- --seconds 60`."""
    seconds, rest = told(session, "--seconds", "600")
    session.install("-e", ".", "--group", "test")
    try:
        session.install("atheris>=3")
    except nox.command.CommandFailed:
        session.skip("atheris cannot be installed on this Python and platform")
    script = str(Path("tests/proof/atheris_http2.py").resolve())
    # In another folder, because it saves there what it finds.
    with session.chdir(session.create_tmp()):
        session.run("python", script, f"-max_total_time={seconds}", *rest)


@nox.session
def mutants(session: nox.Session) -> None:
    """Run mutation tests of the pool's state. For the options: `-- --help`."""
    session.install("-e", ".", "--group", "mutation")
    session.run("python", "tests/proof/mutation/survivors.py", *session.posargs)


@nox.session
def shuffled(session: nox.Session) -> None:
    """Run the pool's tests on event loops that shuffle ready tasks, with ten seeds."""
    session.install("-e", ".", "--group", "test")
    names = ["deadlines", "foreign_code", "maintenance", "pool_acquire"]
    names += ["pool_lifecycle", "pool_reopening", "recovery"]
    files = [f"tests/behaviour/test_{name}.py" for name in names]
    names = ["cancel_everywhere", "cancel_outcomes", "pool_cancellation"]
    files += [f"tests/proof/test_{name}.py" for name in names]
    session.run("pytest", "--shuffle=10", "-k", "shuffled-", *files, *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """
    Run pools in several workers under many faults, over both transports.

    `-- --minutes 10 --seed 17` chooses the time for each transport, and the faults.
    """
    minutes, rest = told(session, "--minutes", "0.5")
    seed, rest = told(session, "--seed", "1", rest)
    session.install("-e", ".", "--group", "test")
    pytest = ("pytest", "-m", "soak", "-n0", "-s")
    for transport in ("native", "grpcio"):
        environment = {"SOAK_MINUTES": minutes, "SOAK_SEED": seed}
        environment["FASTAPI_TOPAZ_TRANSPORT"] = transport
        session.run(*pytest, "tests/proof/test_soak.py", *rest, env=environment)


@nox.session
def oldest(session: nox.Session) -> None:
    """Run the tests of the package with the oldest dependencies that are allowed."""
    session.install("-e", ".", "--group", "test")
    session.install(*OLDEST)
    # Deprecation warnings inside the oldest libraries cannot be fixed here.
    pytest = ("pytest", "-W", "default")
    # Models and documents hardly depend on the versions of libraries.
    others = ("--ignore=tests/proof", "--ignore=tests/repository")
    session.run(*pytest, *others, *session.posargs)


# Only the newest Python. On 3.11, tracing loses a coroutine that catches an exception
# thrown into it.
@nox.session(python=PYTHONS[-1:])
def coverage(session: nox.Session) -> None:
    """Run the tests and show the lines and branches that they miss."""
    session.install("-e", ".", "--group", "test")
    session.run("coverage", "erase")
    # Without worker processes, because coverage measures only this process.
    session.run("coverage", "run", "-m", "pytest", "-n0", *session.posargs)
    # The default tests hardly use the transport `grpcio`.
    chosen = ("-m", OVER_GRPCIO, "tests/_grpcio", "tests/transports")
    environment = {"FASTAPI_TOPAZ_TRANSPORT": "grpcio"}
    pytest = ("pytest", "-n0", *chosen)
    session.run("coverage", "run", "-m", *pytest, env=environment)
    session.run("coverage", "combine")
    session.run("coverage", "report")


@nox.session
def package(session: nox.Session) -> None:
    """Build sdist and wheel, check them, and run the demo from the wheel only."""
    session.install("--group", "package")
    dist = Path(session.create_tmp()) / "dist"
    for old in dist.glob("*"):
        old.unlink()
    session.run("python", "-m", "build", "--outdir", str(dist))
    wheel = next(dist.glob("*.whl"))
    session.run("twine", "check", "--strict", *map(str, dist.glob("*")))
    session.run("check-wheel-contents", str(wheel))
    session.install("--force-reinstall", "--no-deps", str(wheel))
    session.install(f"fastapi-topaz-pool[demo] @ {wheel.resolve().as_uri()}")
    # In another folder, because Python imports the sources in this one.
    with session.chdir(session.create_tmp()):
        session.run("fastapi-topaz-pool", "demo", "--requests", "200")


def found_program(cache: Path, name: str, packages: str, argument: str) -> str | None:
    """
    Return the path of a program of this machine, or from an unpacked Debian package.

    Args:
        cache: The folder for the unpacked package.
        name: The name of the program.
        packages: The names of Debian's packages that it needs, beside libraries.
        argument: The argument with which the program prints its version.

    Returns:
        The path, or None if the program is not available.
    """
    # On Debian, /usr/sbin is in the PATH of root only.
    if found := shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin"):
        return found
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return None
    program = str(cache / name)
    try:
        if not starts(program, argument):
            apt = own_apt(cache)
            unpack(apt, cache, name, packages.split())
            if not starts(program, argument):
                # Libraries are missing, so unpack its dependencies too.
                unpack(apt, cache, name, to_install(apt, packages.split()))
        subprocess.run([program, argument], check=True, capture_output=True)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(error, getattr(error, "stderr", None) or "")  # noqa: T201
        return None
    return program


def own_apt(cache: Path) -> list[str]:
    """Return an apt command with its own package lists, and update them."""
    for folder in ("lists/partial", "cache/archives/partial", "root"):
        (cache / folder).mkdir(parents=True, exist_ok=True)
    # With these options, apt does not need root.
    apt = ["apt-get", "-q", "-o", f"Dir::State::Lists={cache / 'lists'}"]
    apt += ["-o", f"Dir::Cache={cache / 'cache'}", "-o", "APT::Sandbox::User=root"]
    apt += ["-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=20"]
    subprocess.run([*apt, "update"], check=True, timeout=300)
    return apt


def to_install(apt: list[str], packages: list[str]) -> list[str]:
    """Return the names of Debian's *packages* and of their missing dependencies."""
    command = [*apt, "install", "--simulate", "--no-install-recommends", *packages]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = (line.split() for line in told.splitlines())
    return [words[1] for words in lines if words[:1] == ["Inst"]]


def unpack(apt: list[str], cache: Path, name: str, packages: list[str]) -> None:
    """Unpack Debian's *packages*, and write a start script as `cache / name`."""
    subprocess.run([*apt, "download", *packages], cwd=cache, check=True, timeout=300)
    for archive in cache.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", archive, cache / "root"], check=True)
        archive.unlink()
    libraries = {str(file.parent) for file in cache.glob("root/**/*.so*")}
    places = shlex.quote(":".join(sorted(libraries)))
    # What is in /usr/bin may only be a script that starts the program in /usr/lib. And
    # it may link to a package that is not unpacked yet, so the pattern has no name.
    programs = [*cache.glob(f"root/usr/lib/{name}/*"), *cache.glob("root/usr/*bin/*")]
    binary, *_ = (each for each in programs if each.name == name)
    command = f"LD_LIBRARY_PATH={places} exec {shlex.quote(str(binary))}"
    (cache / name).write_text(f'#!/bin/sh\n{command} "$@"\n')
    (cache / name).chmod(0o755)


@nox.session(python=False)
def alerts(session: nox.Session) -> None:
    """Check the alert rules and run their unit tests with promtool."""
    cache = Path(session.cache_dir).resolve() / "promtool"
    promtool = found_program(cache, "promtool", "prometheus", "--version")
    if promtool is None:
        session.skip("no promtool, and Debian's package `prometheus` cannot be had")
    check = ("check", "rules", "--lint=all", "--lint-fatal")
    session.run(promtool, *check, "observability/alerts.yaml", external=True)
    session.run(
        promtool, "test", "rules", "tests/repository/alerts_test.yaml", external=True
    )


@nox.session
def prometheus(session: nox.Session) -> None:
    """Let a Prometheus server scrape workers and evaluate dashboard and alerts."""
    cache = Path(session.cache_dir).resolve() / "prometheus"
    server = found_program(cache, "prometheus", "prometheus", "--version")
    if server is None:
        session.skip("no prometheus, and Debian's package of it cannot be had")
    session.install("-e", ".", "--group", "test")
    test = "tests/repository/test_prometheus.py"
    chosen = ("-m", "nightly", "-n0", test)
    session.run("pytest", *chosen, *session.posargs, env={"PROMETHEUS": server})


def found_go() -> str | None:
    """Return the path of Go, also if its archive is unpacked in /usr/local/go."""
    places = os.pathsep.join((os.environ["PATH"], "/usr/local/go/bin"))
    go = shutil.which("go", path=places)
    if go is None:
        print("there is no Go")  # noqa: T201
    return go


def built_gopeer(cache: Path) -> str | None:
    """Build the server of tests/kit/gopeer from its sources. Return its path."""
    if (go := found_go()) is None:
        return None
    source = Path("tests/kit/gopeer")
    files = [source / "go.mod", *sorted(source.glob("*.go"))]
    contents = hashlib.sha256(b"\0".join(file.read_bytes() for file in files))
    folder = cache / contents.hexdigest()[:16]
    binary = folder / "gopeer"
    try:
        if not binary.exists():
            shutil.rmtree(cache, ignore_errors=True)  # builds of older sources
            folder.mkdir(parents=True)
            for file in files:
                shutil.copy(file, folder)
            # In a copy, because the build writes go.sum. GOTOOLCHAIN=local: if Go is
            # too old for the modules, it fails and does not download a newer one.
            build = [go, "build", "-mod=mod", "-buildvcs=false", "-o", "built", "."]
            offered = os.environ | {"GOTOOLCHAIN": "local"}
            subprocess.run(build, cwd=folder, env=offered, check=True, timeout=600)
            (folder / "built").rename(binary)
    except (OSError, subprocess.SubprocessError) as error:
        print(error)  # noqa: T201
        return None
    return str(binary)


@nox.session
def gopeer(session: nox.Session) -> None:
    """Run the pool against a server on grpc-go, the library that Topaz uses."""
    binary = built_gopeer(Path(session.cache_dir).resolve() / "gopeer")
    if binary is None:
        session.skip("no Go, or not one that can build the server of tests/kit/gopeer")
    session.install("-e", ".", "--group", "test")
    files = ["transports/test_gopeer.py", "_http2/test_interop.py"]
    files += ["_http2/test_peers.py"]
    pytest = ("pytest", "-m", "slow", "-n2", *(f"tests/{name}" for name in files))
    session.run(*pytest, *session.posargs, env={"GOPEER": binary})


@nox.session
def proxies(session: nox.Session) -> None:
    """Run the pool behind nginx and HAProxy. Over grpcio: `-- --transport grpcio`."""
    transport, rest = told(session, "--transport", "native")
    cache = Path(session.cache_dir).resolve()
    named = {}
    for name in ("nginx", "haproxy"):
        if binary := found_program(cache / name, name, name, "-v"):
            named[name.upper()] = binary
        else:
            session.warn(f"no {name}, and Debian's package cannot be had")
    if not named:
        session.skip("neither nginx nor haproxy can be had")
    session.install("-e", ".", "--group", "test")
    chosen = "slow and not native" if transport == "grpcio" else "slow"
    # Most of their time is waiting.
    pytest = ("pytest", "-m", chosen, "-n3", "tests/behaviour/test_proxies.py")
    environment = named | {"FASTAPI_TOPAZ_TRANSPORT": transport}
    session.run(*pytest, *rest, env=environment)


@nox.session
def browser(session: nox.Session) -> None:
    """
    Test the status page in headless Chromium.

    `-- --pictures docs/images` also makes the pictures of the documentation.
    """
    pictures, rest = told(session, "--pictures", "")
    cache = Path(session.cache_dir).resolve() / "chromium"
    # The second one has files without which it shows its version, but no page.
    packages = "chromium chromium-common"
    chromium = found_program(cache, "chromium", packages, "--version")
    if chromium is None:
        session.skip("no chromium, and Debian's package `chromium` cannot be had")
    # Of Playwright only the driver. It downloads no browser by itself.
    session.install("-e", ".", "--group", "browser")
    environment = {"CHROMIUM": chromium}
    if pictures:
        environment["PICTURES"] = str(Path(pictures).resolve())
    pytest = ("pytest", "-m", "slow", "-n0", "tests/browser")
    session.run(*pytest, *rest, env=environment)


@nox.session
def redis(session: nox.Session) -> None:
    """Run the example with Redis against Debian's redis-server, which is restarted."""
    cache = Path(session.cache_dir).resolve() / "redis"
    server = found_program(cache, "redis-server", "redis-server", "--version")
    if server is None:
        session.skip("no redis-server, and Debian's package cannot be had")
    session.install("-e", ".", "--group", "redis")
    pytest = ("pytest", "-m", "slow", "-n0", "tests/repository/test_example_redis.py")
    session.run(*pytest, *session.posargs, env={"REDIS_SERVER": server})


def found_topazd(cache: Path) -> str | None:
    """Install topazd once from its Go module. Return its path, or None on failure."""
    folder = cache / TOPAZ_RELEASE
    if (folder / "topazd").exists():
        return str(folder / "topazd")
    if (go := found_go()) is None:
        return None
    # `go install module@version` also needs the list of all versions, and a record in
    # Go's checksum database. Not every proxy has them. So the database is skipped for
    # this module only, and TOPAZ_SUM is checked instead. The module's own go.sum has
    # the checksums of its dependencies.
    unasked = ",".join(filter(None, (os.environ.get("GONOSUMDB"), TOPAZ)))
    environment = os.environ | {"GOTOOLCHAIN": "local", "CGO_ENABLED": "0"}
    environment |= {"GONOSUMDB": unasked, "GOBIN": str(folder / "built")}
    # The flags of its releases. Without them, it has no version.
    stamp = f"-s -w -X {TOPAZ}/pkg/version.ver={TOPAZ_RELEASE.removeprefix('v')}"
    download = [go, "mod", "download", "-json", f"{TOPAZ}@{TOPAZ_RELEASE}"]
    try:
        told = subprocess.run(
            download, env=environment, stdout=subprocess.PIPE, check=False
        )
        module = json.loads(told.stdout)
        if error := module.get("Error"):
            raise ValueError(error)
        if module["Sum"] != TOPAZ_SUM:
            raise ValueError(f"{TOPAZ}@{TOPAZ_RELEASE} is {module['Sum']}")
        install = [go, "install", "-C", module["Dir"], "-mod=readonly"]
        install += ["-ldflags", stamp, "./cmd/topazd"]
        subprocess.run(install, env=environment, check=True, timeout=1800)
        (folder / "built" / "topazd").rename(folder / "topazd")
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(error)  # noqa: T201
        return None
    return str(folder / "topazd")


@nox.session
def topaz(session: nox.Session) -> None:
    """Run the tests of the pool and the conformance tests against Topaz itself."""
    topazd = found_topazd(Path(session.cache_dir).resolve() / "topazd")
    if topazd is None:
        session.skip(f"{TOPAZ}@{TOPAZ_RELEASE} cannot be had: no Go, or no module")
    session.install("-e", ".", "--group", "test")
    session.run(topazd, "version", external=True)
    files = ["_authorizer/test_topaz.py", "behaviour/test_conformance.py"]
    files += ["behaviour/test_topaz_routes.py", "repository/test_containers.py"]
    files += ["repository/test_examples.py", "repository/test_tutorial.py"]
    files += ["_cli/test_doctor_topaz.py"]
    files = [f"tests/{name}" for name in files]
    anyhow = ("-n0", "-m", "slow or not slow")
    session.run("pytest", *anyhow, *files, *session.posargs, env={"TOPAZD": topazd})


@nox.session
def demo(session: nox.Session) -> None:
    """Run the demo on both backends."""
    session.install("-e", ".[demo]")
    for backend in ("asyncio", "trio"):
        session.run("fastapi-topaz-pool", "demo", "--backend", backend)


def found_mermaid(session: nox.Session, cache: Path) -> str | None:
    """Fetch the script of Mermaid once. Return its path, or None on failure."""
    script = cache / MERMAID / "mermaid.min.js"
    try:
        if not script.exists():
            script.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as folder:
                npm = ("npm", "pack", "--silent", "--pack-destination", folder)
                session.run(*npm, MERMAID)
                (archive,) = Path(folder).glob("*.tgz")
                with tarfile.open(archive) as files:
                    contents = files.extractfile("package/dist/mermaid.min.js").read()
            if (found := hashlib.sha256(contents).hexdigest()) != MERMAID_SUM:
                raise ValueError(f"the script of {MERMAID} is {found}")
            script.write_bytes(contents)
    except (nox.command.CommandFailed, OSError, ValueError) as error:
        print(error)  # noqa: T201
        return None
    return str(script)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site into build/site, test it, and run the commands of its pages."""
    session.install("-e", ".", "--group", "docs", "--group", "test")
    environment = {"NO_MKDOCS_2_WARNING": "1"}
    if script := found_mermaid(session, Path(session.cache_dir).resolve() / "mermaid"):
        environment["MERMAID"] = script
    else:
        session.warn(f"no {MERMAID}, so the site shows its diagrams as text")
    # Not --quiet: then --strict ignores warnings.
    session.run("mkdocs", "build", "--strict", env=environment)
    environment["SITE"] = str(Path("build/site").resolve())
    files = [f"tests/repository/test_{name}.py" for name in ("site", "walks", "pages")]
    chosen = ("-n0", "-m", "slow or not slow")
    session.run("pytest", *chosen, *files, *session.posargs, env=environment)


@nox.session
def fleet(session: nox.Session) -> None:
    """Simulate a small fleet of workers and replicas. A large one: `-- --full`."""
    session.install("-e", ".", "--group", "test")
    session.run("python", "benchmarks/fleet.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Run every benchmark for a moment, to see that it works. In full: `-- --full`."""
    session.install("-e", ".", "--group", "peers")
    results = Path(session.create_tmp()) / "results"
    shutil.rmtree(results, ignore_errors=True)
    scripts = Path("benchmarks")
    drawers = {scripts / "plots.py", scripts / "report.py"}
    is_full = "--full" in session.posargs
    size = [] if is_full else ["--quick"]

    def run(script: Path) -> str:
        command = ("python", str(script), *size, "--save", str(results))
        told = session.run(*command, silent=not is_full)
        return told if isinstance(told, str) else ""

    # The numbers of short rounds are meaningless. They only show that a script runs, so
    # two scripts run at once.
    with ThreadPoolExecutor(1 if is_full else 2) as pool:
        for told in pool.map(run, sorted({*scripts.glob("[!_]*.py")} - drawers)):
            print(told)  # noqa: T201
    for script in sorted(drawers):
        session.run(
            "python", str(script), "--results", str(results), "--to", str(results)
        )
