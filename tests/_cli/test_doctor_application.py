"""Test that `doctor` takes its settings from an application."""

from __future__ import annotations

import json
import sys
import textwrap

import pytest

from fastapi_topaz import AuthorizerOptions, ConnectionPool, Identity, TopazConfig
from fastapi_topaz._cli.doctor.context import Settings
from fastapi_topaz._cli.doctor_command import merged
from fastapi_topaz._cli.imported import CannotImport, imported, settings_in
from fastapi_topaz.testing import EmbeddedAuthorizer
from kit.secrets import KEY


POLICIES = {"myapp.GET.documents": True}

APPLICATION = """
    print("a line of the application")
    import os
    import aserto.client
    from fastapi import FastAPI
    from fastapi_topaz import AuthorizerOptions, ConnectionPool, TopazConfig

    app = FastAPI()
    options = AuthorizerOptions(
        url=os.environ.get("ADDRESS", "localhost:8282"),
        cert_file_path=os.environ.get("CA"),
        api_key=os.environ.get("THE_KEY"),
    )
    theirs = aserto.client.AuthorizerOptions(
        url=options.url, cert_file_path=os.environ.get("CA")
    )
    config = TopazConfig(
        authorizer_options=options,
        policy_path_root="myapp",
        identity_provider=lambda _request: None,
        policy_instance_name="blue",
        connection_pool=ConnectionPool(streams_per_connection=7),
    )

    class Settings:
        topaz = config

    def create():
        return config

    async def create_later():
        return config

    def fails():
        raise LookupError("no such setting")
"""


def write(folder, name, code):
    (folder / f"{name}.py").write_text(textwrap.dedent(code))


@pytest.fixture
def application(tmp_path):
    """A folder with the application."""
    write(tmp_path, "main", APPLICATION)
    return tmp_path


@pytest.fixture
def topaz():
    with EmbeddedAuthorizer(POLICIES, tls=True, api_key=KEY) as running:
        yield running


def environment_of(topaz):
    return {"ADDRESS": topaz.url, "CA": topaz.ca_cert_path, "THE_KEY": KEY}


def finding(ended, wanted):
    report = json.loads(ended.out)
    [found] = [each for each in report["findings"] if each["id"] == wanted]
    return found


# -- the settings -------------------------------------------------------------------


@pytest.mark.real_clock
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize(
    "name, source",
    [
        ("config", "main:config"),
        ("options", "main:options"),
        ("create", "main:create()"),
        ("Settings.topaz", "main:Settings.topaz"),
    ],
)
def test_the_settings_of_an_application_are_checked(
    name, source, backend, application, topaz, run_forked
):
    ended = run_forked(
        *("doctor", f"main:{name}", "--policy-path", "myapp.GET.documents"),
        *("--timeout", "20", "--json", "--backend", backend),
        cwd=application,
        **environment_of(topaz),
    )

    # What the application prints is not in the JSON.
    assert (ended.code, ended.err) == (0, "a line of the application\n")
    said = finding(ended, "configuration")["summary"]
    assert said == f"{topaz.url}, with TLS, with an API key, from {source}"
    assert finding(ended, "policy")["level"] == "ok"
    assert KEY not in ended.out


@pytest.mark.real_clock
def test_options_of_aserto_are_accepted(application, topaz, run_forked):
    ended = run_forked(
        *("doctor", "main:theirs", "--api-key", KEY, "--json"),
        cwd=application,
        **environment_of(topaz),
    )

    assert ended.code == 0
    assert "from main:theirs" in finding(ended, "configuration")["summary"]


@pytest.mark.real_clock
def test_options_on_the_command_line_win(application, topaz, run_forked):
    ended = run_forked(
        *("doctor", "main:config", "--policy-root", "other", "--api-key", "wrong"),
        "--json",
        cwd=application,
        **environment_of(topaz),
    )

    assert ended.code == 1
    assert finding(ended, "api-key-refused")["level"] == "problem"


@pytest.mark.real_clock
def test_the_environment_does_not_win_over_the_application(
    application, topaz, run_forked
):
    ended = run_forked(
        *("doctor", "main:config", "--json"),
        cwd=application,
        TOPAZ_API_KEY=KEY,
        **environment_of(topaz) | {"THE_KEY": ""},
    )

    assert ended.code == 1
    assert "without an API key" in finding(ended, "configuration")["summary"]
    assert finding(ended, "api-key-missing")["level"] == "problem"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a module that has `config` and all its options."""
    options = {
        "url": "topaz:1",
        "tenant_id": "tenant",
        "api_key": KEY,
        "cert_file_path": "ca.pem",
        "client_cert_path": "client.pem",
        "client_key_path": "client.key",
        "authority": "authority:2",
        "server_name": "server",
        "extra_metadata": (("x-extra", KEY),),
        "credentials": lambda: (),
        "max_message_bytes": 5,
    }
    config = TopazConfig(
        authorizer_options=AuthorizerOptions(**options),
        policy_path_root="shop",
        identity_provider=lambda _request: Identity(1),
        policy_instance_name="blue",
        policy_instance_label="green",
        connection_pool=ConnectionPool(streams_per_connection=7),
    )
    write(tmp_path, "module_of_a_test", "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__("module_of_a_test")
    module.config = config
    module.options = options
    return module


def test_all_settings_are_taken(here):
    settings = settings_in("module_of_a_test:config")

    assert settings == {
        "source": "module_of_a_test:config",
        "policy_root": "shop",
        "policy_instance_name": "blue",
        "policy_instance_label": "green",
        "streams": 7,
        "insecure": False,
        **here.options,
    }
    assert KEY not in repr(merged(Settings(), settings, {}))


OF_TLS = ("cert_file_path", "client_cert_path", "client_key_path", "server_name")


def test_without_tls_on_the_command_line_the_options_of_tls_are_dropped(here):
    theirs = settings_in("module_of_a_test:config")
    given = {"insecure": True}
    settings = merged(Settings(insecure=True), theirs, given)

    assert settings.insecure is True
    assert [getattr(settings, name) for name in OF_TLS] == [None] * 4
    assert settings.url == "topaz:1"


@pytest.mark.parametrize(
    "option, field",
    [("cert", "cert_file_path"), ("server_name", "server_name")],
)
def test_an_option_of_tls_on_the_command_line_means_tls(option, field):
    theirs = {"url": "topaz:1", "insecure": True, field: None}
    settings = merged(Settings(**{field: "given"}), theirs, {option: "given"})

    assert (settings.insecure, getattr(settings, field)) == (False, "given")


def test_other_options_on_the_command_line_change_nothing_else():
    theirs = {"url": "topaz:1", "insecure": True, "streams": 7}
    settings = merged(Settings(url="other:2"), theirs, {"url": "other:2"})

    assert (settings.url, settings.insecure, settings.streams) == ("other:2", True, 7)


# -- what cannot be imported --------------------------------------------------------

LINES = {
    "main": "Error: main must be MODULE:ATTRIBUTE, such as main:config",
    "main:": "Error: main: must be MODULE:ATTRIBUTE, such as main:config",
    "main.py:config": "Error: main.py:config must be MODULE:ATTRIBUTE, such as ",
    ".main:config": "Error: .main:config must be MODULE:ATTRIBUTE, such as main:",
    "nothing:config": "Error: cannot import nothing: there is no module nothing in the",
    "main:confg": "Error: main has no 'confg'; it has: main:options, main:theirs, main",
    "main:app": "Error: main:app is of type FastAPI: name a TopazConfig or an Authori",
    "main:TopazConfig": "Error: main:TopazConfig is of type type: name a TopazConfig",
    "main:create_later": "Error: main:create_later() is a coroutine: pass a function",
    "main:fails": "Error: main:fails() failed: LookupError: no such setting (main.py, ",
    "loops:config": "Error: cannot import loops: KeyError: 'TOPAZ_URL' (loops.py, lin",
    "broken:config": "Error: cannot import broken: KeyError: 'TOPAZ_URL' (broken.py, l",
    "needs:config": "Error: cannot import needs: ModuleNotFoundError: No module named ",
    "syntax:config": "Error: cannot import syntax: SyntaxError: ",
    "exits:config": "Error: cannot import exits: SystemExit: 3 (exits.py, line 2)",
    "silent:config": "Error: cannot import silent: RuntimeError (silent.py, line 1)",
    "lines:config": "Error: cannot import lines: ValueError: one two ?[31mthree (lines",
    "lazy:config": "Error: cannot read lazy:config: LookupError: later (lazy.py, l",
}


@pytest.fixture(scope="module")
def applications(tmp_path_factory):
    folder = tmp_path_factory.mktemp("applications")
    write(folder, "main", APPLICATION)
    write(folder, "broken", "import os\nurl = os.environ['TOPAZ_URL']")
    loops = "import os\nfor key in ['TOPAZ_URL']:\n    os.environ[key]"
    write(folder, "loops", loops)
    write(folder, "needs", "import a_library_that_is_not_there")
    write(folder, "syntax", "def (")
    write(folder, "exits", "import sys\nsys.exit(3)")
    write(folder, "silent", "raise RuntimeError")
    write(folder, "lines", "raise ValueError('one\\ntwo\\n\\x1b[31mthree')")
    write(folder, "lazy", "def __getattr__(name):\n    raise LookupError('later')")
    return folder


@pytest.mark.real_clock
@pytest.mark.parametrize("reference, line", LINES.items())
def test_a_failed_import_is_one_line(reference, line, applications, run_forked):
    ended = run_forked("doctor", reference, "--json", cwd=applications)

    assert (ended.code, ended.out) == (2, "")
    printed = ended.err.removeprefix("a line of the application\n")
    assert printed.startswith(line)
    assert printed.count("\n") == 1
    assert printed.endswith("\n")


SECRETS = {
    "of the environment": "raise ValueError(f'got {os.environ[\"MY_TOKEN\"]}')",
    "of the module": "api_key = 'k-' + '0815'\nraise ValueError(api_key)",
    "of a mapping": "s = {'db_password': 'k-' + '0815'}\nraise ValueError(s)",
    "of a function": (
        "def connect(client_secret):\n"
        "    raise ValueError(client_secret)\n"
        "connect('k-' + '0815')"
    ),
    "of an object": (
        "class Options:\n"
        "    def __init__(self): self.api_key = 'k-' + '0815'\n"
        "options = Options()\n"
        "raise ValueError(vars(options))"
    ),
    "of a class": "class S: API_KEY = 'k-' + '0815'\nraise ValueError(S.API_KEY)",
    "of a list": "API_KEYS = ['k-' + '0815']\nraise ValueError(API_KEYS)",
    "of bytes": "api_key = b'k-' + b'0815'\nraise ValueError(api_key)",
    "with a line break": "pem_key = 'k\\n-' + '0815'\nraise ValueError([pem_key])",
    "stripped": "pem_key = 'k-' + '0815\\n'\nraise ValueError(pem_key.strip())",
    "of an installed module": (
        "import sysconfig\n"
        "code = \"api_key = 'k-' + '0815'; raise ValueError(api_key)\"\n"
        "path = sysconfig.get_path('purelib') + '/shop.py'\n"
        "exec(compile(code, path, 'exec'), {})"
    ),
    "in a url": "raise ValueError('postgres://user:k-' + '0815@db/name')",
    "in a url with a slash": "raise ValueError('postgres://user:k-/' + '0815@db/name')",
    "of another error": (
        "class Value(BaseException): pass\n"
        "api_key = 'k-' + '0815'\n"
        "raise Value(api_key)"
    ),
    "of pydantic": (
        "from pydantic import BaseModel\n"
        "class Options(BaseModel):\n"
        "    url: str\n"
        "Options(**{'other': 'k-' + '0815'})"
    ),
}


@pytest.mark.real_clock
@pytest.mark.parametrize("code", SECRETS.values(), ids=SECRETS)
def test_an_error_of_the_application_shows_no_secret(code, tmp_path, run_forked):
    write(tmp_path, "main", f"import os\n{code}")
    ended = run_forked("doctor", "main:config", cwd=tmp_path, MY_TOKEN="t-0815")

    assert ended.code == 2
    assert "Error: cannot import main: Val" in ended.err
    assert "***" in ended.err
    assert "0815" not in ended.err + ended.out


def test_a_path_is_no_secret_and_a_long_text_is_cut(tmp_path, monkeypatch):
    write(
        tmp_path,
        "module_that_fails",
        "key_file = '/no/such'\nraise OSError(key_file, 'y ' * 999)",
    )
    monkeypatch.chdir(tmp_path)
    # The console script does not add the current folder.
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])

    with pytest.raises(CannotImport) as caught:
        imported("module_that_fails:config")
    assert "/no/such" in str(caught.value)
    assert len(str(caught.value)) < 600
