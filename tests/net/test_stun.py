"""STUN on the QUIC port and its alternates: in memory beside a session, and on loopback."""

import socket
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import structlog
import trio
from trio.testing import MockClock

from tests.net.endpoints import SERVER_ADDRESS, open_pair, receive_count
from tests.ports import free_port
from ztna.core.limits import SourceLimiter
from ztna.core.ports import Address, UdpBatch
from ztna.core.stun.attributes import ChangeRequest, OtherAddress, ResponseOrigin, XorMappedAddress
from ztna.core.stun.messages import (
    MessageClass,
    StunMessage,
    build_stun_message,
    parse_stun_untrusted,
)
from ztna.core.stun.values import AnyAttribute
from ztna.core.stun_server import LocalEnd, StunServer
from ztna.nat.link import MemoryUdpPort
from ztna.net.stun import StunAddresses, StunResponder, open_stun_responder
from ztna.net.udp import open_udp_port

LOOP, LOOP_2, LOOP_3 = "127.0.0.1", "127.0.0.2", "127.0.0.3"


def request(*attributes: AnyAttribute, number: int = 1) -> bytes:
    message = StunMessage(MessageClass.REQUEST, bytes([number]) * 12, attributes)
    return build_stun_message(message)


async def ask(
    port: MemoryUdpPort, data: bytes, to: Address = SERVER_ADDRESS
) -> tuple[StunMessage, Address]:
    await port.send([UdpBatch(data, len(data), to)])
    with trio.fail_after(1):
        (batch,) = await port.receive()
    return parse_stun_untrusted(batch.data), batch.address


async def test_beside_quic_on_one_port(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        server = StunServer(SERVER_ADDRESS, limiter=SourceLimiter(rate=0.01, burst=4))
        responder = StunResponder(server, pair.server.port)
        pair.server.stun = responder.answer
        client, session = await pair.connected()
        port = pair.network.host("10.6.6.6").open_udp_port()
        answer, source = await ask(port, request())
        assert source == SERVER_ADDRESS
        mapped = answer.find(XorMappedAddress)
        assert mapped is not None
        assert mapped.address == port.local_address
        # Several in one buffer, as a kernel with GRO joins them, are answered one by one.
        await port.send([UdpBatch(request() + request(number=2), len(request()), SERVER_ADDRESS)])
        ids: set[bytes] = set()
        while len(ids) < 2:
            for batch in await port.receive():
                ids |= {
                    bytes(batch.data[start + 8 : start + 20])
                    for start in range(0, len(batch.data), batch.segment_size)
                }
        assert ids == {b"\1" * 12, b"\2" * 12}
        await port.send([UdpBatch(b"\0junk", 5, SERVER_ADDRESS)])
        await port.send([UdpBatch(request(), len(request()), SERVER_ADDRESS)])
        with trio.move_on_after(1):
            raise AssertionError(f"an answer over the limit: {await port.receive()}")
        assert responder.statistics() == {
            "answered": 3,
            "malformed": 1,
            "limited": 1,
            "not_stun": 0,
            "send_full": 0,
            "ports": 1,
        }
        counters = pair.server.statistics()
        assert (counters["stun_received"], counters["drop_stun"]) == (5, 0)
        client.send_datagrams([b"still here"])
        assert await receive_count(session, 1) == [b"still here"]


async def test_without_a_server_stun_is_dropped(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        port = pair.network.host("10.6.6.6").open_udp_port()
        await port.send([UdpBatch(request(), len(request()), SERVER_ADDRESS)])
        with trio.move_on_after(1):
            raise AssertionError(f"an answer from nobody: {await port.receive()}")
        assert pair.server.statistics()["drop_stun"] == 1


async def test_alternate_port(autojump_clock: MockClock) -> None:
    async with open_pair() as pair, pair.server_host.open_udp_port(3479) as other:
        responder = StunResponder(
            StunServer(SERVER_ADDRESS, alternate_port=3479),
            pair.server.port,
            {LocalEnd(alternate_port=True): other},
        )
        pair.server.stun = responder.answer
        pair.nursery.start_soon(responder.run)
        port = pair.network.host("10.6.6.6").open_udp_port()
        other_address = (SERVER_ADDRESS[0], 3479)
        change = request(ChangeRequest(change_ip=False, change_port=True))
        for to, origin in ((SERVER_ADDRESS, other_address), (other_address, SERVER_ADDRESS)):
            assert (await ask(port, change, to))[1] == origin
            assert (await ask(port, request(), to))[1] == to
        await port.send([UdpBatch(b"\x80relay\x40", 6, other_address)])
        await trio.sleep(1)
        assert responder.statistics()["not_stun"] == 2
        assert responder.statistics()["answered"] == 4
        pair.nursery.cancel_scope.cancel()


async def serve(responder: StunResponder) -> None:
    """What an endpoint does for the primary port."""
    while True:
        for batch in await responder.primary.receive():
            await responder.primary.send(
                responder.answer(batch.data, batch.address, trio.current_time())
            )


@asynccontextmanager
async def serving(host: str, addresses: StunAddresses) -> AsyncGenerator[StunResponder, None]:
    async with (
        open_udp_port(host, 0, server=True) as primary,
        open_stun_responder(primary, addresses) as responder,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(serve, responder)
        nursery.start_soon(responder.run)
        yield responder
        nursery.cancel_scope.cancel()


async def exchange(data: bytes, to: Address) -> tuple[StunMessage, Address]:
    family, own = (socket.AF_INET6, "::1") if ":" in to[0] else (socket.AF_INET, LOOP_3)
    with trio.socket.socket(family, socket.SOCK_DGRAM) as sock, trio.fail_after(30):
        await sock.bind((own, 0))
        await sock.sendto(data, to)
        answer, source = await sock.recvfrom(2048)
        return parse_stun_untrusted(answer), source[:2]


@pytest.mark.parametrize("host", ["0.0.0.0", LOOP])
async def test_all_four_ends(host: str) -> None:
    other_port = free_port()
    addresses = StunAddresses(LOOP, other_port, LOOP_2)
    async with serving(host, addresses) as responder:
        port = responder.primary.local_address[1]
        ends = {(ip, number) for ip in (LOOP, LOOP_2) for number in (port, other_port)}
        assert set(responder.server.ends().values()) == ends
        for end in ends:
            for change_ip in (False, True):
                for change_port in (False, True):
                    change = ChangeRequest(change_ip, change_port)
                    answer, source = await exchange(request(change), end)
                    opposite = LOOP if end[0] == LOOP_2 else LOOP_2
                    other_number = port if end[1] == other_port else other_port
                    expected = (
                        opposite if change_ip else end[0],
                        other_number if change_port else end[1],
                    )
                    assert source == expected
                    assert answer.find(ResponseOrigin) == ResponseOrigin(expected)
                    assert answer.find(OtherAddress) == OtherAddress((opposite, other_number))
        assert responder.statistics()["answered"] == 16
        # The door that let our own sockets in is closed again.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            for end in ((LOOP_3, port), (LOOP_2, port), (LOOP_2, other_port)):
                if host != "0.0.0.0" and end[0] == LOOP_3:
                    continue
                with pytest.raises(OSError, match="in use"):
                    thief.bind(end)


async def test_on_all_addresses_the_changed_port_answers_from_the_one_asked() -> None:
    other_port = free_port()
    async with serving("0.0.0.0", StunAddresses(alternate_port=other_port)) as responder:
        port = responder.primary.local_address[1]
        change = ChangeRequest(change_ip=False, change_port=True)
        for host in (LOOP, LOOP_2):
            answer, source = await exchange(request(change), (host, port))
            assert source == (host, other_port)
            assert answer.find(OtherAddress) is None


@pytest.mark.parametrize(
    ("addresses", "ports"),
    [
        (StunAddresses(), 1),
        (StunAddresses(LOOP, -1, LOOP_2), 2),  # the port is taken: the address alone
        (StunAddresses(LOOP, -1), 1),
        (StunAddresses(LOOP, 0, "203.0.113.1"), 2),  # no address of this machine
        (StunAddresses(LOOP, None, LOOP_2), 2),
    ],
)
async def test_what_cannot_be_had_is_done_without(addresses: StunAddresses, ports: int) -> None:
    async with AsyncExitStack() as stack:
        number = addresses.alternate_port
        if number == -1:
            taken = await stack.enter_async_context(open_udp_port(LOOP, 0))
            number = taken.local_address[1]
        elif number == 0:
            number = free_port()
        wanted = StunAddresses(addresses.ip, number, addresses.alternate_ip)
        with structlog.testing.capture_logs() as logs:
            responder = await stack.enter_async_context(serving(LOOP, wanted))
        assert responder.statistics()["ports"] == ports
        assert len(responder.server.ends()) == ports
        reasons = [log["reason"] for log in logs if log["event"] == "NAT tests will tell less"]
        assert len(reasons) == (addresses.alternate_port in {-1, 0})
        assert all(reason.startswith("cannot listen on UDP port") for reason in reasons)
        _, source = await exchange(request(), responder.primary.local_address)
        assert source == responder.primary.local_address


async def test_seen_as_the_address_that_the_operator_names() -> None:
    addresses = StunAddresses("198.51.100.7", free_port(), LOOP_2, "198.51.100.8")
    async with serving(LOOP, addresses) as responder:
        answer, _ = await exchange(request(), responder.primary.local_address)
        origin = answer.find(ResponseOrigin)
        other = answer.find(OtherAddress)
        assert origin is not None
        assert other is not None
        assert (origin.address[0], other.address[0]) == ("198.51.100.7", "198.51.100.8")


async def test_on_all_addresses_of_both_ip_versions() -> None:
    """Answers leave from the address asked, of either; also by the changed port."""
    async with (
        open_udp_port("::", 0, dual=True, server=True) as port,
        open_stun_responder(port, StunAddresses(alternate_port=free_port())) as responder,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(responder.run)
        nursery.start_soon(serve, responder)
        change = ChangeRequest(change_ip=False, change_port=True)
        number, other = port.local_address[1], responder.server.alternate_port
        for host in (LOOP, LOOP_2, "::1"):
            answer, source = await exchange(request(), (host, number))
            assert source == (host, number)
            mapped = answer.find(XorMappedAddress)
            assert mapped is not None
            assert (":" in mapped.address[0]) == (":" in host)
            _, source = await exchange(request(change), (host, number))
            assert source == (host, other)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
async def test_an_address_is_found_for_a_port_on_all_of_them(host: str) -> None:
    async with (
        open_udp_port(host, 0, server=True) as port,
        open_stun_responder(port, StunAddresses()) as responder,
    ):
        seen = responder.server.primary[0]
        assert (":" in seen) == (host == "::")
        assert seen not in {"0.0.0.0", "::"}
