"""Test that the tables and files of the how-to pages are true."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import types

import pytest
import yaml
from fastapi import Depends, FastAPI

import fastapi_topaz
from fastapi_topaz import ConnectionPool, TopazConfig, require_policy_auto
from kit.configs import config_of
from kit.examples import ROOT
from kit.pages import DOCS, blocks, codes
from kit.pools import make_pool


# The names in `__all__` of fastapi-topaz 1.1.0 and 2.0.0, and of their `testing`.
OTHERS = {
    "1.x": """
        AuditEvent AuditLogger AuthorizationError AuthorizerOptions
        CircuitBreaker CircuitState CircuitStatus ConnectionPool DecisionCache
        HierarchyResult Identity IdentityMapper IdentityType OTelTracing Obj
        ObjectMapper PolicyGroup PoolStatus PrometheusMetrics ResourceContext
        ResourceMapper SkipMiddleware StringMapper TopazConfig TopazMiddleware
        filter_authorized_resources get_authorized_resource normalize_hyphens
        require_policy_allowed require_policy_auto require_rebac_allowed
        require_rebac_hierarchy skip_middleware
    """,
    "2.x": """
        Admission AuditEvent AuditLogger AuthorizerOptions CacheBackend
        CircuitBreaker CircuitState CircuitStatus DecisionCache HierarchyResult
        Identity IdentityType OTelTracing Obj PolicyGroup PrometheusMetrics
        ResourceContext SkipMiddleware TopazConfig TopazMiddleware __version__
        annotate_openapi filter_authorized_resources get_authorized_resource
        normalize_hyphens require_policy_allowed require_policy_auto
        require_rebac_allowed require_rebac_hierarchy skip_middleware
    """,
}
TESTING = "Decision MockTopazConfig install_mock when_policy when_relation"


def page(name):
    return (DOCS / f"{name}.md").read_text()


# -- coming from fastapi-topaz --------------------------------------------------------


def rows_of_names():
    table = page("migrating").partition("## Public names")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([\w.]+)` \| (.+?) \| (.+) \|$", table, re.MULTILINE)


def test_each_name_of_the_other_library_is_in_the_table():
    known = {version: set(names.split()) for version, names in OTHERS.items()}
    for names in known.values():
        names.update(f"testing.{name}" for name in TESTING.split())
    listed = [name for name, *_ in rows_of_names()]
    assert len(listed) == len(set(listed))
    for version, names in known.items():
        assert {n for n, versions, _ in rows_of_names() if version in versions} == names


def test_a_name_that_is_here_too_is_not_said_to_be_missing():
    for name, _, here in rows_of_names():
        if name in fastapi_topaz.__all__:
            assert here.startswith(f"[`{name}`]"), name
        else:
            assert not here.startswith("[`" + name), name


def test_each_parameter_of_the_page_exists():
    text = page("migrating").partition("## Parameters of")[2]
    here = set(inspect.signature(TopazConfig).parameters)
    same = re.search(r"^\| (.+) \| The same\. The providers", text, re.MULTILINE)[1]
    assert set(re.findall(r"`(\w+)`", same)) <= here
    assert {"fallback", "check_timeout", "connection_pool"} <= here


# -- incidents ------------------------------------------------------------------------


def messages():
    """Return all texts in the package, with the parts of each f-string."""
    for path in (ROOT / "fastapi_topaz").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_each_message_of_the_page_incidents_exists():
    table = page("incidents").partition("## The log says")[2].partition("\n## ")[0]
    quoted = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(quoted) > 15
    texts = list(messages())
    for each in quoted:
        assert any(each in text for text in texts), each


# -- Kubernetes -----------------------------------------------------------------------


@pytest.fixture
def manifests():
    """Return the manifest with a sidecar, and the changes for a shared Topaz."""
    return codes(DOCS / "kubernetes.md", "yaml")


@pytest.fixture
def pod(manifests):
    return yaml.safe_load(manifests[0])["spec"]["template"]["spec"]


@pytest.fixture
def main():
    (code,) = [b.code for b in blocks(DOCS / "kubernetes.md") if b.title == "main.py"]
    return code


@pytest.fixture
def gunicorn():
    (code,) = [
        b.code for b in blocks(DOCS / "kubernetes.md") if "gunicorn" in str(b.title)
    ]
    names = {}
    exec(code, names)
    return names


def test_a_pod_is_not_killed_before_its_pools_are_closed(pod, gunicorn):
    (container,) = pod["containers"]
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = inspect.signature(ConnectionPool.close).parameters["grace"].default
    assert gunicorn["POOL"] == grace
    assert gunicorn["graceful_timeout"] > gunicorn["REQUESTS"] + grace
    longest = pod["terminationGracePeriodSeconds"]
    assert longest > pause + gunicorn["graceful_timeout"]


def test_the_probes_of_the_pod_exist_and_have_time(pod, main):
    (container,) = pod["containers"]
    for probe in ("livenessProbe", "readinessProbe"):
        path = container[probe]["httpGet"]["path"]
        assert f'@app.get("{path}")' in main
    timeout = inspect.signature(TopazConfig.is_ready).parameters["timeout"].default
    assert container["readinessProbe"]["timeoutSeconds"] > timeout


def test_the_pod_is_reached_on_its_port(pod, gunicorn):
    (container,) = pod["containers"]
    env = {each["name"]: each["value"] for each in container["env"]}
    assert env["BIND"] == f"0.0.0.0:{container['ports'][0]['containerPort']}"
    assert gunicorn["bind"] == env["BIND"].replace("0.0.0.0", "127.0.0.1")


def options_of(main, monkeypatch, env):
    """Return the options of the application in an environment."""
    for each in ("TOPAZ_URL", "TOPAZ_CA"):
        monkeypatch.delenv(each, raising=False)
    for each in env:
        monkeypatch.setenv(each["name"], each["value"])
    names = {}
    exec(main, names)
    return names["config"].authorizer_options


def test_the_pod_asks_its_sidecar_in_plaintext(pod, main, monkeypatch):
    (container,) = pod["containers"]
    options = options_of(main, monkeypatch, container["env"])
    assert options == options_of(main, monkeypatch, [])
    assert (options.url, options.insecure) == ("127.0.0.1:8282", True)


def test_the_pod_asks_a_shared_topaz_with_tls(manifests, main, monkeypatch):
    deployment, service = yaml.safe_load_all(manifests[1])
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options = options_of(main, monkeypatch, container["env"])
    assert options.insecure is False
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert options.cert_file_path.startswith(f"{mount['mountPath']}/")
    assert mount["name"] == volume["name"]
    meta, spec = service["metadata"], service["spec"]
    host = f"{meta['name']}.{meta['namespace']}.svc.cluster.local"
    assert options.url == f"{host}:{spec['ports'][0]['port']}"
    assert spec["clusterIP"] == "None"
    # Readiness must not depend on a Topaz that all replicas share.
    probe = container["readinessProbe"]["httpGet"]["path"]
    route = main.partition(f'@app.get("{probe}")')[2].partition("@app")[0]
    assert route
    assert "is_ready" not in route
    other = [{"name": "TOPAZ_URL", "value": options.url}]
    assert options_of(main, monkeypatch, other).insecure is False


def test_the_pod_uses_the_tested_release_of_topaz(pod):
    release = re.search(r'TOPAZ_RELEASE = "v(.+)"', (ROOT / "noxfile.py").read_text())
    (sidecar,) = pod["initContainers"]
    assert sidecar["image"].endswith(f":{release[1]}")


# -- Prometheus -----------------------------------------------------------------------


def test_prometheus_scrapes_each_port_of_the_range():
    (text,) = codes(DOCS / "prometheus.md", "yaml")
    (job,) = yaml.safe_load(text)["scrape_configs"]
    (targets,) = job["static_configs"]
    found = [int(target.rpartition(":")[2]) for target in targets["targets"]]
    code = page("prometheus")
    first = int(re.search(r'"METRICS_PORT", "(\d+)"', code)[1])
    count = int(re.search(r"range\(FIRST, FIRST \+ (\d+)\)", code)[1])
    assert found == list(range(first, first + count))
    workers = int(re.search(r"--workers (\d+)", code)[1])
    assert count == 2 * workers


def test_each_expression_of_the_page_prometheus_can_be_parsed():
    promql_parser = pytest.importorskip("promql_parser")
    for text in codes(DOCS / "prometheus.md", "promql"):
        for line in text.splitlines():
            promql_parser.parse(line)


# -- the production checklist ---------------------------------------------------------


@pytest.fixture
def every_route_has_a_guard(monkeypatch):
    """Return the tests of the page, and the application that they test."""
    (code,) = [
        each for each in codes(DOCS / "production.md", "python") if "unguarded" in each
    ]
    app = FastAPI()
    for path in ("/livez", "/readyz"):
        app.get(path)(lambda: None)
    guard = Depends(require_policy_auto(config_of(make_pool())))
    app.get("/guarded", dependencies=[guard])(lambda: None)
    main = types.ModuleType("main")
    main.app, main.may_write = app, lambda: None
    own = [Depends(main.may_write)]
    app.put("/documents/{id}", dependencies=own)(lambda: None)
    monkeypatch.setitem(sys.modules, "main", main)
    names = {}
    exec(code, names)
    return types.SimpleNamespace(**names)


def test_the_test_of_the_page_production_finds_routes_without_a_guard(
    every_route_has_a_guard,
):
    page = every_route_has_a_guard
    test = page.test_each_other_route_has_a_guard
    test()
    page.app.post("/livez")(lambda: None)
    with pytest.raises(AssertionError):
        test()


def test_the_test_of_the_page_production_finds_raw_routes(every_route_has_a_guard):
    page = every_route_has_a_guard
    page.app.add_route("/raw", lambda _request: None)
    with pytest.raises(AssertionError):
        page.test_each_other_route_has_a_guard()


def test_the_test_of_the_page_production_finds_a_removed_check(
    every_route_has_a_guard, monkeypatch
):
    page = every_route_has_a_guard
    (route,) = page.OWN_CHECKS
    test = page.test_each_own_check_is_a_dependency_of_its_route
    with monkeypatch.context() as patch:
        test(route, patch)
    # The route does not have this dependency.
    page.OWN_CHECKS[route] = lambda: None
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        test(route, patch)
