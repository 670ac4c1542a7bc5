"""Knocking at UDP ports of this machine. Behind gateways that refuse: tests/lab/test_why.py."""

import socket
from collections.abc import Iterator

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.stun.messages import MessageClass, StunMessage, build_stun_message
from ztna.core.stun_server import LocalEnd, StunServer
from ztna.net.knock import HANDSHAKE_SIZE, Knocked, KnockResult, is_answer, knock, request

NUMBER = b"0123456789ab"


@pytest.fixture
def port() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        udp.setblocking(False)
        yield udp


def address(udp: socket.socket) -> tuple[str, int]:
    host, number = udp.getsockname()
    return host, number


@pytest.mark.parametrize("size", [0, HANDSHAKE_SIZE])
async def test_somebody_answers(size: int, port: socket.socket) -> None:
    server = StunServer(address(port))
    sizes = []

    async def serve() -> None:
        while True:
            await trio.lowlevel.wait_readable(port)
            data, source = port.recvfrom(2048)
            sizes.append(len(data))
            port.sendto(b"garbage", source)
            reply = server.receive_untrusted(data, source, LocalEnd(), 0.0)
            assert reply is not None
            assert len(reply.data) >= size
            port.sendto(reply.data, source)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        assert await knock(address(port), size) == Knocked(KnockResult.ANSWERS)
        nursery.cancel_scope.cancel()
    assert set(sizes) == {max(size, 28)}


async def test_a_closed_port(port: socket.socket) -> None:
    """This machine says so of itself, and not of a firewall."""
    there = address(port)
    port.close()
    got = await knock(there, 0)
    assert (got.result, got.words) == (KnockResult.CLOSED, "Connection refused")


@pytest.mark.parametrize(("size", "times"), [(0, 150), (HANDSHAKE_SIZE, 12)])
async def test_silence(
    size: int, times: int, port: socket.socket, autojump_clock: trio.testing.MockClock
) -> None:
    """Small questions are most of what 20 packets a second leave: a machine says only once a
    second that a port is closed, to whichever packet comes first."""
    assert await knock(address(port), size) == Knocked(KnockResult.SILENT)
    assert autojump_clock.current_time() == pytest.approx(3.0)
    questions = {port.recv(2048) for _ in range(times)}
    assert len(questions) == 1
    with pytest.raises(BlockingIOError):
        port.recv(2048)


async def test_an_address_that_leads_nowhere() -> None:
    """RFC 5737's addresses may have a route; the class E ones never have (RFC 1112)."""
    got = await knock(("255.255.255.255", 9), 0)
    assert got.result in {KnockResult.NO_WAY, KnockResult.FORBIDDEN}


@given(st.binary(max_size=64))
def test_garbage_is_no_answer(data: bytes) -> None:
    assert not is_answer(data, NUMBER)


@given(st.integers(0, 1400))
def test_questions_have_the_size_that_was_asked_for(size: int) -> None:
    question = request(NUMBER, size)
    assert size <= len(question) <= max(size + 3, 32)
    assert not is_answer(question, NUMBER)
    answer = build_stun_message(StunMessage(MessageClass.SUCCESS, NUMBER))
    assert is_answer(answer, NUMBER)
    assert not is_answer(answer, NUMBER[::-1])
