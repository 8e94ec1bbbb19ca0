"""The order of replies and of steps in a stream of requests, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from actserve.server.protocols.grpc.infer_stream import WINDOW, InferStream

Act = Callable[[int], Awaitable[int]]


async def converse(numbers: list[int], act: Act, sequence: Callable[[int], Any]) -> list[int]:
    sent: list[int] = []

    async def received() -> AsyncIterator[int]:
        for number in numbers:
            yield number

    async def send(reply: int) -> None:
        sent.append(reply)

    assert await InferStream(act, sequence, send).run(received(), asyncio.Event())
    return sent


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 4), st.randoms(use_true_random=False))
def test_replies_come_in_order_and_sequences_act_in_order(numbers: list[int], sequences: int, random: Any) -> None:
    acted: list[int] = []
    in_flight = 0

    async def act(number: int) -> int:
        nonlocal in_flight
        in_flight += 1
        assert in_flight <= WINDOW
        for _ in range(random.randrange(5)):
            await asyncio.sleep(0)
        acted.append(number)
        in_flight -= 1
        return number

    def sequence(number: int) -> int | None:
        return number % sequences or None

    numbers = [index * 10 + number for index, number in enumerate(numbers)]
    assert asyncio.run(converse(numbers, act, sequence)) == numbers
    for id_ in range(1, sequences):
        assert [n for n in acted if sequence(n) == id_] == [n for n in numbers if sequence(n) == id_]


def test_requests_of_no_sequence_act_at_once() -> None:
    async def main() -> None:
        together = asyncio.Barrier(4)

        async def act(number: int) -> int:
            async with asyncio.timeout(10):
                await together.wait()
            return number

        assert await converse([1, 2, 3, 4], act, lambda _: None) == [1, 2, 3, 4]

    asyncio.run(main())
