"""Looking up the intermediate's name."""

import socket
from typing import Any

import pytest
import structlog.testing
import trio
from trio.testing import MockClock

from ztna.errors import UnresolvedError
from ztna.roles.resolve import resolve


class SlowNames(trio.abc.HostnameResolver):
    """DNS that takes its time, and then knows nothing."""

    async def getaddrinfo(self, *_: Any, **__: Any) -> Any:
        await trio.sleep(12)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    async def getnameinfo(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


async def test_a_slow_name_is_told_once(autojump_clock: MockClock) -> None:
    trio.socket.set_custom_hostname_resolver(SlowNames())
    with structlog.testing.capture_logs() as logs:
        with trio.move_on_after(2.1):
            await resolve("relay.example.net", 4433)
        assert [entry["host"] for entry in logs] == ["relay.example.net"]
        with pytest.raises(UnresolvedError, match=r"does not resolve \(Temporary failure"):
            await resolve("relay.example.net", 4433)
    assert len(logs) == 1


async def test_a_quick_name_is_not(autojump_clock: MockClock) -> None:
    with structlog.testing.capture_logs() as logs:
        assert await resolve("192.0.2.7", 4433) == ("192.0.2.7", 4433)
        await trio.sleep(5)
    assert logs == []
