"""Test that calls on a closed connection raise ConnectionLost."""

from __future__ import annotations

import asyncio

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import pytest

from fastapi_topaz import ConnectionLost, Verdict
from kit.channels import INFO, NEVER, PATIENCE, ask, connected
from kit.waiting import eventually


pytestmark = [pytest.mark.real_clock, pytest.mark.uvloop]


async def test_closing_during_a_call_is_connection_lost(authorizer, connection):
    authorizer.delay = NEVER
    caught = []

    async def caller():
        try:
            await ask(connection)
        except BaseException as error:
            caught.append(error)
            raise

    async def both():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller)
            await eventually(lambda: authorizer.streams == 1)
            await connection.close(0)

    with anyio.fail_after(PATIENCE), pytest.raises(ExceptionGroup) as group:
        await both()
    # No answer vanishes: the waiter of the task group gets the error.
    assert [type(error) for error in group.value.exceptions] == [ConnectionLost]
    assert [type(error) for error in caught] == [ConnectionLost]
    assert authorizer.url in str(caught[0])
    assert connection.judge(caught[0]) is Verdict.BROKEN
    await eventually(lambda: authorizer.cancelled == 1)


@pytest.mark.grpcio
def test_closing_bare_grpc_during_a_call_cancels_the_task_silently(authorizer):
    authorizer.delay = NEVER
    answers = []

    async def main():
        channel = grpc.aio.insecure_channel(authorizer.url)
        await channel.channel_ready()

        async def caller():
            answers.append(await channel.unary_unary(INFO)(b"", timeout=NEVER))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(caller())
            await eventually(lambda: authorizer.streams == 1)
            await channel.close()
        return "all is well"

    assert anyio.run(main, backend="asyncio") == "all is well"
    assert answers == []


async def test_each_call_in_flight_gets_connection_lost_on_close(
    authorizer, connection
):
    authorizer.delay = NEVER
    lost = []

    async def caller():
        with pytest.raises(ConnectionLost):
            await ask(connection)
        lost.append(True)

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            for _ in range(50):
                tasks.start_soon(caller)
            await eventually(lambda: authorizer.streams == 50)
            await connection.close(0)
    assert len(lost) == 50
    assert "calls=0" in repr(connection)


async def test_a_call_after_close_is_connection_lost(authorizer, connection):
    await connection.close(0)
    with anyio.fail_after(PATIENCE), pytest.raises(ConnectionLost) as caught:
        await ask(connection)
    assert connection.judge(caught.value) is Verdict.BROKEN
    assert authorizer.calls.total() == 0


async def test_a_call_begun_in_the_grace_of_close_is_connection_lost(
    authorizer, connection
):
    authorizer.delay = 0.5
    answers = []

    async def caller():
        answers.append(await ask(connection))

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller)
            await eventually(lambda: authorizer.streams == 1)
            tasks.start_soon(connection.close, 30)
            await eventually(lambda: "closed" in repr(connection))
            with pytest.raises(ConnectionLost):
                await ask(connection)
    # The earlier call got its answer.
    assert len(answers) == 1
    assert authorizer.calls == {"Info": 1}


async def test_calls_that_race_with_close_end_with_an_answer_or_connection_lost(
    authorizer,
):
    # A call begun while the last connection closes must not wait without end.
    for _ in range(30):
        async with connected(authorizer.options) as connection:
            ends = []

            async def caller(connection=connection, ends=ends):
                try:
                    while True:
                        await ask(connection)
                except ConnectionLost:
                    ends.append("lost")

            with anyio.fail_after(PATIENCE):
                async with anyio.create_task_group() as tasks:
                    for _ in range(5):
                        tasks.start_soon(caller)
                    await connection.close(0)
        assert ends == ["lost"] * 5
