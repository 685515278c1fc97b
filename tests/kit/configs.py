"""Application configurations, and a request of an application."""

from __future__ import annotations

from starlette.requests import Request

from fastapi_topaz import AuthorizerOptions, Identity, IdentityType, TopazConfig


POLICY = "app.GET.documents"


class Requests(Request):
    """
    Another HTTP request at each use, because its scope is a new one each time.

    Equal checks of one request share an answer, and most tests want a call for each.
    """

    @property
    def scope(self):
        return dict(self._scope)

    @scope.setter
    def scope(self, scope):
        self._scope = scope


REQUEST = Requests({"type": "http", "headers": [], "path_params": {}})
TOPAZ = AuthorizerOptions(url="topaz.test:8282", insecure=True)
"""Options of an authorizer that does not exist."""


def user(connection):
    """Return the identity from the header `user` of a request."""
    return Identity(IdentityType.SUB, connection.headers.get("user", "nobody"))


def config_of(pool, options=None, **settings):
    """Return a configuration with anonymous callers, unless *settings* differ."""
    options = options or pool.authorizer_options or AuthorizerOptions(insecure=True)
    return TopazConfig(
        **{
            "authorizer_options": options,
            "policy_path_root": "app",
            "identity_provider": lambda _request: Identity(IdentityType.NONE),
            "connection_pool": pool,
            **settings,
        }
    )
