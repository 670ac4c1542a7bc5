"""What happens at a NAT, once for both laboratories: each function builds on any `Lab`, sends, and
asserts what RFC 4787 and the gateway's `NatSpec` demand. None waits for longer than the packets."""

import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import attrs
import trio

from ztna.core.natclass import FilteringKind, MappingKind, NatBehaviour, PortKind
from ztna.core.natplan import ProbeSocket
from ztna.core.natprobe import NatProber
from ztna.core.ports import Address, UdpBatch
from ztna.core.stun_server import LocalEnd, StunServer
from ztna.nat.lab import Lab, LabGateway, LabHost, LabPort
from ztna.nat.spec import NatSpec

AnyLab = Lab[Any, Any]

_numbers = itertools.count(5000)


@attrs.frozen
class Topology:
    """Two public servers, and two hosts behind one gateway."""

    lab: AnyLab
    nat: NatSpec
    server: LabHost
    other_server: LabHost
    gateway: LabGateway
    inner: LabHost
    neighbour: LabHost


def build(lab: AnyLab, nat: NatSpec) -> Topology:
    servers = [lab.host(ip_version=nat.ip_version) for _ in range(2)]
    gateway = lab.gateway(nat)
    hosts = [lab.host(behind=gateway) for _ in range(2)]
    return Topology(lab, nat, servers[0], servers[1], gateway, hosts[0], hosts[1])


async def send(port: LabPort, destination: Address, data: bytes = b"x") -> None:
    await port.send([UdpBatch(data, len(data), destination)])


async def heard_until(lab: AnyLab, port: LabPort, last: bytes) -> list[tuple[bytes, Address]]:
    """What comes to a port, payload and sender, before a payload that was sent last of all."""
    await lab.settle()
    got: list[tuple[bytes, Address]] = []
    with trio.fail_after(5):
        while True:
            for batch in await port.receive():
                data = bytes(batch.data)
                for start in range(0, len(data), batch.segment_size):
                    payload = data[start : start + batch.segment_size]
                    if payload == last:
                        return got
                    got.append((payload, batch.address))


async def outer_address(inner: LabPort, server: LabPort) -> Address:
    """The address that a server sees."""
    await send(inner, server.local_address, b"who am I?")
    with trio.fail_after(5):
        (batch,) = await server.receive()
    assert bytes(batch.data) == b"who am I?"
    return batch.address


async def mapping(top: Topology) -> None:
    """Which destinations share a mapping, and how it gets its port."""
    first, port = top.server.open_udp_port(7000), next(_numbers)
    async with (
        first,
        top.server.open_udp_port(7001) as same_host,
        top.other_server.open_udp_port(7000) as other_host,
        top.inner.open_udp_port(port) as inner,
    ):
        outers = [await outer_address(inner, s) for s in (first, same_host, other_host)]
        again = [await outer_address(inner, s) for s in (first, same_host, other_host)]
        assert again == outers
    assert {outer[0] for outer in outers} == {top.gateway.address}
    same = [outer == outers[0] for outer in outers[1:]]
    kinds = {MappingKind.EIM: [True, True], MappingKind.ADM: [True, False]}
    assert same == kinds.get(top.nat.mapping, [False, False])
    different = list(dict.fromkeys(outer[1] for outer in outers))
    match top.nat.ports:
        case PortKind.PRESERVED:
            assert different[0] == port
        case PortKind.SEQUENTIAL:
            assert different == list(range(different[0], different[0] + len(different)))
        case PortKind.RANDOM:
            assert port not in different


async def filtering(top: Topology) -> None:
    """Who may answer."""
    async with (
        top.server.open_udp_port(7000) as asked,
        top.server.open_udp_port(7001) as other_port,
        top.other_server.open_udp_port(7000) as other_host,
        top.inner.open_udp_port(next(_numbers)) as inner,
    ):
        outer = await outer_address(inner, asked)
        for port, word in ((other_host, b"host"), (other_port, b"port"), (asked, b"end")):
            await send(port, outer, word)
            await top.lab.settle()
        got = await heard_until(top.lab, inner, b"end")
        allowed = {
            FilteringKind.EIF: [
                (b"host", other_host.local_address),
                (b"port", other_port.local_address),
            ],
            FilteringKind.ADF: [(b"port", other_port.local_address)],
            FilteringKind.APDF: [],
        }
        assert got == allowed[top.nat.filtering]
        # Who was refused has left no trace that would change what is sent to him.
        if top.nat.mapping is MappingKind.EIM:
            assert await outer_address(inner, other_host) == outer
            await send(other_host, outer, b"now asked")
            assert await heard_until(top.lab, inner, b"now asked") == []


async def two_hosts(top: Topology) -> None:
    """Two hosts with one port, towards different servers and the same one."""
    port = next(_numbers)
    async with (
        top.server.open_udp_port(7000) as server,
        top.other_server.open_udp_port(7000) as other_server,
        top.inner.open_udp_port(port) as first,
        top.neighbour.open_udp_port(port) as second,
    ):
        first_outer = await outer_address(first, server)
        second_elsewhere = await outer_address(second, other_server)
        second_outer = await outer_address(second, server)
        assert first_outer not in {second_outer, second_elsewhere}
        assert (second_outer == second_elsewhere) == (top.nat.mapping is MappingKind.EIM)
        for outer, word in ((first_outer, b"one"), (second_outer, b"two")):
            await send(server, outer, word)
        await top.lab.settle()
        # Inside they reach each other as they are.
        await send(first, second.local_address, b"hello")
        await send(second, first.local_address, b"hello")
        assert await heard_until(top.lab, first, b"hello") == [(b"one", server.local_address)]
        assert await heard_until(top.lab, second, b"hello") == [(b"two", server.local_address)]


async def hairpin(top: Topology) -> None:
    """Two hosts inside, at their outer addresses: each sends once."""
    async with (
        top.server.open_udp_port(7000) as server,
        top.inner.open_udp_port(next(_numbers)) as first,
        top.neighbour.open_udp_port(next(_numbers)) as second,
    ):
        first_outer = await outer_address(first, server)
        second_outer = await outer_address(second, server)
        await send(first, second_outer, b"from first")
        await top.lab.settle()
        await send(server, second_outer, b"end")
        at_second = await heard_until(top.lab, second, b"end")
        await send(second, first_outer, b"from second")
        await top.lab.settle()
        await send(server, first_outer, b"end")
        at_first = await heard_until(top.lab, first, b"end")
    nat = top.nat
    open_to_all = nat.hairpin and nat.filtering is FilteringKind.EIF
    assert [data for data, _ in at_second] == [b"from first"] * open_to_all
    # By another mapping the first host has opened another port than the one it is known by.
    opened = nat.filtering is FilteringKind.EIF or nat.mapping is MappingKind.EIM
    assert [data for data, _ in at_first] == [b"from second"] * (nat.hairpin and opened)
    # RFC 4787 REQ-9a: with the sender's outer address.
    assert {source[0] for _, source in at_first + at_second} <= {top.gateway.address}
    if nat.mapping is MappingKind.EIM:
        assert [source for _, source in at_first] == [second_outer] * len(at_first)


async def classified(top: Topology) -> None:
    """A probe by RFC 5780 finds exactly what was asked for."""
    async with stun_service(top.server, top.other_server) as server:
        check_classified(top.nat, await probe(top.inner, server))


def check_classified(nat: NatSpec, found: NatBehaviour) -> None:
    """Whether what was found is what is there."""
    expected = nat.behaviour
    assert (found.presence, found.mapping, found.filtering, found.ports, found.step) == (
        expected.presence,
        expected.mapping,
        expected.filtering,
        expected.ports,
        expected.step,
    )
    # It cannot be told where no socket's outer address is known beforehand.
    if found.hairpin is not None or nat.mapping is MappingKind.EIM:
        assert found.hairpin == expected.hairpin


@contextlib.asynccontextmanager
async def stun_service(primary: LabHost, alternate: LabHost) -> AsyncIterator[Address]:
    """A STUN server with two addresses and two ports, as RFC 5780 wants it."""
    server = StunServer((primary.address, 3478), alternate.address, 3479)
    ports: dict[LocalEnd, LabPort] = {
        end: (alternate if end.alternate_ip else primary).open_udp_port(address[1])
        for end, address in server.ends().items()
    }

    async def serve(end: LocalEnd) -> None:
        while True:
            for batch in await ports[end].receive():
                now = trio.current_time()
                reply = server.receive_untrusted(bytes(batch.data), batch.address, end, now)
                if reply is not None:
                    await send(ports[reply.end], reply.destination, reply.data)

    async with trio.open_nursery() as nursery:
        for end in ports:
            nursery.start_soon(serve, end)
        try:
            yield server.primary
        finally:
            nursery.cancel_scope.cancel()
            for port in ports.values():
                port.close()


async def probe(host: LabHost, server: Address) -> NatBehaviour:
    """Run a `NatProber` on a host."""
    ports: dict[ProbeSocket, LabPort] = {
        name: host.open_udp_port(next(_numbers)) for name in ProbeSocket
    }
    local = {name: port.local_address for name, port in ports.items()}
    prober = NatProber(server, local, random.Random(1))
    wake = trio.Event()

    async def listen(name: ProbeSocket) -> None:
        while True:
            for batch in await ports[name].receive():
                now, data = trio.current_time(), bytes(batch.data)
                prober.receive_response_untrusted(data, batch.address, name, now)
            wake.set()

    async with contextlib.AsyncExitStack() as stack:
        for port in ports.values():
            await stack.enter_async_context(port)
        nursery = await stack.enter_async_context(trio.open_nursery())
        for name in ports:
            nursery.start_soon(listen, name)
        prober.start(trio.current_time())
        while prober.behaviour is None:
            wake = trio.Event()
            for request in prober.requests_to_send(trio.current_time()):
                await send(ports[request.socket], request.destination, request.data)
            timer = prober.get_timer()
            if timer is None:
                continue  # it was over while we were sending
            with trio.move_on_at(timer) as scope:
                await wake.wait()
            if scope.cancelled_caught:
                prober.handle_timer(trio.current_time())
        nursery.cancel_scope.cancel()
    return prober.behaviour


OfNat = Callable[[Topology], Awaitable[None]]
OF_EVERY_NAT: tuple[OfNat, ...] = (mapping, filtering, two_hosts, hairpin)
"""Each NAT must pass these, and be `classified`."""
