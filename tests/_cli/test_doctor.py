"""Test that `doctor` names the cause in each of many broken set-ups, and a remedy."""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor

import anyio
import grpc
import pytest
from aserto.authorizer.v2 import ListPoliciesResponse

from fastapi_topaz._cli.doctor import authorizer as _authorizer
from fastapi_topaz._cli.doctor.checkup import examine
from fastapi_topaz._cli.doctor.context import Settings
from fastapi_topaz._cli.doctor.findings import CATALOGUE, Level
from fastapi_topaz._rpc.statuses import EndedCall, Ending
from fastapi_topaz.testing import EmbeddedAuthorizer
from kit.backends import alternating
from kit.broken import (
    PATIENCE,
    POLICIES,
    SETUPS,
    authority,
    authorizer_with,
    file_with,
    plain,
    problems,
    resolving,
    secured,
)
from kit.faultkit.http2 import Http2Server
from kit.faultkit.tls import Certificate
from kit.faultkit.unavailable import http
from kit.secrets import KEY


pytestmark = pytest.mark.real_clock


def by_id(report, wanted):
    [finding] = [each for each in report.findings if each.id == wanted]
    return finding


@alternating(SETUPS)
async def test_a_broken_set_up_is_named_with_its_remedy(name):
    make, wanted, words = SETUPS[name]
    with make() as settings:
        report = await examine(settings)

    assert problems(report) == {wanted}
    remedy = by_id(report, wanted).remedy
    assert [word for word in words if word not in remedy] == []
    assert report.exit_code == 1
    assert KEY not in json.dumps(report.as_dict())


def test_there_are_at_least_twenty_causes():
    assert len({finding for _, finding, _ in SETUPS.values()}) > 20


async def test_a_healthy_authorizer_has_no_problem():
    with EmbeddedAuthorizer(POLICIES, tls=True, api_key=KEY) as running:
        settings = secured(
            *(running.url, running.ca_cert_path),
            api_key=KEY,
            policy_root="myapp",
            policy_path="myapp.POST.documents",
        )
        report = await examine(settings)

    assert {each.level for each in report.findings} == {Level.OK}
    assert report.exit_code == 0
    wanted = {"versions", "distribution", "grpc-patches", "configuration", "tcp", "tls"}
    wanted |= {"certificate", "http2", "authorizer", "latency", "stream-limit"}
    assert {each.id for each in report.findings} == {
        *wanted,
        *("clock", "policies", "policy"),
    }
    certificate = by_id(report, "certificate").summary
    assert "localhost, 127.0.0.1" in certificate
    assert "2000-01-01" in certificate
    assert KEY not in json.dumps(report.as_dict())


# -- one fault does not hide the others ---------------------------------------------


async def test_all_faults_of_a_certificate_are_found_and_policies_are_still_checked():
    ca = authority()
    certificate = Certificate(issuer=ca, names=["topaz.example"], days=(-9, -2))
    with (
        authorizer_with(certificate, ca, max_concurrent_streams=1) as (running, _),
        file_with(authority("another").pem) as path,
    ):
        report = await examine(secured(running.url, path, policy_root="wrong"))

    assert problems(report) == {
        *("certificate-expired", "certificate-wrong-name", "certificate-unknown-ca"),
        *("stream-limit-low", "policy-root-missing"),
    }
    assert "topaz.example" in by_id(report, "certificate").summary


async def test_faults_of_options_and_of_the_server_are_both_found():
    with EmbeddedAuthorizer(POLICIES, max_concurrent_streams=1) as running:
        report = await examine(plain(running.url, api_key="umlaut \u00fc"))

    assert problems(report) == {"configuration-invalid", "stream-limit-low"}
    assert "umlaut" not in json.dumps(report.as_dict())
    assert by_id(report, "not-checked").level is Level.SKIPPED


@pytest.mark.parametrize("name", ["a_garbage_url", "a_port_where_nothing_listens"])
async def test_what_was_not_checked_is_said(name):
    make, _, _ = SETUPS[name]
    with make() as settings:
        report = await examine(settings)

    assert "Authorizer" in by_id(report, "not-checked").summary
    assert by_id(report, "versions").level is Level.OK


async def test_each_address_of_a_name_is_checked():
    with (
        EmbeddedAuthorizer(POLICIES) as running,
        resolving({"topaz.test": ["127.0.0.1", "127.0.0.2"]}),
    ):
        report = await examine(plain(f"topaz.test:{running.port}"))

    # The pool uses the other address, so this is no problem.
    refused = by_id(report, "tcp-refused")
    assert refused.level is Level.WARNING
    assert refused.addresses == (f"ipv4:127.0.0.2:{running.port}",)
    assert by_id(report, "authorizer").addresses == (f"ipv4:127.0.0.1:{running.port}",)
    assert report.exit_code == 0


async def test_a_fault_of_one_replica_is_found_beside_a_healthy_one():
    with (
        EmbeddedAuthorizer(POLICIES) as running,
        Http2Server(host="127.0.0.2", port=running.port) as other,
        resolving({"topaz.test": ["127.0.0.1", "127.0.0.2"]}),
    ):
        other._script(http(502), None)
        report = await examine(plain(f"topaz.test:{running.port}"))

    assert problems(report) == {"proxy-without-topaz"}
    fault = by_id(report, "proxy-without-topaz")
    assert fault.addresses == (f"ipv4:127.0.0.2:{running.port}",)
    assert by_id(report, "http2").addresses == tuple(
        f"ipv4:127.0.0.{number}:{running.port}" for number in (1, 2)
    )


# -- warnings -----------------------------------------------------------------------


async def test_a_certificate_that_expires_soon_is_a_warning():
    certificate = Certificate(issuer=(ca := authority()), days=(-9, 2))
    with authorizer_with(certificate, ca, api_key=KEY) as (running, path):
        report = await examine(secured(running.url, path, api_key=KEY))

    assert by_id(report, "certificate-expires-soon").level is Level.WARNING
    # It is trusted, so the key is sent, and policies are checked.
    assert by_id(report, "policies").level is Level.OK
    assert report.exit_code == 0


async def test_a_key_in_plaintext_to_another_host_is_a_warning():
    with (
        EmbeddedAuthorizer(POLICIES, api_key=KEY) as running,
        resolving({"topaz.test": ["127.0.0.1"]}),
    ):
        report = await examine(plain(f"topaz.test:{running.port}", api_key=KEY))

    assert by_id(report, "key-in-plaintext").level is Level.WARNING
    assert report.exit_code == 0


async def test_a_slow_authorizer_is_a_warning(monkeypatch):
    monkeypatch.setattr(_authorizer, "SAMPLES", 1)
    with EmbeddedAuthorizer(POLICIES) as running:
        running.delay = 0.15
        report = await examine(plain(running.url))

    assert by_id(report, "latency-high").level is Level.WARNING


@pytest.mark.parametrize(
    "method, wanted",
    [("Query", "clock-unknown"), ("ListPolicies", "policies-unknown")],
)
async def test_a_server_that_does_not_say_it_is_no_problem(method, wanted):
    with EmbeddedAuthorizer(POLICIES) as running:
        running.fail("UNIMPLEMENTED", methods=[method])
        report = await examine(plain(running.url, policy_root="myapp"))

    assert by_id(report, wanted).level is Level.SKIPPED
    assert report.exit_code == 0


# -- secrets ------------------------------------------------------------------------


class Recorder(grpc.GenericRpcHandler):
    """Records the metadata of each call, and serves nothing."""

    def __init__(self):
        self.metadata = []

    def service(self, details):
        self.metadata.append(dict(details.invocation_metadata))


@contextlib.contextmanager
def recording(certificate=None):
    """Yield the address of a gRPC server, and what it records."""
    recorder = Recorder()
    with ThreadPoolExecutor() as threads:
        server = grpc.server(threads, handlers=[recorder])
        if certificate is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            pair = (certificate.private_pem, certificate.pem)
            credentials = grpc.ssl_server_credentials([pair])
            port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        yield f"127.0.0.1:{port}", recorder
        server.stop(None).wait()


@pytest.mark.parametrize("is_trusted", [True, False])
async def test_the_key_is_sent_only_to_a_server_that_is_trusted(is_trusted):
    ca = authority()
    with (
        recording(Certificate(issuer=ca)) as (url, recorder),
        file_with((ca if is_trusted else authority("another")).pem) as path,
    ):
        report = await examine(secured(url, path, api_key=KEY))

    assert ("certificate-unknown-ca" in problems(report)) is not is_trusted
    assert recorder.metadata
    for metadata in recorder.metadata:
        assert (KEY in str(metadata)) is is_trusted


async def test_the_key_is_not_sent_without_tls_if_tls_is_expected():
    with recording() as (url, recorder):
        report = await examine(Settings(url=url, api_key=KEY, timeout=PATIENCE))

    assert "tls-unexpected-plaintext" in problems(report)
    assert recorder.metadata
    assert KEY not in str(recorder.metadata)


@pytest.mark.parametrize("is_trusted", [True, False])
@pytest.mark.parametrize(
    "option, value",
    [
        ("credentials", lambda: [("x-key", KEY)]),
        ("extra_metadata", [("x-key", KEY)]),
        ("tenant_id", KEY),
    ],
)
async def test_all_credentials_are_sent_only_to_a_server_that_is_trusted(
    option, value, is_trusted
):
    ca = authority()
    more = {option: value}
    with (
        recording(Certificate(issuer=ca)) as (url, recorder),
        file_with((ca if is_trusted else authority("another")).pem) as path,
    ):
        await examine(secured(url, path, **more))

    assert recorder.metadata
    for metadata in recorder.metadata:
        assert (KEY in str(metadata)) is is_trusted


@pytest.mark.parametrize("option", ["credentials", "extra_metadata"])
async def test_metadata_without_tls_to_another_host_are_a_warning(option):
    pairs = [("x-key", KEY)]
    value = pairs if option == "extra_metadata" else lambda: pairs
    with (
        EmbeddedAuthorizer(POLICIES) as running,
        resolving({"topaz.test": ["127.0.0.1"]}),
    ):
        report = await examine(plain(f"topaz.test:{running.port}", **{option: value}))

    warning = by_id(report, "key-in-plaintext")
    assert warning.summary == "the metadata are sent to that server without TLS"
    assert KEY not in json.dumps(report.as_dict())


async def test_metadata_that_are_refused_are_named_as_such():
    with EmbeddedAuthorizer(POLICIES, api_key="right") as running:
        more = {"extra_metadata": [("authorization", f"basic {KEY}")]}
        report = await examine(plain(running.url, **more))

    assert problems(report) == {"api-key-refused"}
    assert "a call with these metadata" in by_id(report, "api-key-refused").summary


async def test_the_policy_instance_of_the_application_is_asked():
    asked = []

    def policy(check):
        asked.append((check.policy_instance_name, check.policy_instance_label))
        return True

    with EmbeddedAuthorizer({"myapp.GET.documents": policy}) as running:
        names = {"policy_instance_name": "blue", "policy_instance_label": "green"}
        await examine(plain(running.url, policy_path="myapp.GET.documents", **names))

    assert asked == [("blue", "green")]


async def test_the_policies_of_that_instance_are_listed():
    class Listing:
        async def list_policies(self, **arguments):
            self.arguments = arguments
            return ListPoliciesResponse()

    listing = Listing()
    names = {"policy_instance_name": "blue", "policy_instance_label": "green"}
    await _authorizer._policies(listing, Settings(timeout=1, **names), "here")

    assert listing.arguments == {"timeout": 1, **names}


async def test_only_info_is_asked_if_the_key_is_not_sent():
    with EmbeddedAuthorizer(POLICIES) as running:
        settings = Settings(url=running.url, api_key=KEY, policy_path="myapp")
        report = await examine(settings)

        assert problems(report) == {"tls-unexpected-plaintext"}
        assert set(running.calls) == {"Info"}


def test_the_settings_do_not_show_the_key():
    assert KEY not in repr(Settings(api_key=KEY))


# -- the checks ---------------------------------------------------------------------


def test_each_problem_and_warning_has_a_remedy():
    for name, (level, remedy) in CATALOGUE.items():
        assert bool(remedy) is (level is not Level.OK), name


async def test_control_characters_of_a_server_are_not_printed():
    certificate = Certificate(issuer=(ca := authority("\x1b[31mred")))
    with authorizer_with(certificate, ca) as (running, path):
        report = await examine(secured(running.url, path))

    assert "?[31mred" in by_id(report, "certificate").summary


async def test_a_check_that_hangs_ends_and_the_next_one_runs():
    checked = []

    async def check_hang(_checkup):
        await anyio.sleep_forever()

    async def check_next(checkup):
        checked.append(checkup)

    settings = Settings(timeout=0.001)
    report = await examine(settings, checks=[check_hang, check_next])

    assert problems(report) == {"check-timeout"}
    assert "hang" in by_id(report, "check-timeout").summary
    assert len(checked) == 1


async def test_a_check_that_fails_shows_no_text_of_its_error():
    async def check_fault(_checkup):
        raise RuntimeError(KEY)

    report = await examine(Settings(), checks=[check_fault])

    assert problems(report) == {"check-failed"}
    assert "RuntimeError" in by_id(report, "check-failed").summary
    assert KEY not in json.dumps(report.as_dict())


@pytest.mark.parametrize("refusals, is_answered", [(3, True), (4, False)])
async def test_a_call_that_the_server_refuses_to_process_is_sent_again(
    refusals, is_answered
):
    class Connection:
        calls = 0

        async def call(self, *_arguments, **_options):
            self.calls += 1
            if self.calls <= refusals:
                code = grpc.StatusCode.UNAVAILABLE
                raise EndedCall(Ending.REFUSED_STREAM, code, "refused")
            return b""

    connection = Connection()
    asking = _authorizer.Calls(connection)._send("/a/b", b"", None, ())
    if is_answered:
        assert await asking == b""
    else:
        with pytest.raises(EndedCall):
            await asking
    assert connection.calls == 4
