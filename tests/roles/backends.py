"""Applications behind a connector in memory."""

from collections.abc import Awaitable, Callable

import trio

Serve = Callable[[trio.abc.HalfCloseableStream], Awaitable[None]]


def echo_until(ended: trio.Event) -> Serve:
    """Sends back what comes, and tells when its connection is over, however that ends."""

    async def serve(stream: trio.abc.HalfCloseableStream) -> None:
        try:
            while data := await stream.receive_some():
                await stream.send_all(data)
        finally:
            ended.set()

    return serve
