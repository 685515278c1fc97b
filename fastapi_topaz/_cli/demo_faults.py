"""
The second part of the demo: requests at a steady rate while the authorizer misbehaves.

    httpx --HTTP--> FastAPI --gRPC--> an authorizer that restarts, freezes, is too slow
"""

from __future__ import annotations

import asyncio
import itertools
import math
from typing import TYPE_CHECKING, Final

import anyio
import anyio.to_thread
import attrs
import httpx

from fastapi_topaz._cli.demo import PATIENCE, SHOTS, http_client


if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi_topaz._cli.demo import Shot
    from fastapi_topaz.testing import Check, EmbeddedAuthorizer, Policies
    from fastapi_topaz.testing._policies import Policy


__all__ = ["BUCKET", "CHECK_TIMEOUT", "Answer", "Ride", "Scene", "ride", "scenes"]


CHECK_TIMEOUT: Final = 1.0
"""Seconds that a check may take in this part."""

CALM: Final = 0.5
"""Seconds without a fault at the begin of each scene, and at its end."""

BUCKET: Final = 0.25
"""Seconds of one column of the timeline."""

_COST: Final = 0.04
_SLOTS: Final = 4
"""An overloaded authorizer takes `_COST` seconds for a check, `_SLOTS` at once."""


@attrs.frozen
class Scene:
    """
    One fault.

    Args:
        name: Its name in the table.
        story: What happens to the authorizer.
        rate: Requests per second.
        lasts: Seconds of the fault.
        begin: Begins the fault. It runs in a thread.
        end: Ends the fault. It runs in a thread.
    """

    name: str
    story: str
    rate: float
    lasts: float
    begin: Callable[[EmbeddedAuthorizer], object]
    end: Callable[[EmbeddedAuthorizer], object]


def _overload(authorizer: EmbeddedAuthorizer) -> None:
    policies = authorizer.policies
    assert not callable(policies)  # noqa: S101
    # Made here and not before, because it belongs to the loop of the running server.
    slots = asyncio.Semaphore(_SLOTS)
    authorizer.policies = {
        path: _slowed(policy, slots) for path, policy in policies.items()
    }


def _slowed(policy: Policy, slots: asyncio.Semaphore) -> Policy:
    async def slow(check: Check) -> bool:
        async with slots:
            await asyncio.sleep(_COST)
        assert callable(policy)  # noqa: S101
        return policy(check) is True

    return slow


def scenes(policies: Policies) -> tuple[Scene, ...]:
    """Return all scenes. *policies* are those of the authorizer without a fault."""

    def relieve(authorizer: EmbeddedAuthorizer) -> None:
        authorizer.policies = policies

    return (
        Scene(
            "restart",
            "The authorizer stops, and starts again after 1 s",
            *(60.0, 1.0),
            lambda authorizer: authorizer.stop(),
            lambda authorizer: authorizer.start(),
        ),
        Scene(
            "freeze",
            "The authorizer freezes for 1.5 s: its sockets stay open",
            *(60.0, 1.5),
            lambda authorizer: authorizer.freeze(),
            lambda authorizer: authorizer.thaw(),
        ),
        Scene(
            "overload",
            "The authorizer answers 100 checks a second, and 200 come for 2 s",
            *(200.0, 2.0),
            _overload,
            relieve,
        ),
    )


@attrs.frozen
class Answer:
    """One request: when it was due, its time in seconds, and what came back."""

    due: float
    took: float
    status: int | None
    is_right: bool

    @property
    def is_good(self) -> bool:
        """Whether it was answered, and as the policies decide."""
        return self.is_right and self.status != 503


@attrs.define
class Ride:
    """What happened in one scene. Times are seconds since its begin."""

    scene: Scene
    answers: list[Answer] = attrs.Factory(list)
    healed_at: float = math.nan

    @property
    def good(self) -> int:
        """The requests that were answered as the policies decide."""
        return sum(each.is_good for each in self.answers)

    @property
    def refused(self) -> int:
        """The requests that were answered 503."""
        return sum(each.status == 503 for each in self.answers)

    @property
    def wrong(self) -> int:
        """The requests with any other answer, or with none. There should be none."""
        return sum(not each.is_right for each in self.answers)

    @property
    def slowest(self) -> float:
        """The longest time of a request."""
        return max((each.took for each in self.answers), default=math.nan)

    @property
    def recovered_after(self) -> float:
        """Seconds from the end of the fault to the first good answer after it."""
        ends = [each.due + each.took for each in self.answers if each.is_good]
        later = [each for each in ends if each >= self.healed_at]
        return min(later) - self.healed_at if later else math.nan

    def columns(self) -> list[tuple[int, int]]:
        """Return the good and the other answers that arrived in each `BUCKET`."""
        ends = [(int((each.due + each.took) / BUCKET), each) for each in self.answers]
        counts = [[0, 0] for _ in range(max((end for end, _ in ends), default=-1) + 1)]
        for end, each in ends:
            counts[end][not each.is_good] += 1
        return [(good, other) for good, other in counts]


async def ride(url: str, scene: Scene, authorizer: EmbeddedAuthorizer) -> Ride:
    """
    Send requests at the rate of *scene*, and let its fault begin and end meanwhile.

    After the fault, this sends until there was a good answer, at most `PATIENCE`.
    """
    result = Ride(scene)
    begin = anyio.current_time()
    shots = itertools.cycle(SHOTS)

    def since() -> float:
        return anyio.current_time() - begin

    async with http_client(url) as requests:

        async def fire(shot: Shot, due: float) -> None:
            status = await _status(requests, shot)
            is_right = status in {200 if shot.allowed else 403, 503}
            result.answers.append(Answer(due, since() - due, status, is_right))

        async def fault() -> None:
            await anyio.sleep(CALM)
            await _in_thread(scene.begin, authorizer)
            try:
                await anyio.sleep(scene.lasts)
            finally:
                with anyio.CancelScope(shield=True):
                    await _in_thread(scene.end, authorizer)
            result.healed_at = since()

        def goes_on() -> bool:
            if math.isnan(result.healed_at) or since() < result.healed_at + CALM:
                return True
            is_late = since() > result.healed_at + PATIENCE
            return math.isnan(result.recovered_after) and not is_late

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fault)
            for number in itertools.count():
                due = number / scene.rate
                await anyio.sleep_until(begin + due)
                if not goes_on():
                    break
                tasks.start_soon(fire, next(shots), due)
    return result


async def _status(requests: httpx.AsyncClient, shot: Shot) -> int | None:
    headers = {"x-user": shot.user} if shot.user else {}
    try:
        response = await requests.request(shot.method, shot.path, headers=headers)
    except httpx.HTTPError:
        return None
    return response.status_code


async def _in_thread(
    act: Callable[[EmbeddedAuthorizer], object], authorizer: EmbeddedAuthorizer
) -> None:
    await anyio.to_thread.run_sync(act, authorizer)
