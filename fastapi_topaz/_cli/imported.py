"""
Objects of an application, by names such as `main:config`.

An error of the application is shown in one line. Its text may hold a secret. So this
module hides values that have the name of a secret, in the environment and in all code
that the traceback leads through.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import re
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
from starlette.applications import Starlette
from starlette.routing import Router

from fastapi_topaz._app.config import TopazConfig
from fastapi_topaz._app.listing import listed_routes
from fastapi_topaz._app.routes import router_of
from fastapi_topaz._authorizer.options import AuthorizerOptions
from fastapi_topaz._cli.doctor.findings import printable
from fastapi_topaz._error_text import shortened


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastapi_topaz._app.listing import Listed


__all__ = ["CannotImport", "imported", "routes_in", "settings_in"]


_LONGEST: Final = 500
"""The most characters of an error of the application."""

# Not a variable `key`: it is nearly always the name of a setting.
_SECRET = re.compile(
    r"(?!key$|.*(?:file|path|name|dir)$).*(?:key|token|secret|passw|credential)",
    re.IGNORECASE,
)
_LIBRARIES = tuple(
    {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
)
"""The folders of code that is not the application."""

_SHORTEST: Final = 4
"""The least characters of a value that is hidden."""

# pydantic shows the input, which may be all settings of the application.
_INPUT = re.compile(r"input_value=.*?(?=, input_type=)", re.DOTALL)
_BEFORE_AT = re.compile(r"(?<=://)\S*@")


class CannotImport(Exception):  # noqa: N818
    """An object cannot be imported or used. The text is one line for the user."""


def imported(
    reference: str, is_usable: Callable[[object], bool] = lambda _: False
) -> Any:
    """
    Return the object *reference*, such as `main:config`, as uvicorn imports it.

    The current folder is the first one in which Python looks. What the application
    prints goes to the standard error.

    Args:
        reference: The module, a colon, and an attribute or several with dots.
        is_usable: Whether an object could be meant if the attribute does not exist.

    Raises:
        CannotImport: There is no such object, or the import failed.
    """
    name, colon, path = reference.partition(":")
    if not (name and colon and path) or name.endswith(".py") or name.startswith("."):
        raise CannotImport(f"{reference} must be MODULE:ATTRIBUTE, such as main:config")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    with _reported(f"cannot import {name}"):
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise CannotImport(
                f"cannot import {name}: there is no module {error.name} in the current "
                f"folder ({folder}), and none is installed"
            ) from None
    module = found
    for part in path.split("."):
        with _reported(f"cannot read {reference}"):
            if not hasattr(found, part):
                others = _others(module, name, is_usable)
                raise CannotImport(f"{name} has no {path!r}{others}")
            found = getattr(found, part)
    return found


def settings_in(reference: str) -> dict[str, Any]:
    """
    Return the settings for `doctor` of the object *reference*.

    It is a `TopazConfig`, an `AuthorizerOptions` (also that of `aserto.client`), or a
    function without arguments that returns one.

    Raises:
        CannotImport: It is not, or it cannot be imported.
    """
    wanted = "a TopazConfig or an AuthorizerOptions"
    found, reference = _made(reference, _has_options, wanted)
    settings: dict[str, Any] = {"source": reference}
    if isinstance(found, TopazConfig):
        settings |= {
            "policy_root": found.policy_path_root,
            "policy_instance_name": found.policy_instance_name,
            "policy_instance_label": found.policy_instance_label,
            "streams": found.connection_pool.options.streams_per_connection,
        }
        found = found.authorizer_options
    with _reported(f"the options of {reference} cannot be used"):
        options = AuthorizerOptions.coerce(found)
    fields = (field.name for field in attrs.fields(AuthorizerOptions))
    return settings | {name: getattr(options, name) for name in fields}


def routes_in(reference: str) -> list[Listed]:
    """
    Return all routes of the application *reference*.

    It is a FastAPI or Starlette application, or a function without arguments that
    returns one.

    Raises:
        CannotImport: It is not, or it cannot be imported.
    """
    app, reference = _made(reference, _is_application, "a FastAPI application")
    with _reported(f"the routes of {reference} cannot be read"):
        return list(listed_routes(router_of(app)))


def _is_application(found: object) -> bool:
    return isinstance(router_of(found), Starlette | Router)


def _made(
    reference: str, is_usable: Callable[[object], bool], wanted: str
) -> tuple[Any, str]:
    """
    Return the object *reference*, or what it returns if it is a function.

    Raises:
        CannotImport: It is not *wanted*.
    """
    found = imported(reference, is_usable)
    name = reference.partition(":")[0]
    if not _fits(found, is_usable) and _is_factory(found):
        with _reported(f"{reference}() failed"):
            found = found()
        reference = f"{reference}()"
    if inspect.iscoroutine(found):
        found.close()  # otherwise Python warns that it was not awaited
        raise CannotImport(f"{reference} is a coroutine: pass a function without async")
    if not _fits(found, is_usable):
        raise CannotImport(
            f"{reference} is of type {type(found).__name__}: name {wanted}"
            f"{_others(sys.modules[name], name, is_usable)}"
        )
    return found, reference


def _has_options(found: object) -> bool:
    if isinstance(found, TopazConfig | AuthorizerOptions):
        return True
    # That of aserto.client. Other objects may also have a url.
    return type(found).__name__ == "AuthorizerOptions" and hasattr(found, "url")


def _is_factory(found: object) -> bool:
    """Return whether *found* can be called without arguments, and is not a class."""
    if not callable(found) or isinstance(found, type):
        return False
    try:
        inspect.signature(found).bind()
    except Exception:  # noqa: BLE001  (an object of the application)
        return False
    return True


def _fits(found: object, is_usable: Callable[[object], bool]) -> bool:
    """Return whether *found* is usable. It is not if it raises, as a proxy may."""
    try:
        return is_usable(found)
    except Exception:  # noqa: BLE001  (an object of the application)
        return False


def _others(module: object, name: str, is_usable: Callable[[object], bool]) -> str:
    """Return the objects of *module* that could be meant, for the end of an error."""
    objects = list(vars(module).items())
    usable = [key for key, each in objects if _fits(each, is_usable)]
    names = ", ".join(f"{name}:{each}" for each in usable)
    return f"; it has: {names}" if names else ""


# -- errors of the application ------------------------------------------------------


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    """
    Run code of the application.

    Raises:
        CannotImport: It raised an error. The text says *what* failed.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (CannotImport, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001  (of the application)
        raise CannotImport(f"{what}: {_one_line(error)}{_place(error)}") from None


def _place(error: BaseException) -> str:
    """Return the line of the application that failed, for the end of a message."""
    if isinstance(error, SyntaxError):
        return ""  # its text says it
    folder = Path.cwd()
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        # A virtual environment may be in the folder of the application.
        if path.is_relative_to(folder) and not frame.filename.startswith(_LIBRARIES):
            return f" ({path.relative_to(folder)}, line {frame.lineno})"
    return ""


def _one_line(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  (a class of the application)
        text = ""
    text = _BEFORE_AT.sub("***@", _INPUT.sub("input_value=***", text))
    for secret in sorted(_secrets(error), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = shortened(" ".join(text.split()), _LONGEST)
    kind = type(error).__name__
    return printable(f"{kind}: {text}" if text else kind)


def _secrets(error: BaseException) -> set[str]:
    """Return the values with the name of a secret where *error* was raised."""
    spaces: list[dict[Any, Any]] = [dict(os.environ)]
    for frame, _ in traceback.walk_tb(error.__traceback__):
        spaces += [dict(frame.f_globals), dict(frame.f_locals)]
    # One level deeper, for settings in a mapping, an object, a class or a module.
    spaces += [_attributes(each) for space in spaces for each in space.values()]
    return {
        text
        for space in spaces
        for name, value in space.items()
        if isinstance(name, str) and _SECRET.match(name)
        for text in _texts(value)
        if len(text) >= _SHORTEST
    }


def _attributes(value: Any) -> dict[Any, Any]:
    try:
        return dict(value if isinstance(value, dict) else vars(value))
    except Exception:  # noqa: BLE001  (an object of the application, or without names)
        return {}


def _texts(value: object) -> Iterator[str]:
    """Yield the forms in which an error may show a secret, or a list of secrets."""
    each: object
    for each in value if isinstance(value, list | tuple | set) else [value]:
        text = each.decode(errors="replace") if isinstance(each, bytes) else each
        if isinstance(text, str):
            yield from (text, text.strip(), repr(text)[1:-1])
