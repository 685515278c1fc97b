"""Questions, and an authorizer without a network, for tests of the decision layers."""

from __future__ import annotations

import base64
import json

import anyio
import attrs
import grpc
from starlette.requests import Request

from fastapi_topaz import Decision, Identity, IdentityType
from fastapi_topaz._authorizer.messages import is_request
from fastapi_topaz._decisions.openings import Opening
from fastapi_topaz._decisions.question import Question
from fastapi_topaz._pool.budget import Budget
from fastapi_topaz._rpc.statuses import EndedCall, Ending


def jwt(**claims):
    """Return an unsigned token with these claims."""
    parts = [{"alg": "none"}, claims]
    data = [json.dumps(part).encode() for part in parts]
    return (
        ".".join(base64.urlsafe_b64encode(d).decode().rstrip("=") for d in data) + "."
    )


def http_request(kind="http"):
    return Request({"type": kind, "headers": [], "path_params": {}})


@attrs.frozen
class Subject:
    """What a question is about, from which questions are made."""

    path: str = "app.GET.documents"
    user: str = "alice"
    resource: dict = attrs.field(factory=dict, hash=False)
    token: str | None = None
    metadata: tuple = ()
    decision: str = "allowed"

    @property
    def identity(self):
        if self.token is not None:
            return Identity(IdentityType.JWT, self.token)
        return Identity(IdentityType.SUB, self.user)

    def question(self, *, http=None, max_age=None, seconds=5.0, metadata=()):
        return Question(
            self.path,
            self.decision,
            is_request(
                *(self.path, (self.decision,), self.identity, self.resource),
                *(None, None),
            ),
            Budget(seconds),
            self.metadata or metadata,
            token=self.token,
            http=http,
            resource=self.resource,
            max_age=max_age,
        )


class OpenHere:
    """Replaces `Openings`: the pool is open, and may be opened again."""

    def __init__(self):
        self.opening = Opening()

    def current(self):
        return self.opening

    def reopen(self):
        self.opening = Opening()


@attrs.define(eq=False)
class Call:
    """One call of the authorizer; it ends with `answer` or `fail`."""

    question: Question
    asked_at: float
    number: int
    answered: anyio.Event = attrs.Factory(anyio.Event)
    decision: Decision | None = None
    error: Exception | None = None

    def answer(self, allowed):
        self.decision = Decision(allowed=allowed)
        self.answered.set()

    def fail(self, error):
        self.error = error
        self.answered.set()


class HeldAuthorizer:
    """An `Ask` whose calls wait until the test ends them."""

    def __init__(self, clock=anyio.current_time):
        self.clock = clock
        self.calls = []
        self.open = []

    async def __call__(self, question, /):
        call = Call(question, self.clock(), len(self.calls))
        question.budget.sent = question.budget.left()
        self.calls.append(call)
        self.open.append(call)
        try:
            with anyio.move_on_after(question.budget.left()):
                await call.answered.wait()
        finally:
            self.open.remove(call)
        if not call.answered.is_set():
            raise EndedCall(
                Ending.TIMED_OUT, grpc.StatusCode.DEADLINE_EXCEEDED, "the time is over"
            )
        if call.decision is not None:
            return call.decision
        error, call.error = call.error, None
        try:
            raise error
        finally:
            del error  # its traceback leads to this frame
