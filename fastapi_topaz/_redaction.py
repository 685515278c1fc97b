"""
Removes secrets from the frames of errors that leave the package.

Error trackers and `pytest -l` show the local variables of every frame of a traceback.
In this package they hold identities, resource contexts and keys. Each public function
that handles these is a `boundary`: if an error leaves it, the local variables of this
package's frames are deleted. Types, messages and line numbers stay.
"""

from __future__ import annotations

import functools
import gc
import inspect
import sys
import types
from typing import TYPE_CHECKING, Any, TypeVar, cast


if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["boundary", "clear_frames", "guarded"]


F = TypeVar("F", bound="Callable[..., Any]")
T = TypeVar("T")

PACKAGE = __name__.partition(".")[0]

LIBRARIES = sys.stdlib_module_names | {
    *("aserto", "anyio", "attr", "fastapi", "google", "grpc", "opentelemetry"),
    *("outcome", "sniffio", "starlette", "trio"),
}
"""Their frames belong to the code that called them: this package or an application."""

_GENERATORS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def boundary(function: F) -> F:
    """
    Return *function*, whose errors show no local variable of this package.

    For functions and coroutine functions. The frame of the wrapper itself still runs
    when the error leaves it, so it deletes its own variables.
    """
    clear = clear_frames  # a variable of the closure: see below

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            del args, kwargs
            clear(error)
            raise

    async def call_async(*args: Any, **kwargs: Any) -> Any:
        try:
            return await function(*args, **kwargs)
        except BaseException as error:
            del args, kwargs
            clear(error)
            raise

    wrapper = call_async if inspect.iscoroutinefunction(function) else call
    # FastAPI evaluates the annotations of a dependency in the globals of its function.
    wrapper = types.FunctionType(
        wrapper.__code__, function.__globals__, closure=wrapper.__closure__
    )
    return cast("F", functools.wraps(function)(wrapper))


def guarded(cls: type[T]) -> type[T]:
    """Return the class *cls*, whose constructor is a `boundary`."""
    cls.__init__ = boundary(cls.__init__)  # type: ignore[method-assign]
    return cls


def clear_frames(error: BaseException) -> None:
    """
    Delete the local variables of this package in all tracebacks that *error* leads to.

    These are its own and those of its causes, contexts and members. Frames of the
    application keep their variables, and frames that still run are left alone.
    """
    found, seen = [error], set()
    while found:
        each = found.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        raised_here = _clear(each)
        if raised_here and each.__suppress_context__ and each.__cause__ is None:
            # `raise ... from None` hides an error that may hold the value itself, as
            # UnicodeEncodeError.object and AttributeError.obj do.
            each.__context__ = None
        if isinstance(each, BaseExceptionGroup):
            found.extend(each.exceptions)
        found.extend(
            linked
            for linked in (each.__cause__, each.__context__)
            if linked is not None
        )


def _clear(error: BaseException) -> bool:
    """Clear the frames of this package; say whether the innermost one is such."""
    ours = False
    before, traceback = None, error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        module = _top_module(frame)
        if module not in LIBRARIES:
            ours = module == PACKAGE
        if ours and _is_suspended(frame):
            # It needs its variables, so the error must not lead to it.
            if before is None:
                error.__traceback__ = traceback.tb_next
            else:
                before.tb_next = traceback.tb_next
        else:
            if ours:
                try:  # noqa: SIM105  (in an outage this runs for each request)
                    frame.clear()
                except RuntimeError:
                    pass  # it still runs
            before = traceback
        traceback = traceback.tb_next
    return ours


def _top_module(frame: types.FrameType) -> str:
    name = frame.f_globals.get("__name__")
    if isinstance(name, str):
        return name.partition(".")[0]
    # A method that attrs wrote: older versions run it in globals without a name.
    generated = frame.f_code.co_filename.startswith("<attrs generated ")
    return PACKAGE if generated and f" {PACKAGE}." in frame.f_code.co_filename else ""


def _is_suspended(frame: types.FrameType) -> bool:
    """
    Say whether *frame* is of a coroutine or generator that goes on later.

    It is if the coroutine caught this error and then waits for something else.
    Before Python 3.13 clear() would close that coroutine instead of refusing.
    """
    if not frame.f_code.co_flags & _GENERATORS or frame.f_back is not None:
        return False
    # The garbage collector sees the contents of a frame once its coroutine has ended.
    return all(each is not frame.f_code for each in gc.get_referents(frame))
