from __future__ import annotations

import inspect
import math
import pathlib
from types import SimpleNamespace

import aserto.client
import attrs
import pytest
from aserto.authorizer.v2.api import IdentityType as AsertoIdentityType

from fastapi_topaz import AuthorizerOptions, ConnectionPool, Identity, IdentityType
from fastapi_topaz._pool.state.options import PoolOptions


pytestmark = pytest.mark.real_clock

# The table of the guide, plus the parameters added later.
DEFAULTS = {
    "min_connections": 2,
    "max_connections": 10,
    "acquire_timeout": 5.0,
    "connection_timeout": 10.0,
    "max_idle_time": 300.0,
    "idle_check_interval": 60.0,
    "health_check_interval": 30.0,
    "health_check_timeout": 5.0,
    "eager_init": False,
    "retry_on_failure": True,
    "max_retries": 3,
    "streams_per_connection": 1,
    "max_waiting": None,
    "max_lifetime": 3600.0,
    "leak_threshold": 0.0,
    "adaptive_limit": True,
    "name": None,
}
COUNTS = {
    "min_connections": 0,
    "max_connections": 1,
    "max_retries": 0,
    "streams_per_connection": 1,
    "max_waiting": 0,
}
# Times where 0 means "at once" or "never", and infinity means "no limit".
TIMES = [
    "acquire_timeout",
    "max_idle_time",
    "idle_check_interval",
    "health_check_interval",
    "max_lifetime",
    "leak_threshold",
]
# Times where neither 0 nor infinity is valid.
LIMITS = ["connection_timeout", "health_check_timeout"]
FLAGS = ["eager_init", "retry_on_failure", "adaptive_limit"]
SECRET = "s3cret"


def names_and_shows(error, name, value):
    return name in str(error) and repr(value) in str(error)


# -- the pool


def test_the_defaults_match_the_guide():
    assert attrs.asdict(ConnectionPool().options) == DEFAULTS


def test_the_signature_has_the_same_defaults():
    parameters = inspect.signature(ConnectionPool).parameters
    told = {name: parameter.default for name, parameter in parameters.items()}
    others = {"connector": None, "transport": None}
    others |= {"meter_provider": None, "semantic_conventions": False}
    assert told == DEFAULTS | others
    kinds = {parameter.kind for parameter in parameters.values()}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}


def test_the_example_in_the_guide_is_accepted():
    pool = ConnectionPool(
        min_connections=2,
        max_connections=10,
        acquire_timeout=5.0,
        connection_timeout=10.0,
        max_idle_time=300,
        idle_check_interval=60,
        health_check_interval=30,
        health_check_timeout=5.0,
        eager_init=False,
    )
    assert attrs.asdict(pool.options) == DEFAULTS


def test_every_parameter_reaches_the_options():
    values = {
        "min_connections": 1,
        "max_connections": 3,
        "acquire_timeout": 1.5,
        "connection_timeout": 2.5,
        "max_idle_time": 3.5,
        "idle_check_interval": 4.5,
        "health_check_interval": 5.5,
        "health_check_timeout": 6.5,
        "eager_init": True,
        "retry_on_failure": False,
        "max_retries": 7,
        "streams_per_connection": 8,
        "max_waiting": 9,
        "max_lifetime": 10.5,
        "leak_threshold": 11.5,
        "adaptive_limit": False,
        "name": "checks",
    }
    assert values.keys() == DEFAULTS.keys()
    pool = ConnectionPool(**values)
    assert attrs.asdict(pool.options) == values
    assert pool.options.capacity == 24
    assert pool.options.attempts == 1
    assert ConnectionPool(max_retries=2).options.attempts == 3


@pytest.mark.parametrize("name, minimum", COUNTS.items())
def test_the_least_count_is_accepted_and_one_less_is_not(name, minimum):
    others = {"min_connections": 0} if name == "max_connections" else {}
    pool = ConnectionPool(**{name: minimum}, **others)
    assert getattr(pool.options, name) == minimum
    for value in (minimum - 1, -(10**6)):
        with pytest.raises(ValueError, match=name) as caught:
            ConnectionPool(**{name: value}, **others)
        assert names_and_shows(caught.value, name, value)


@pytest.mark.parametrize(
    "value", [True, False, 1.0, math.nan, "1", b"1", [1]], ids=repr
)
@pytest.mark.parametrize("name", COUNTS)
def test_a_count_must_be_an_int(name, value):
    with pytest.raises(TypeError, match=name) as caught:
        ConnectionPool(**{name: value})
    assert names_and_shows(caught.value, name, value)


@pytest.mark.parametrize("name", [name for name in COUNTS if name != "max_waiting"])
def test_a_count_must_not_be_none(name):
    with pytest.raises(TypeError, match=name):
        ConnectionPool(**{name: None})


@pytest.mark.parametrize("least, most", [(3, 2), (2, 1), (11, None)])
def test_min_connections_must_not_exceed_max_connections(least, most):
    given = {"min_connections": least, "max_connections": most}
    given = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(ValueError, match="min_connections") as caught:
        ConnectionPool(**given)
    assert f"min_connections={least}" in str(caught.value)
    assert f"max_connections={most or 10}" in str(caught.value)


@pytest.mark.parametrize("most, least", [(1, 1), (2, 2), (3, 2)])
def test_an_omitted_min_connections_is_2_or_max_connections(most, least):
    pool = ConnectionPool(max_connections=most)
    assert pool.options.min_connections == least
    assert type(pool.options.min_connections) is int
    assert pool.status().min_connections == least
    # The value is a fixed number from then on. A resize does not change it.
    with pytest.raises(ValueError, match="min_connections"):
        pool.resize(2, 1)
    pool.resize(least, most)
    assert pool.options.min_connections == least


def test_min_connections_may_be_max_connections():
    assert ConnectionPool(min_connections=4, max_connections=4).options.capacity == 4


@pytest.mark.parametrize(
    "value", [-1, -0.001, -math.inf, math.nan, 10**400], ids=lambda v: str(v)[:8]
)
@pytest.mark.parametrize("name", TIMES + LIMITS)
def test_a_time_must_be_a_nonnegative_number(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        ConnectionPool(**{name: value})
    assert value == 10**400 or names_and_shows(caught.value, name, value)


@pytest.mark.parametrize("value", [True, False, "5", "5s", b"5", None, [5]], ids=repr)
@pytest.mark.parametrize("name", TIMES + LIMITS)
def test_a_time_must_be_a_number_of_seconds(name, value):
    with pytest.raises(TypeError, match=name) as caught:
        ConnectionPool(**{name: value})
    assert names_and_shows(caught.value, name, value)


@pytest.mark.parametrize("value", [0, 0.0, math.inf])
@pytest.mark.parametrize("name", LIMITS)
def test_a_connect_limit_must_be_positive_and_finite(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        ConnectionPool(**{name: value})
    assert names_and_shows(caught.value, name, value)


@pytest.mark.parametrize("name", ["idle_check_interval", "health_check_interval"])
def test_an_interval_must_be_at_least_1_ms(name):
    assert ConnectionPool(**{name: 0.001})
    for value in (5e-324, 1e-6, 0.00099):
        with pytest.raises(ValueError, match=name) as caught:
            ConnectionPool(**{name: value})
        assert names_and_shows(caught.value, name, value)


def test_a_lifetime_must_be_0_or_at_least_1_s():
    assert ConnectionPool(max_lifetime=1)
    with pytest.raises(
        ValueError, match=r"max_lifetime must be 0 \(never\) or at least 1 s"
    ):
        ConnectionPool(max_lifetime=0.999)


@pytest.mark.parametrize("value", [0, 0.0, 1, 1.5, math.inf])
@pytest.mark.parametrize("name", TIMES)
def test_a_time_may_be_0_or_infinite(name, value):
    assert getattr(ConnectionPool(**{name: value}).options, name) == value


@pytest.mark.parametrize("value", [0, 1, "yes", None, 1.0], ids=repr)
@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_must_be_a_bool(name, value):
    with pytest.raises(TypeError, match=name) as caught:
        ConnectionPool(**{name: value})
    assert names_and_shows(caught.value, name, value)


@pytest.mark.parametrize(
    "value, error",
    [("", ValueError), (" ", ValueError), (5, TypeError), (b"x", TypeError)],
    ids=repr,
)
def test_a_name_must_be_a_str(value, error):
    with pytest.raises(error, match="name") as caught:
        ConnectionPool(name=value)
    assert names_and_shows(caught.value, "name", value)


@pytest.mark.parametrize(
    "value",
    [5, "localhost:8282", object(), print],
    ids=lambda value: type(value).__name__,
)
def test_a_connector_must_have_a_connect_method(value):
    with pytest.raises(TypeError, match="connector") as caught:
        ConnectionPool(connector=value)
    assert names_and_shows(caught.value, "connector", value)


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(TypeError, match="max_size"):
        ConnectionPool(max_size=5)
    with pytest.raises(TypeError):
        ConnectionPool(2, 10)


def test_resize_validates_like_the_constructor():
    pool = ConnectionPool()
    for least, most, error in [
        (-1, 5, ValueError),
        (0, 0, ValueError),
        (6, 5, ValueError),
        (True, 5, TypeError),
        (1, 5.0, TypeError),
    ]:
        with pytest.raises(error, match="connections"):
            pool.resize(least, most)
    # A rejected resize changes nothing.
    assert attrs.asdict(pool.options) == DEFAULTS
    pool.resize(1, 5)
    assert (pool.options.min_connections, pool.options.max_connections) == (1, 5)


def test_pool_options_are_immutable():
    options = ConnectionPool().options
    assert isinstance(options, PoolOptions)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        options.max_connections = 100


# -- the authorizer


def test_the_defaults_of_the_authorizer():
    options = AuthorizerOptions()
    assert options.url == "localhost:8282"
    assert options.tenant_id is None
    assert options.api_key is None
    assert options.cert_file_path is None
    assert options.insecure is False
    assert options.metadata == ()


def test_credentials_become_metadata():
    options = AuthorizerOptions(api_key="key", tenant_id="tenant")
    assert options.metadata == (
        ("authorization", "basic key"),
        ("aserto-tenant-id", "tenant"),
    )


@pytest.mark.parametrize(
    "url", ["topaz:8282", "127.0.0.1:1", "[::1]:8282", "dns:///topaz:8282", "unix:/s"]
)
def test_any_grpc_target_is_accepted_as_url(url):
    assert AuthorizerOptions(url=url).url == url


@pytest.mark.parametrize(
    "url, error",
    [
        ("", ValueError),
        ("  ", ValueError),
        ("http://localhost:8282", ValueError),
        ("https://localhost:8282", ValueError),
        ("HTTPS://localhost:8282", ValueError),
        (None, TypeError),
        (8282, TypeError),
        (b"localhost:8282", TypeError),
    ],
    ids=repr,
)
def test_an_invalid_url_is_rejected(url, error):
    with pytest.raises(error, match="url") as caught:
        AuthorizerOptions(url=url)
    assert names_and_shows(caught.value, "url", url)


@pytest.mark.parametrize("name", ["tenant_id", "api_key", "cert_file_path"])
def test_an_empty_authorizer_option_counts_as_none(name):
    options = AuthorizerOptions(**{name: ""})
    assert getattr(options, name) is None
    assert options == AuthorizerOptions()
    assert options.metadata == ()
    given = SimpleNamespace(url="localhost", **{name: ""})
    assert AuthorizerOptions.coerce(given) == AuthorizerOptions()


def test_an_empty_certificate_path_does_not_contradict_plaintext():
    options = AuthorizerOptions(cert_file_path="", insecure=True)
    assert options == AuthorizerOptions(insecure=True)


@pytest.mark.parametrize("name", ["tenant_id", "api_key", "cert_file_path"])
def test_a_blank_authorizer_option_is_rejected(name):
    # A blank string is not an unset variable. It is a sign of a mistake.
    with pytest.raises(ValueError, match=name):
        AuthorizerOptions(**{name: " "})
    with pytest.raises(TypeError, match=name):
        AuthorizerOptions(**{name: 5})


@pytest.mark.parametrize("ending", ["\n", "\r\nx: y", "\x00", "ü", "\x7f"], ids=repr)
@pytest.mark.parametrize("name", ["tenant_id", "api_key"])
def test_an_invalid_header_value_is_rejected_without_showing_it(name, ending):
    with pytest.raises(ValueError, match=name) as caught:
        AuthorizerOptions(**{name: SECRET + ending})
    assert SECRET not in repr(caught.value)


def test_an_api_key_of_the_wrong_type_is_not_shown():
    with pytest.raises(TypeError, match="api_key") as caught:
        AuthorizerOptions(api_key=SECRET.encode())
    assert SECRET not in str(caught.value)
    with pytest.raises(TypeError, match="api_key") as caught:
        AuthorizerOptions(api_key=[SECRET])
    assert SECRET not in str(caught.value)


def test_the_api_key_is_not_in_the_repr():
    options = AuthorizerOptions(api_key=SECRET, tenant_id="tenant")
    assert SECRET not in repr(options)
    assert "tenant" in repr(options)


@pytest.mark.parametrize("value", [0, 1, "yes", None], ids=repr)
def test_insecure_must_be_a_bool(value):
    with pytest.raises(TypeError, match="insecure") as caught:
        AuthorizerOptions(insecure=value)
    assert names_and_shows(caught.value, "insecure", value)


def test_a_certificate_and_plaintext_exclude_each_other():
    with pytest.raises(ValueError, match="insecure") as caught:
        AuthorizerOptions(insecure=True, cert_file_path="ca.pem")
    assert "cert_file_path='ca.pem'" in str(caught.value)


def test_a_certificate_may_be_a_path_that_does_not_exist_yet():
    path = pathlib.Path("/nonexistent", "ca.pem")
    assert AuthorizerOptions(cert_file_path=path).cert_file_path == str(path)


def test_authorizer_options_compare_by_value():
    assert AuthorizerOptions(url="a:1") == AuthorizerOptions(url="a:1")
    assert AuthorizerOptions(url="a:1") != AuthorizerOptions(url="a:2")
    assert hash(AuthorizerOptions(url="a:1")) == hash(AuthorizerOptions(url="a:1"))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        AuthorizerOptions().url = "other"
    with pytest.raises(TypeError):
        AuthorizerOptions("localhost:8282")


def test_aserto_options_are_converted():
    given = aserto.client.AuthorizerOptions(
        url="topaz:1", tenant_id="t", api_key="k", cert_file_path="ca.pem"
    )
    assert AuthorizerOptions.coerce(given) == AuthorizerOptions(
        url="topaz:1", tenant_id="t", api_key="k", cert_file_path="ca.pem"
    )
    own = AuthorizerOptions()
    assert AuthorizerOptions.coerce(own) is own


def test_aserto_options_are_validated_too():
    with pytest.raises(ValueError, match="url"):
        AuthorizerOptions.coerce(
            aserto.client.AuthorizerOptions(url="https://topaz:8282")
        )


# -- identities


def test_the_identity_types_match_aserto():
    ours = {name: int(kind) for name, kind in IdentityType.__members__.items()}
    for name, number in AsertoIdentityType.items():
        assert ours[name] == number
        if number != IdentityType.IDENTITY_TYPE_UNKNOWN:
            assert ours[name.removeprefix("IDENTITY_TYPE_")] == number
    assert set(ours.values()) == set(AsertoIdentityType.values())


def test_long_identity_type_names_are_aliases():
    assert IdentityType.IDENTITY_TYPE_SUB is IdentityType.SUB
    assert IdentityType["IDENTITY_TYPE_JWT"] is IdentityType.JWT


@pytest.mark.parametrize(
    "kind", [IdentityType.SUB, IdentityType.JWT, IdentityType.MANUAL]
)
def test_an_identity_needs_a_type_and_a_value(kind):
    identity = Identity(kind, "alice")
    assert (identity.type, identity.value) == (kind, "alice")
    assert identity == Identity(type=int(kind), value="alice")
    for value in (None, ""):
        with pytest.raises(ValueError, match="value") as caught:
            Identity(kind, value)
        assert kind.name in str(caught.value)


def test_an_anonymous_identity_needs_no_value():
    assert Identity(IdentityType.NONE).value is None


def test_the_identity_type_unknown_is_rejected():
    with pytest.raises(ValueError, match="type"):
        Identity(IdentityType.IDENTITY_TYPE_UNKNOWN, "alice")


@pytest.mark.parametrize(
    "kind, error",
    [
        (5, ValueError),
        (-1, ValueError),
        (True, TypeError),
        (2.0, TypeError),
        ("SUB", TypeError),
        (None, TypeError),
    ],
    ids=repr,
)
def test_an_invalid_identity_type_is_rejected(kind, error):
    with pytest.raises(error, match="type"):
        Identity(kind, "alice")


@pytest.mark.parametrize("value", [SECRET.encode(), [SECRET], {SECRET: 1}], ids=repr)
def test_an_invalid_identity_value_is_rejected_and_not_shown(value):
    with pytest.raises(TypeError, match="value") as caught:
        Identity(IdentityType.SUB, value)
    assert SECRET not in str(caught.value)


def test_swapped_arguments_do_not_show_the_value():
    with pytest.raises(TypeError, match="type") as caught:
        Identity(SECRET, IdentityType.JWT)
    assert SECRET not in str(caught.value)


def test_the_identity_value_is_not_in_the_repr():
    identity = Identity(IdentityType.JWT, SECRET)
    assert SECRET not in repr(identity)
    assert "JWT" in repr(identity)


def test_identities_compare_by_value():
    assert Identity(IdentityType.SUB, "a") == Identity(IdentityType.SUB, "a")
    assert Identity(IdentityType.SUB, "a") != Identity(IdentityType.JWT, "a")
    assert len({Identity(IdentityType.SUB, "a"), Identity(IdentityType.SUB, "a")}) == 1
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Identity(IdentityType.SUB, "a").value = "b"


def test_aserto_identities_are_converted():
    given = aserto.client.Identity(AsertoIdentityType.IDENTITY_TYPE_SUB, "alice")
    assert Identity.coerce(given) == Identity(IdentityType.SUB, "alice")
    assert Identity.coerce(None) == Identity(IdentityType.NONE)
    own = Identity(IdentityType.SUB, "alice")
    assert Identity.coerce(own) is own


@pytest.mark.parametrize("given", [SECRET, SECRET.encode(), {"sub": SECRET}], ids=repr)
def test_a_value_that_is_not_an_identity_is_rejected_and_not_shown(given):
    with pytest.raises(TypeError, match="identity") as caught:
        Identity.coerce(given)
    assert SECRET not in str(caught.value)
