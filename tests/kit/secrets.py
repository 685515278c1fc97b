"""Secrets in tests, and the search for them in errors."""

from __future__ import annotations

import inspect
import traceback
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import attrs
import pytest
from fastapi import Request

import fastapi_topaz
from fastapi_topaz import Identity, IdentityType


IDENTITY, RESOURCE, KEY = "swordfish", "hunter2", "open-sesame"


IDENTITY, RESOURCE, KEY = "swordfish", "hunter2", "open-sesame"


SECRETS = (IDENTITY, RESOURCE, KEY)


ALICE = Identity(IdentityType.JWT, IDENTITY)


QUESTION = {
    "policy_path": "app.x",
    "decisions": ("allowed",),
    "identity": ALICE,
    "resource_context": {"card": RESOURCE},
}


PACKAGE = str(Path(fastapi_topaz.__file__).parent)


def reachable(error):
    """Yield *error* and all errors reachable from it, each once."""
    found, seen = [error], set()
    while found:
        each = found.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        found += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            found += each.exceptions


def is_ours(frame):
    filename = frame.f_code.co_filename
    return filename.startswith(PACKAGE) or "generated" in filename


def frames(error):
    """Yield all frames reachable from *error*."""
    for each in reachable(error):
        for frame, _ in traceback.walk_tb(each.__traceback__):
            yield frame


def texts(value, seen):
    """Yield all texts in *value*, however deep."""
    if id(value) in seen:
        return
    seen[id(value)] = value
    try:
        yield repr(value)
    except Exception as error:  # noqa: BLE001  (partly initialized objects)
        yield type(error).__name__
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes | bytearray | memoryview):
        yield bytes(value).decode("latin-1")
    else:
        for part in parts(value):
            yield from texts(part, seen)


def parts(value):
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, list | tuple | set | frozenset | deque):
        return value
    if isinstance(value, BaseException):
        # AttributeError and UnicodeError keep the object that they failed with.
        names = ("args", "obj", "object", "value", "__dict__", "__notes__")
    elif attrs.has(type(value)):
        names = (*(field.name for field in attrs.fields(type(value))), "__dict__")
    elif inspect.iscoroutine(value) and value.cr_frame is not None:
        return value.cr_frame.f_locals.values()
    else:
        return ()
    return [getattr(value, name, None) for name in names]


def secrets_in(value):
    found = {}
    for text in texts(value, {}):
        found |= {secret: text for secret in SECRETS if secret in text}
    return found


def leaks(error):
    """Return the path from *error* to a secret in a frame of the package."""
    found = []
    for frame in frames(error):
        if is_ours(frame):
            for name, value in frame.f_locals.items():
                found += [(frame.f_code.co_qualname, name, secrets_in(value))]
    return [each for each in found if each[2]]


def assert_clean(error, *, shown=()):
    """
    Fail if *error* leads to a secret, except through errors of the classes *shown*.
    """
    assert leaks(error) == []
    for each in reachable(error):
        if not isinstance(each, shown):
            assert not secrets_in(each), repr(each)


async def error_of(awaitable, *expected):
    """Return what *awaitable* raises."""
    with pytest.raises(expected) as caught:
        await awaitable
    assert any(map(is_ours, frames(caught.value))), "otherwise this test proves nothing"
    return caught.value


class Foreign:
    """An identity of another library, with a repr that shows everything."""

    type, value = 3.5, IDENTITY

    def __repr__(self):
        return f"Foreign({self.value})"


SURROGATE = "\udc80"


def secret_request(**scope):
    scope = {"type": "http", "method": "GET", "path": f"/{RESOURCE}", **scope}
    scope.setdefault("headers", [(b"authorization", f"Bearer {IDENTITY}".encode())])
    return Request({"path_params": {"card": RESOURCE}, **scope})
