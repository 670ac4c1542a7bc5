"""Waiting for the first of several things."""

from collections.abc import Awaitable, Callable

import trio


async def first_of(*waits: Callable[[], Awaitable[object]]) -> int:
    """Wait for the first of several; return its index. Errors come in a group."""
    first: list[int] = []
    async with trio.open_nursery() as nursery:

        async def wait(index: int) -> None:
            await waits[index]()
            first.append(index)
            nursery.cancel_scope.cancel()

        for index in range(len(waits)):
            nursery.start_soon(wait, index)
    return first[0]
