"""Real sockets on loopback: batches, offloads, refusals, closing."""

import errno
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

import pytest
import structlog
import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.descriptors import no_descriptors
from ztna.core.ports import Address, UdpBatch
from ztna.errors import SystemSetupError, UnreachableError
from ztna.net import udp
from ztna.net.batches import MAX_SEGMENTS, MAX_SEND_SIZE, join_batches, split_batch
from ztna.net.keyed_ids import OUR_IDS, IdKeys
from ztna.net.udp import (
    SocketUdpPort,
    open_client_port,
    open_udp_port,
)
from ztna.net.udp_socket import source_address

FROM = ("192.0.2.1", 4433)


async def collect(port: SocketUdpPort, size: int) -> list[UdpBatch]:
    """Batches with so many bytes together."""
    batches: list[UdpBatch] = []
    with trio.fail_after(5):
        while sum(len(batch.data) for batch in batches) < size:
            batches += await port.receive()
    return batches


def data_of(batches: Sequence[UdpBatch]) -> bytes:
    return b"".join(bytes(batch.data) for batch in batches)


@given(st.integers(1, 200_000), st.integers(1, 65_507))
def test_split_batch(size: int, segment: int) -> None:
    pieces = list(split_batch(UdpBatch(bytes(size), segment, FROM)))
    assert sum(map(len, pieces)) == size
    assert all(len(piece) <= MAX_SEND_SIZE for piece in pieces)
    assert all(-(-len(piece) // segment) <= MAX_SEGMENTS for piece in pieces)
    assert all(len(piece) % segment == 0 for piece in pieces[:-1])


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 2))))
def test_join_batches_keeps_every_datagram(shapes: list[tuple[int, int, int]]) -> None:
    batches = [
        UdpBatch(os.urandom(size), min(size, segment), ("192.0.2.1", port))
        for size, segment, port in shapes
    ]

    def datagrams(some: Sequence[UdpBatch]) -> list[tuple[bytes, Address]]:
        return [
            (bytes(batch.data[i : i + batch.segment_size]), batch.address)
            for batch in some
            for i in range(0, len(batch.data), batch.segment_size)
        ]

    joined = join_batches(batches)
    assert datagrams(joined) == datagrams(batches)
    assert len(joined) <= len(batches)


def test_join_batches_of_singles() -> None:
    singles = [UdpBatch(b"x" * 1200, 1200, FROM)] * 100 + [UdpBatch(b"y" * 10, 10, FROM)]
    sizes = [(len(batch.data), batch.segment_size) for batch in join_batches(singles)]
    assert sizes == [(54 * 1200, 1200), (46 * 1200 + 10, 1200)]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("gso", [True, False])
@pytest.mark.parametrize("gro", [True, False])
async def test_batches_cross_loopback(host: str, gso: bool, gro: bool) -> None:
    async with open_udp_port(host, 0) as one, open_udp_port(host, 0) as two:
        if (gso and not one.gso) or (gro and not two.gro):
            pytest.skip("this kernel has no UDP GSO or GRO")
        one.gso = gso
        if not gro:
            two._socket.setsockopt(socket.IPPROTO_UDP, 104, 0)
        sent = os.urandom(44 * 1200 + 500)
        await one.send([UdpBatch(sent, 1200, two.local_address)])
        batches = await collect(two, len(sent))
        assert data_of(batches) == sent
        assert {batch.segment_size for batch in batches} == {1200}
        assert {batch.address for batch in batches} == {one.local_address}
        counters, theirs = one.statistics(), two.statistics()
        assert counters["sent_packets"] == theirs["received_packets"] == 45
        assert counters["sent_bytes"] == theirs["received_bytes"] == len(sent)
        assert counters["send_calls"] == (1 if gso else 45)
        if gso and gro:
            assert theirs["receive_calls"] == 1
        elif not gro:
            assert theirs["receive_calls"] == 45
            assert len(batches) <= 4  # joined here, up to 16 a time


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("ids", [None, OUR_IDS], ids=["one socket", "sorted"])
async def test_dual_stack_port(host: str, ids: IdKeys | None) -> None:
    """Of both IP versions, with the offloads of both, and no mapped address in sight."""
    async with open_client_port(0, sorted_by=ids) as port, open_udp_port(host, 0) as other:
        number = port.local_address[1]
        assert port.local_addresses == (("0.0.0.0", number), ("::", number))
        sent = b"".join(b"\x40" + bytes([i]) * 1199 for i in range(20))
        await other.send([UdpBatch(sent, 1200, (host, number))])
        batches = await collect(port, len(sent))
        assert data_of(batches) == sent
        assert {batch.address for batch in batches} == {other.local_address}
        await port.send([UdpBatch(sent, 1200, other.local_address)])
        answers = await collect(other, len(sent))
        assert data_of(answers) == sent
        assert {batch.address for batch in answers} == {(host, number)}
        counters = port.statistics()
        assert counters["sent_packets"] == counters["received_packets"] == 20
        if port.gso:
            assert counters["send_calls"] == 1
        for option in ((socket.IPPROTO_IP, 10), (socket.IPPROTO_IPV6, 23)):
            assert port._socket.getsockopt(*option) == 3  # DF, whichever it is


async def test_dual_stack_port_of_a_taken_number() -> None:
    """Of either IP version."""
    for host in ("127.0.0.1", "::1"):
        async with open_udp_port(host, 0) as other:
            with pytest.raises(SystemSetupError, match="another program uses it"):
                async with open_client_port(other.local_address[1]):
                    raise AssertionError


async def test_dual_stack_port_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udp, "has_ipv6", lambda: False)
    async with open_client_port(0) as port:
        assert [host for host, _ in port.local_addresses] == ["0.0.0.0"]


async def test_large_batch_is_cut_for_the_kernel() -> None:
    async with open_udp_port("127.0.0.1", 0) as one, open_udp_port("127.0.0.1", 0) as two:
        sent = os.urandom(150 * 1200)
        await one.send([UdpBatch(memoryview(sent), 1200, two.local_address)])
        assert data_of(await collect(two, len(sent))) == sent


async def test_both_sides_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_udp_port("127.0.0.1", 0) as one, open_udp_port("127.0.0.1", 0) as two:
        block = UdpBatch(os.urandom(48 * 1200), 1200, two.local_address)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect, two, 40 * len(block.data))
            for _ in range(40):
                await one.send([block])
        assert two.statistics()["received_packets"] == 40 * 48


class RefusingSocket(socket.socket):
    """A socket whose sends fail as `refuse` says."""

    calls: list[tuple[int, bool]]
    errors: list[int]
    gso_error: int

    def refuse(self, *errors: int, gso_error: int = 0) -> None:
        self.calls, self.errors, self.gso_error = [], list(errors), gso_error

    def sendmsg(self, buffers: Any, control: Any = (), *_rest: Any) -> int:
        size = sum(map(len, buffers))
        self.calls.append((size, bool(control)))
        if control and self.gso_error:
            raise OSError(self.gso_error, "no")
        if self.errors and (error := self.errors.pop(0)):
            raise OSError(error, "no")
        return size


def refusing_port(*errors: int, gso_error: int = 0) -> tuple[SocketUdpPort, RefusingSocket]:
    sock = RefusingSocket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.refuse(*errors, gso_error=gso_error)
    return SocketUdpPort(sock, ("127.0.0.1", 1), gro=False, gso=True), sock


@pytest.mark.parametrize("error", [errno.EIO, errno.EINVAL])
async def test_kernel_that_refuses_gso_is_remembered(error: int) -> None:
    port, sock = refusing_port(gso_error=error)
    with structlog.testing.capture_logs() as logs:
        await port.send([UdpBatch(b"x" * 250, 100, FROM)])
        await port.send([UdpBatch(b"x" * 250, 100, FROM)])
    port.close()
    singles = [(100, False), (100, False), (50, False)]
    assert sock.calls == [(250, True), *singles, *singles]
    assert port.statistics()["sent_packets"] == 6
    assert port.statistics()["gso"] == 0
    assert [line["event"] for line in logs] == ["udp_gso_refused"]


async def test_address_that_refuses_everything_does_not_turn_gso_off() -> None:
    port, _sock = refusing_port(errno.EINVAL, errno.EINVAL, errno.EINVAL, gso_error=errno.EINVAL)
    await port.send([UdpBatch(b"x" * 250, 100, FROM)])
    port.close()
    assert port.statistics()["gso"] == 1
    assert port.statistics()["send_invalid"] == 3


@pytest.mark.parametrize(
    ("error", "counter"),
    [
        (errno.EMSGSIZE, "send_too_large"),
        (errno.ECONNREFUSED, "send_refused"),
        (errno.EPERM, "send_forbidden"),
        (errno.ENETUNREACH, "send_unreachable"),
        (errno.EHOSTUNREACH, "send_unreachable"),
        (errno.ENOBUFS, "send_no_buffer"),
        (errno.ENOKEY, "send_failed"),
        (errno.EDESTADDRREQ, "send_failed"),
    ],
)
async def test_what_the_network_refuses_is_counted(error: int, counter: str) -> None:
    port, _sock = refusing_port(error, 0)
    await port.send([UdpBatch(b"x" * 200, 100, FROM), UdpBatch(b"y", 1, FROM)])
    port.close()
    assert port.statistics()[counter] == 2
    assert port.statistics()["sent_packets"] == 1


async def test_a_shorter_last_segment_may_fit() -> None:
    """The kernel refuses all of them for the size of the first, as probes of an MTU that arrive
    together at a relay whose next link takes the smaller ones."""
    port, sock = refusing_port(errno.EMSGSIZE, errno.EAGAIN)
    await port.send([UdpBatch(b"x" * 250, 100, FROM)])
    port.close()
    assert sock.calls == [(250, True), (50, False), (50, False)]
    assert port.statistics()["send_too_large"] == 2
    assert (port.statistics()["sent_packets"], port.statistics()["sent_bytes"]) == (1, 50)


async def test_our_own_mistakes_are_raised() -> None:
    port, _sock = refusing_port(errno.EFAULT)
    with pytest.raises(OSError, match="no"):
        await port.send([UdpBatch(b"x", 1, FROM)])
    port.close()


async def test_send_waits_while_the_buffer_is_full() -> None:
    port, sock = refusing_port(errno.EAGAIN, errno.EAGAIN)
    await port.send([UdpBatch(b"x", 1, FROM)])
    port.close()
    assert len(sock.calls) == 3


async def test_too_large_for_the_path_is_counted() -> None:
    async with open_udp_port("127.0.0.1", 0) as port:
        await port.send([UdpBatch(bytes(65_530), 65_530, ("127.0.0.1", 9))])
        assert port.statistics()["send_too_large"] == 1


async def test_address_of_the_other_family_is_counted() -> None:
    async with open_udp_port("::1", 0) as six, open_udp_port("127.0.0.1", 0) as four:
        await six.send([UdpBatch(b"x", 1, four.local_address)])
        await four.send([UdpBatch(b"x", 1, six.local_address)])
        await four.send([UdpBatch(b"x", 1, ("127.0.0.1", 0))])
        assert six.statistics()["send_unreachable"] == 1
        assert four.statistics()["send_unreachable"] == 1
        assert four.statistics()["send_invalid"] == 1


class ReportingSocket(socket.socket):
    """A socket on which the kernel reports an ICMP error before the first datagram."""

    errors: tuple[int, ...] = (errno.ECONNREFUSED, errno.EHOSTUNREACH)

    def recvmsg_into(self, *args: Any) -> Any:
        if self.errors:
            error, *rest = self.errors
            self.errors = tuple(rest)
            raise OSError(error, "reported by ICMP")
        return super().recvmsg_into(*args)


async def test_error_reported_on_receive_is_counted() -> None:
    sock = ReportingSocket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.setblocking(False)
    port = SocketUdpPort(sock, sock.getsockname(), gro=False, gso=False)
    await port.send([UdpBatch(b"self", 4, port.local_address)])
    assert data_of(await collect(port, 4)) == b"self"
    assert port.statistics()["receive_errors"] == 2
    port.close()


async def test_df_is_set_and_v6_is_v6_only() -> None:
    async with open_udp_port("127.0.0.1", 0) as four, open_udp_port("::1", 0) as six:
        assert four._socket.getsockopt(socket.IPPROTO_IP, 10) == 3
        assert six._socket.getsockopt(socket.IPPROTO_IPV6, 23) == 3
        assert six._socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1
        assert four.local_address[0] == "127.0.0.1"
        assert six.local_address[0] == "::1"
        assert len(six.local_address) == 2


async def test_empty_datagrams_are_nothing() -> None:
    async with open_udp_port("127.0.0.1", 0) as one, open_udp_port("127.0.0.1", 0) as two:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
            plain.sendto(b"", two.local_address)
        await one.send([UdpBatch(b"x", 1, two.local_address)])
        assert data_of(await collect(two, 1)) == b"x"


async def test_port_in_use_says_so() -> None:
    async with open_udp_port("127.0.0.1", 0) as port:
        number = port.local_address[1]
        with pytest.raises(SystemSetupError, match=f"UDP port {number} on 127.0.0.1: another"):
            async with open_udp_port("127.0.0.1", number):
                pass


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("192.0.2.77", 0, "no such address"),
        ("localhost", 0, "must be an IP address"),
        ("127.0.0.1", 70_000, "0 to 65535"),
        ("ff02::1", 0, "cannot listen on UDP port 0 on ff02::1"),
    ],
)
async def test_bind_errors_say_what_to_do(host: str, port: int, words: str) -> None:
    with pytest.raises(SystemSetupError, match=words):
        async with open_udp_port(host, port):
            pass


async def test_no_descriptor_left_says_so() -> None:
    with (
        no_descriptors(),
        pytest.raises(SystemSetupError, match="no file descriptor is left"),
    ):
        async with open_udp_port("127.0.0.1", 0):
            pass


async def test_no_descriptor_left_for_a_look_at_the_routes() -> None:
    with no_descriptors(), pytest.raises(UnreachableError, match=r"no way to 127\.0\.0\.1"):
        source_address(("127.0.0.1", 9))


async def test_closing_wakes_the_receiver() -> None:
    async with open_udp_port("127.0.0.1", 0) as port, trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await port.receive()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        port.close()
        port.close()
        with pytest.raises(trio.ClosedResourceError):
            await port.send([UdpBatch(b"x", 1, FROM)])
        with pytest.raises(trio.ClosedResourceError):
            await port.receive()


async def test_cancelled_receive_loses_nothing() -> None:
    async with open_udp_port("127.0.0.1", 0) as one, open_udp_port("127.0.0.1", 0) as two:
        with trio.move_on_after(0):
            await two.receive()
        await one.send([UdpBatch(b"kept", 4, two.local_address)])
        with trio.CancelScope() as scope:
            scope.cancel()
            await two.receive()
        assert data_of(await collect(two, 4)) == b"kept"


@pytest.mark.parametrize("many", [1, 40])
async def test_server_answers_from_the_address_that_was_asked(many: int) -> None:
    """127.0.0.7 and 127.0.0.1 are both ours; routes alone would choose the latter."""
    async with open_udp_port("0.0.0.0", 0, server=True) as server:
        number = server.local_address[1]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(5)
            client.connect(("127.0.0.7", number))  # takes answers from there alone
            client.send(b"question")
            with trio.fail_after(5):
                (batch,) = await server.receive()
                await server.send([UdpBatch(bytes(100 * many), 100, batch.address)])
            answers = await trio.to_thread.run_sync(
                lambda: [len(client.recv(1000)) for _ in range(many)]
            )
            assert answers == [100] * many


async def test_a_packet_too_large_leaves_the_address_that_was_asked() -> None:
    """A probe of the path's MTU fails so."""
    async with open_udp_port("0.0.0.0", 0, server=True) as server:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(5)
            client.connect(("127.0.0.7", server.local_address[1]))
            client.send(b"question")
            with trio.fail_after(5):
                (batch,) = await server.receive()
                await server.send([UdpBatch(bytes(65_530), 65_530, batch.address)])
                assert server.statistics()["send_too_large"] == 1
                await server.send([UdpBatch(b"answer", 6, batch.address)])
            assert await trio.to_thread.run_sync(lambda: client.recv(1000)) == b"answer"


async def test_server_forgets_peers_beyond_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ztna.net.udp._MAX_LOCAL_ADDRESSES", 3)
    async with open_udp_port("0.0.0.0", 0, server=True) as server:
        for _ in range(5):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.sendto(b"x", ("127.0.0.7", server.local_address[1]))
                with trio.fail_after(5):
                    await server.receive()
        assert len(server._local_addresses) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="raw sockets need root")
async def test_datagrams_from_port_zero_are_dropped() -> None:
    """Nobody could answer them, and virtual addresses have this port."""
    async with open_udp_port("127.0.0.1", 0) as port:
        host, number = port.local_address
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as raw:
            for source in (0, 7):
                header = struct.pack("!HHHH", source, number, 8 + 3, 0)
                raw.sendto(header + b"abc", (host, 0))
        (batch,) = await port.receive()
        assert batch.address == (host, 7)
        assert port.statistics()["receive_errors"] == 1


async def test_addresses_that_peers_have_asked_are_bounded() -> None:
    async with open_udp_port("0.0.0.0", 0, server=True) as port:
        for number in range(32_768 + 10):
            port._remember((f"host {number}", 1), (0, 8, bytes(12)))
        assert len(port._local_addresses) == 32_768
        assert ("host 9", 1) not in port._local_addresses
        assert ("host 10", 1) in port._local_addresses
