"""`status_app`: a page for people that shows the pools and the decisions of now."""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import quote

import grpc
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from fastapi_topaz._app.config import TopazConfig
from fastapi_topaz._app.status_snapshot import snapshot
from fastapi_topaz._app.status_stream import Streams
from fastapi_topaz._authorizer.pool import ConnectionPool
from fastapi_topaz._checks import safe_repr
from fastapi_topaz._error_text import error_kind, log_text, without_context
from fastapi_topaz._log_limit import LogLimit
from fastapi_topaz.exceptions import PoolMisuse, TopazError


if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


__all__ = ["status_app"]


logger = logging.getLogger("fastapi_topaz.fastapi")

Guard: TypeAlias = Callable[[Request], bool | Awaitable[bool]]

METHODS: Final = "GET, HEAD, OPTIONS"

POLICY_VIOLATION = 1008
"""The close code of a WebSocket that is refused: RFC 6455, section 7.4.1."""

_OF_THE_BODY: Final = frozenset(
    {"content-encoding", "content-length", "content-type", "transfer-encoding"}
)
"""Headers that say what the body is. It is always a short text."""

_LINE_END = re.compile(r"[\r\n\0]")

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def status_app(
    config: TopazConfig, *, guard: Guard, pools: Iterable[ConnectionPool] = ()
) -> ASGIApp:
    """
    Return an ASGI application with a status page, for `app.mount("/topaz", ...)`.

    Below the path of the mount, `/` is the page, `/json` is the same as JSON, and
    `/events` are server-sent events that keep the page current. All of them show the
    process that answers, and no other worker: its pools and their connections, waiting
    callers, the limit, counts of decisions, and recent events. They show addresses of
    servers and texts of errors, but no key, token, identity or resource context.

    Only *guard* decides who may see them, because the dependencies of an application do
    not apply to a mount.

    Args:
        config: The configuration whose pool and decisions are shown.
        guard: Called with each `Request`; sync or async. Only if it returns True, the
            request is answered. Any other result is refused with 403, also None and 1.
            So a dependency of FastAPI, which returns nothing if it permits, is no
            guard. An `HTTPException` that it raises becomes the response if its status
            is 300 or more. If the authorizer or the pool fails, the status is 503. Any
            other error is logged, and the status is 500.
        pools: Further pools of this process to show, such as those of other services.
            Default none.

    Raises:
        TypeError: *config* is not a TopazConfig, *guard* is not callable, or one of
            *pools* is not a ConnectionPool.
    """
    if not isinstance(config, TopazConfig):
        raise TypeError(f"config must be a TopazConfig, got {safe_repr(config)}")
    if not callable(guard):
        raise TypeError(
            f"guard must be callable and return True for a permitted request, got "
            f"{safe_repr(guard)}"
        )
    shown = tuple(pools)
    for pool in shown:
        if not isinstance(pool, ConnectionPool):
            raise TypeError(f"pools must be ConnectionPools, got {safe_repr(pool)}")
    return _StatusApp(config, guard, shown)


class _StatusApp:
    """
    Answers the requests for the status page.

    Strictly private.
    """

    def __init__(
        self, config: TopazConfig, guard: Guard, pools: tuple[ConnectionPool, ...]
    ) -> None:
        self._config = config
        self._guard = guard
        self._pools = pools
        self._page = (
            files("fastapi_topaz._app").joinpath("status_page.html").read_bytes()
        )
        self._headers = _headers(self._page.decode())
        self._streams = Streams(self._text)
        self._limit = LogLimit(logger, "the status page")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._answer(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
        elif scope["type"] == "lifespan":
            for event in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{event}.complete"})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "OPTIONS":
            response = Response(status_code=204, headers={"Allow": METHODS})
        elif scope["method"] not in METHODS.split(", "):
            response = _text(405, "Use GET.", {"Allow": METHODS})
        else:
            refusal = await self._refusal(Request(scope, receive))
            response = self._found(scope) if refusal is None else refusal
        # Last, so that no header of a guard can take their place.
        response.headers.update(self._headers)
        if scope["method"] == "HEAD":
            response.body = b""
        elif isinstance(response, _EventStream):
            await self._streams.run(receive, send, response.start())
            return
        await response(scope, receive, send)

    def _found(self, scope: Scope) -> Response:
        match _path_below(scope):
            case "":
                # The addresses in the page are relative, so its own must end with a
                # slash. This one is relative, too: a proxy may have removed a prefix.
                segment = quote(scope["path"].rpartition("/")[2])
                return Response(status_code=307, headers={"Location": f"./{segment}/"})
            case "/":
                return Response(self._page, media_type="text/html")
            case "/json":
                return Response(self._text(), media_type="application/json")
            case "/events":
                if self._streams.is_full:
                    return _text(503, "Too many streams.", {"Retry-After": "5"})
                return _EventStream()
        return _text(404, "Not Found")

    def _text(self) -> str:
        return json.dumps(snapshot(self._config, self._pools), allow_nan=False)

    async def _refusal(self, request: Request) -> Response | None:
        """Return the response for a request that may not pass, None if it may."""
        try:
            verdict: Any = self._guard(request)
            if inspect.isawaitable(verdict):
                verdict = await verdict
        except Exception as error:  # noqa: BLE001  (code of the application)
            return self._after(error)
        if verdict is True:
            if self._limit.held:
                self._limit.flush()
            return None
        if verdict is not False:
            kind = type(verdict).__name__
            self._limit.report(
                logging.ERROR,
                f"guard: {kind}",
                "the guard of the status page must return True or False, and returned "
                "an object of type %s; the request is refused",
                kind,
            )
        return _text(403, "Not allowed.")

    def _after(self, error: Exception) -> Response:
        """Return the response for a request whose guard raised *error*."""
        if isinstance(error, HTTPException):
            try:
                return _as_raised(error)
            except Exception as broken:  # noqa: BLE001  (headers of the application)
                return self._failed(broken)
        is_outage = isinstance(error, TopazError | grpc.RpcError)
        if not is_outage or isinstance(error, PoolMisuse):
            return self._failed(error)
        self._limit.report(
            logging.WARNING,
            f"guard: {error_kind(error)}",
            "the guard of the status page cannot decide: %s",
            log_text(error),
        )
        detail = "The authorizer is not available."
        return _text(503, detail, {"Retry-After": "1"})

    def _failed(self, error: Exception) -> Response:
        self._limit.report(
            logging.ERROR,
            f"guard: {type(error).__name__}",
            "the guard of the status page failed; the request is refused",
            exc_info=without_context(error),
        )
        return _text(500, "Internal Server Error")


class _EventStream(Response):
    """The start of a stream of events. `Streams` sends the rest."""

    media_type = "text/event-stream"

    def start(self) -> Message:
        """Return the message of ASGI that begins this response."""
        return {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        super().init_headers(headers)
        # The response has no length, and nginx must not keep events back.
        del self.headers["content-length"]
        self.headers["x-accel-buffering"] = "no"


def _as_raised(error: HTTPException) -> Response:
    """
    Return the response that *error* asks for.

    Raises:
        Exception: It has headers that cannot be sent.
    """
    status: Any = error.status_code
    # A status below 300 would look like success, and 304 as if an old page were valid.
    if not isinstance(status, int) or not 300 <= status <= 599 or status == 304:
        status = 403
    headers = {
        name: value
        for name, value in dict(error.headers or {}).items()
        if name.lower() not in _OF_THE_BODY
    }
    # Not each server checks this, and the text may come from the request.
    if _LINE_END.search("".join([*headers, *headers.values()])):
        raise ValueError("a header has the end of a line in it")
    return _text(int(status), str(error.detail), headers)


def _text(
    status: int, text: str, headers: Mapping[str, str] | None = None
) -> PlainTextResponse:
    return PlainTextResponse(text, status, headers=dict(headers or {}))


def _headers(page: str) -> dict[str, str]:
    """Return the headers of all responses; only the parts of *page* may run."""
    sources: dict[str, str] = {}
    for name, content in _INLINE.findall(page):
        digest = hashlib.sha256(content.encode()).digest()
        sources[name] = f"'sha256-{base64.b64encode(digest).decode()}'"
    policy = [
        "default-src 'none'",
        f"script-src {sources['script']}",
        f"style-src {sources['style']}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    return {
        "Content-Security-Policy": "; ".join(policy),
        "Cache-Control": "no-store",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }


def _path_below(scope: Scope) -> str:
    """Return the path of the request below the mount."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    # A server puts the prefix of a proxy before the path, but `FastAPI(root_path=...)`
    # does not. `app_root_path` is that prefix, and the mount has added its own path.
    for prefix in (root, root.removeprefix(scope.get("app_root_path", "").rstrip("/"))):
        rest = path.removeprefix(prefix)
        if prefix and rest != path and rest[:1] in {"", "/"}:
            return rest
    return path
