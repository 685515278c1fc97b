"""A pool for any gRPC service: its target is validated, and its own probe is sent."""

from __future__ import annotations

import anyio
import grpc
import pytest

from fastapi_topaz import ConnectFailed, ConnectionPool, GrpcConnector, Target
from kit.faultkit.frames import answer


pytestmark = pytest.mark.real_clock

SECRET = "a key that nobody may see"


@pytest.mark.parametrize(
    "wrong, error",
    [
        ({"url": ""}, "url must not be empty"),
        ({"url": None}, "url must be a str"),
        ({"url": 8282}, "url must be a str"),
        ({"insecure": 1}, "insecure must be True or False"),
        ({"insecure": True, "cert_file_path": "ca.pem"}, "exclude each other"),
        ({"cert_file_path": 7}, "cert_file_path must be a str"),
        ({"probe": "Health/Check"}, "probe must be a full name"),
        ({"probe": "/Check"}, "probe must be a full name"),
        ({"probe": "/a/b/c"}, "probe must be a full name"),
        ({"probe": "/a/b\n"}, "probe must be a full name"),
        ({"probe": ""}, "probe must not be empty"),
        ({"unserved": ""}, "unserved must not be empty"),
        ({"metadata": "key"}, "metadata must be pairs"),
        ({"metadata": [("key",)]}, "metadata must be pairs"),
        ({"metadata": [("Key", SECRET)]}, "metadata keys must be"),
        ({"metadata": [("key", SECRET + "\n")]}, "must be printable ASCII"),
        ({"metadata": [("key", SECRET.encode())]}, "otherwise a str"),
        *(
            ({"metadata": [(key, SECRET)]}, "none that the transport sets itself")
            for key in (
                "connection",
                "keep-alive",
                "proxy-connection",
                "transfer-encoding",
                "upgrade",
            )
        ),
    ],
)
def test_an_invalid_target_is_refused_and_the_error_shows_no_secret(wrong, error):
    with pytest.raises((TypeError, ValueError), match=error) as caught:
        Target(**{"url": "localhost:1"} | wrong)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("secret", ["metadata", "credentials"])
@pytest.mark.parametrize("transport", ["native", "grpcio"])
async def test_a_target_with_secrets_in_plaintext_logs_one_warning(
    secret, transport, caplog
):
    value = {"metadata": [("x-key", SECRET)], "credentials": lambda: [("k", SECRET)]}
    target = Target(url="topaz.example:1", insecure=True, **{secret: value[secret]})
    connector = GrpcConnector(target, transport)
    for _ in range(2):
        async with ConnectionPool(connector=connector, min_connections=0):
            pass
    (line,) = [line for line in caplog.messages if "without TLS" in line]
    assert "topaz.example:1" in line
    assert SECRET not in caplog.text


def test_the_repr_of_a_target_hides_metadata_and_names_the_probed_service():
    target = Target(url="localhost:1", metadata=[("authorization", SECRET)])
    assert SECRET not in repr(target)
    assert target.metadata == (("authorization", SECRET),)
    assert target.unserved == "does not serve grpc.health.v1.Health"
    assert Target(url="localhost:1", metadata=None).metadata == ()
    assert hash(target) == hash(Target(url=target.url, metadata=target.metadata))


@pytest.mark.parametrize("wrong", ["localhost:1", None, object()])
def test_a_connector_accepts_only_a_target(wrong):
    with pytest.raises(TypeError, match="target must be a Target"):
        GrpcConnector(wrong)


async def test_the_probe_of_the_target_is_sent_before_its_calls(frame_server):
    target = Target(url=frame_server.url, insecure=True, probe="/stock.v1.Stock/Ping")
    async with ConnectionPool(connector=GrpcConnector(target)) as pool:
        assert pool.authorizer_options is None
        with anyio.fail_after(30):
            async with pool.acquire() as conn:
                await conn.call("/stock.v1.Stock/Count", b"")
    assert frame_server.calls["Ping"] >= 1
    assert frame_server.calls["Count"] == 1


async def test_a_server_without_the_service_is_a_permanent_failure(
    frame_server,
):
    unimplemented = str(grpc.StatusCode.UNIMPLEMENTED.value[0])
    frame_server.script = answer(body=b"", tail=[("grpc-status", unimplemented)])
    target = Target(url=frame_server.url, insecure=True)
    async with ConnectionPool(connector=GrpcConnector(target)) as pool:
        with anyio.fail_after(30), pytest.raises(ConnectFailed) as caught:
            await pool.acquire()
    assert caught.value.permanent
    assert "there does not serve grpc.health.v1.Health" in str(caught.value)
