"""
Findings, and the catalogue of all that can be found, with its level and its remedy.

Nothing here uses the network or prints.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import attrs


if TYPE_CHECKING:
    from collections.abc import Iterable


__all__ = ["CATALOGUE", "Finding", "Level", "Report", "found"]


class Level(enum.StrEnum):
    """How bad a finding is. Only a problem changes the exit code."""

    OK = "ok"
    SKIPPED = "skipped"
    WARNING = "warning"
    PROBLEM = "problem"


class Known(NamedTuple):
    """An entry of the catalogue: the level of a finding, and what to do."""

    level: Level
    remedy: str = ""


_OK = Known(Level.OK)


def _warning(remedy: str) -> Known:
    return Known(Level.WARNING, remedy)


def _problem(remedy: str) -> Known:
    return Known(Level.PROBLEM, remedy)


def _skipped(remedy: str) -> Known:
    return Known(Level.SKIPPED, remedy)


_WRONG_PORT = (
    "Check host and port in --url. Topaz's authorizer listens on port 8282 by default; "
    "its gateway (8383) and its console (8080) are other ports."
)
_OTHER_NAME = (
    "Pass the name in the certificate as --server-name (server_name), or issue a "
    "certificate for the name in --url."
)
_SERVER_DOWN = (
    "Check that Topaz runs and is not paused or overloaded: look at its log and CPU, "
    "and restart it if it does not answer."
)

CATALOGUE: Final[dict[str, Known]] = {
    # -- this environment
    "versions": _OK,
    "version-too-old": _problem(
        "Upgrade it: pip install -U fastapi-topaz-pool, and look for the package that "
        "holds it back with pip check."
    ),
    "distribution": _OK,
    "second-distribution": _problem(
        "Uninstall both, then install one: pip uninstall -y fastapi-topaz "
        "fastapi-topaz-pool, then pip install fastapi-topaz-pool."
    ),
    "grpc-patches": _OK,
    "grpc-patched": _warning(
        "It replaces functions of gRPC when it is active. The default transport "
        "(native) does not use them. With transport='grpcio', switch its integration "
        "for gRPC off if calls fail or hang."
    ),
    # -- configuration
    "configuration": _OK,
    "configuration-invalid": _problem("Correct the option that the message names."),
    "certificate-file-unusable": _problem(
        "Correct the path or the permissions of the file that the message names, or "
        "replace it with a PEM file."
    ),
    "key-in-plaintext": _warning(
        "Use TLS: drop --insecure (insecure=True). Without TLS, each machine on the "
        "path can read the key."
    ),
    # -- network
    "dns": _OK,
    "dns-failed": _problem(
        "Check the spelling of the host in --url, and that this machine's resolver "
        "knows it: getent hosts NAME. In a container, check its network and service "
        "name."
    ),
    "dns-timeout": _problem(
        "Check the name servers of this machine in /etc/resolv.conf: none answered in "
        "time."
    ),
    "tcp": _OK,
    "tcp-refused": _problem(f"Start Topaz, if it does not run. {_WRONG_PORT}"),
    "tcp-timeout": _problem(
        "A firewall or a wrong address drops the packets: check firewall rules, "
        "security groups and network policies between this machine and that address."
    ),
    "tcp-failed": _problem(
        "Check the route from this machine to that address, or the path of the socket."
    ),
    # -- TLS
    "tls": _OK,
    "certificate": _OK,
    "tls-not-spoken": _problem(
        f"The server does not speak TLS on this port. {_WRONG_PORT}"
    ),
    "tls-unexpected-plaintext": _problem(
        "The server speaks gRPC without TLS: pass --insecure (insecure=True) if that "
        "is meant, or switch TLS on in Topaz."
    ),
    "tls-expected": _problem(
        "The server speaks TLS: drop --insecure (insecure=True), and pass the file of "
        "its CA as --cert (cert_file_path)."
    ),
    "tls-timeout": _problem(
        f"The server accepts connections, but is silent. {_SERVER_DOWN}"
    ),
    "tls-failed": _problem(
        "Compare the TLS settings of server and client: versions, ciphers, the kind of "
        "the key, and whether the server requires a client certificate (--client-cert, "
        "--client-key). The log of the server names its reason."
    ),
    "tls-version": _problem("Let the server support TLS 1.2 or newer."),
    "tls-name-unknown": _problem(
        f"The server has no certificate for the requested name. {_OTHER_NAME}"
    ),
    "client-certificate-required": _problem(
        "The server requires mutual TLS: pass --client-cert and --client-key "
        "(client_cert_path and client_key_path)."
    ),
    "client-certificate-refused": _problem(
        "Pass a client certificate that has not expired, allows client authentication "
        "and is signed by a CA that the server trusts."
    ),
    "alpn-missing": _problem(
        "Switch HTTP/2 on in the server or the proxy in front of it (ALPN h2). gRPC "
        "needs it."
    ),
    "certificate-expired": _problem(
        "Renew the certificate, and let the server load it. If it is new, correct the "
        "clock of this machine."
    ),
    "certificate-not-yet-valid": _problem(
        "Correct the clock of this machine (NTP), or wait until the certificate "
        "becomes valid, or issue it again."
    ),
    "certificate-expires-soon": _warning("Renew the certificate before it expires."),
    "certificate-wrong-name": _problem(_OTHER_NAME),
    "certificate-unknown-ca": _problem(
        "Pass the PEM file of the CA that signed the server's certificate as --cert "
        "(cert_file_path). Topaz writes it as grpc-ca.crt."
    ),
    "certificate-not-acceptable": _problem(
        "Issue a certificate that allows server authentication, and send its whole "
        "chain."
    ),
    # -- what answers
    "http2": _OK,
    "http1-server": _problem(
        "A server that speaks only HTTP/1 answers, such as a web server, a REST "
        f"gateway or a proxy. {_WRONG_PORT} Behind a proxy, let it pass gRPC (HTTP/2)."
    ),
    "not-http2": _problem(f"The server is not a gRPC server. {_WRONG_PORT}"),
    "closed-at-once": _problem(
        "The server or a proxy closes new connections at once: look at its log. It may "
        "be shutting down, be full, refuse this client, or expect TLS where --insecure "
        "is given."
    ),
    "server-silent": _problem(
        f"The server accepts connections, but is silent. {_SERVER_DOWN} Perhaps the "
        "port belongs to another service that waits for its client."
    ),
    "server-goaway": _problem(
        "The server ends each new connection (GOAWAY): it may be shutting down, or a "
        "proxy may have no server behind it. Look at its log."
    ),
    "authorizer": _OK,
    "authorizer-silent": _problem(
        f"The connection works, but the Authorizer does not answer. {_SERVER_DOWN}"
    ),
    "authorizer-unavailable": _problem(
        "Start Topaz, or correct the address of Topaz in the proxy in front of it: it "
        "answers that the service is not available."
    ),
    "not-an-authorizer": _problem(f"Another gRPC service answers. {_WRONG_PORT}"),
    "proxy-without-topaz": _problem(
        "A proxy answers instead of Topaz: check that Topaz runs behind it, and that "
        "its route for /aserto.authorizer.v2.Authorizer leads to Topaz over HTTP/2."
    ),
    "connection-lost": _problem(
        "The server or a proxy cut the connection during a call: look at its log and "
        "at its limits."
    ),
    "authorizer-error": _problem("Look for this error in the log of Topaz."),
    "latency": _OK,
    "latency-high": _warning(
        "Run Topaz near the application, and check its CPU. Each check takes at least "
        "this long."
    ),
    "stream-limit": _OK,
    "stream-limit-low": _problem(
        "Raise the limit of concurrent streams of the server or proxy (100 is usual), "
        "or open more connections (max_connections)."
    ),
    "clock": _OK,
    "clock-skew": _problem(
        "Synchronise both clocks (NTP). Otherwise tokens and certificates are refused "
        "that are valid."
    ),
    "clock-unknown": _skipped(
        "Compare the clocks by hand if tokens or certificates are refused."
    ),
    # -- credentials and policies
    "api-key-missing": _problem(
        "Pass the API key: set the environment variable TOPAZ_API_KEY, or --api-key "
        "(api_key)."
    ),
    "api-key-refused": _problem(
        "Pass the API key that is in Topaz's configuration (auth.keys) as "
        "TOPAZ_API_KEY or --api-key (api_key)."
    ),
    "credentials-failed": _problem(
        "Correct the callable that is passed as credentials. The message names its "
        "error and the line, or says that it did not return in time."
    ),
    "permission-denied": _problem(
        "Check --tenant-id (tenant_id), and which calls Topaz or the proxy allows with "
        "this API key."
    ),
    "policies": _OK,
    "policies-missing": _problem(
        "Let Topaz load a policy: check the bundle or the local paths under opa in its "
        "configuration, and its log."
    ),
    "policy-root-missing": _problem(
        "Pass the package that all policies are below as --policy-root "
        "(policy_path_root), or rename the packages of the policies."
    ),
    "policy": _OK,
    "policy-missing": _problem(
        "Declare that package in the policy, with a rule for the decision `allowed`, "
        "or correct the path."
    ),
    "policies-unknown": _skipped(
        "Let this client list policies (ListPolicies), or check by hand that the root "
        "exists."
    ),
    # -- the doctor itself
    "not-checked": _skipped("Remedy the problem above first, then run doctor again."),
    "check-timeout": _problem(
        "Repeat with a higher --timeout. If it stays, look at the log of Topaz."
    ),
    "check-failed": _problem(
        "This is a fault of doctor: report it with the name of the error."
    ),
}
"""Each finding by its id. The ids are stable, so that scripts can rely on them."""


@attrs.frozen
class Finding:
    """
    One result of a check.

    Args:
        id: A key of `CATALOGUE`.
        level: How bad it is.
        summary: What was found, in one sentence. Never a key, token or identity.
        remedy: What to do: facts of this set-up, then the remedy of the catalogue.
            Empty if nothing is to be done.
        addresses: The addresses of the server that it is about.
    """

    id: str
    level: Level
    summary: str
    remedy: str
    addresses: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return all attributes as a dict, ready for JSON."""
        return attrs.asdict(self)


def found(
    id: str,  # noqa: A002  (what it is called in the output)
    summary: str,
    *addresses: str,
    facts: str = "",
) -> Finding:
    """
    Return the finding *id* of the catalogue.

    *facts* are whole sentences. The remedy begins with them.
    """
    level, remedy = CATALOGUE[id]
    remedy = printable(f"{facts} {remedy}".strip())
    return Finding(id, level, printable(summary), remedy, addresses)


def printable(text: str) -> str:
    """Return *text* without control characters, which a server may have sent."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


@attrs.frozen
class Report:
    """All findings, in the order of the checks."""

    target: str
    findings: tuple[Finding, ...]

    @classmethod
    def of(cls, target: str, findings: Iterable[Finding]) -> Report:
        """Return the report, in which equal findings of several addresses are one."""
        merged: dict[tuple[str, Level, str], Finding] = {}
        for each in findings:
            key = (each.id, each.level, each.summary)
            first = merged.setdefault(key, each)
            if first is not each:
                addresses = dict.fromkeys((*first.addresses, *each.addresses))
                merged[key] = attrs.evolve(first, addresses=tuple(addresses))
        return cls(target, tuple(merged.values()))

    @property
    def problems(self) -> int:
        """The number of problems."""
        return sum(each.level is Level.PROBLEM for each in self.findings)

    @property
    def exit_code(self) -> int:
        """1 if a problem was found, else 0."""
        return 1 if self.problems else 0

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a dict, ready for JSON."""
        return {
            "ok": not self.problems,
            "problems": self.problems,
            "target": self.target,
            "findings": [each.as_dict() for each in self.findings],
        }
