"""What happens at a NAT, once for both laboratories: each function builds on any `Lab`, sends, and
asserts what RFC 4787 and the gateway's `NatSpec` demand. None waits for longer than the packets."""

import itertools
import random
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import trio

from ztna.core.natclass import FilteringKind, MappingKind, NatBehaviour, PortKind
from ztna.core.natplan import ProbeSocket
from ztna.core.natprobe import NatProber
from ztna.core.ports import Address, UdpBatch
from ztna.core.stun_server import LocalEnd, StunServer
from ztna.nat.lab import Lab, LabGateway, LabHost, LabPort
from ztna.nat.spec import GatewayKind, NatSpec

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
    version6 = nat.ip_version == 6
    servers = [
        lab.host(address)
        for address in (["2001:db8:5::1", "2001:db8:5::2"] if version6 else [None, None])
    ]
    gateway = lab.gateway(nat)
    hosts = [lab.host(behind=gateway) for _ in range(2)]
    return Topology(lab, nat, servers[0], servers[1], gateway, hosts[0], hosts[1])


async def send(port: LabPort, destination: Address, data: bytes = b"x") -> None:
    await port.send([UdpBatch(data, len(data), destination)])


async def heard(lab: AnyLab, port: LabPort) -> list[tuple[bytes, Address]]:
    """What has come to a port: payload and sender."""
    await lab.settle()
    got = []
    while True:
        with trio.move_on_after(0.002) as scope:
            for batch in await port.receive():
                data = bytes(batch.data)
                got += [
                    (data[start : start + batch.segment_size], batch.address)
                    for start in range(0, len(data), batch.segment_size)
                ]
        if scope.cancelled_caught:
            return got


async def outer_address(lab: AnyLab, inner: LabPort, server: LabPort) -> Address:
    """The address that a server sees."""
    await send(inner, server.local_address, b"who am I?")
    ((data, source),) = await heard(lab, server)
    assert data == b"who am I?"
    return source


async def mapping(top: Topology) -> None:
    """Which destinations share a mapping, and how it gets its port."""
    first, port = top.server.open_udp_port(7000), next(_numbers)
    async with (
        first,
        top.server.open_udp_port(7001) as same_host,
        top.other_server.open_udp_port(7000) as other_host,
        top.inner.open_udp_port(port) as inner,
    ):
        outers = [await outer_address(top.lab, inner, s) for s in (first, same_host, other_host)]
        again = [await outer_address(top.lab, inner, s) for s in (first, same_host, other_host)]
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
        outer = await outer_address(top.lab, inner, asked)
        for port, word in ((other_host, b"host"), (other_port, b"port"), (asked, b"asked")):
            await send(port, outer, word)
        got = await heard(top.lab, inner)
        allowed = {
            FilteringKind.EIF: [
                (b"host", other_host.local_address),
                (b"port", other_port.local_address),
            ],
            FilteringKind.ADF: [(b"port", other_port.local_address)],
            FilteringKind.APDF: [],
        }
        assert got == [*allowed[top.nat.filtering], (b"asked", asked.local_address)]
        # Who was refused has left no trace that would change what is sent to him.
        if top.nat.mapping is MappingKind.EIM:
            assert await outer_address(top.lab, inner, other_host) == outer
            await send(other_host, outer, b"now asked")
            assert await heard(top.lab, inner) == [(b"now asked", other_host.local_address)]


async def two_hosts(top: Topology) -> None:
    """Two hosts with one port, towards different servers and the same one."""
    port = next(_numbers)
    async with (
        top.server.open_udp_port(7000) as server,
        top.other_server.open_udp_port(7000) as other_server,
        top.inner.open_udp_port(port) as first,
        top.neighbour.open_udp_port(port) as second,
    ):
        first_outer = await outer_address(top.lab, first, server)
        second_elsewhere = await outer_address(top.lab, second, other_server)
        second_outer = await outer_address(top.lab, second, server)
        assert first_outer not in {second_outer, second_elsewhere}
        assert (second_outer == second_elsewhere) == (top.nat.mapping is MappingKind.EIM)
        for outer, word in ((first_outer, b"one"), (second_outer, b"two")):
            await send(server, outer, word)
        assert await heard(top.lab, first) == [(b"one", server.local_address)]
        assert await heard(top.lab, second) == [(b"two", server.local_address)]
        # Inside they reach each other as they are.
        await send(first, second.local_address, b"hello")
        assert await heard(top.lab, second) == [(b"hello", first.local_address)]


async def hairpin(top: Topology) -> None:
    """Two hosts inside, at their outer addresses: each sends once."""
    async with (
        top.server.open_udp_port(7000) as server,
        top.inner.open_udp_port(next(_numbers)) as first,
        top.neighbour.open_udp_port(next(_numbers)) as second,
    ):
        first_outer = await outer_address(top.lab, first, server)
        second_outer = await outer_address(top.lab, second, server)
        await send(first, second_outer, b"from first")
        at_second = await heard(top.lab, second)
        await send(second, first_outer, b"from second")
        at_first = await heard(top.lab, first)
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
    found = await probe(top)
    expected = top.nat.behaviour
    assert (found.presence, found.mapping, found.filtering) == (
        expected.presence,
        expected.mapping,
        expected.filtering,
    )
    assert (found.ports, found.step) == (expected.ports, expected.step)
    if found.hairpin is not None:
        assert found.hairpin == expected.hairpin
    # With an endpoint-independent mapping it can always be told.
    assert (found.hairpin is None) <= (
        top.nat.mapping is not MappingKind.EIM or top.nat.kind is not GatewayKind.NAT
    )


async def probe(top: Topology) -> NatBehaviour:
    """Run `NatProber` inside against a `StunServer` with two addresses and two ports outside."""
    ends = {
        LocalEnd(ip, port): host.open_udp_port(3479 if port else 3478)
        for ip, host in ((False, top.server), (True, top.other_server))
        for port in (False, True)
    }
    sockets = {name: top.inner.open_udp_port(next(_numbers)) for name in ProbeSocket}
    server = StunServer(
        ends[LocalEnd()].local_address,
        alternate_port=3479,
        alternate_ip=top.other_server.address,
    )
    prober = NatProber(
        ends[LocalEnd()].local_address,
        {name: port.local_address for name, port in sockets.items()},
        random.Random(1),
    )
    wake = trio.Event()

    async def serve(end: LocalEnd) -> None:
        while True:
            for batch in await ends[end].receive():
                reply = server.receive_untrusted(
                    bytes(batch.data), batch.address, end, trio.current_time()
                )
                if reply is not None:
                    await send(ends[reply.end], reply.destination, reply.data)

    async def listen(name: ProbeSocket) -> None:
        while True:
            for batch in await sockets[name].receive():
                prober.receive_response_untrusted(
                    bytes(batch.data), batch.address, name, trio.current_time()
                )
                wake.set()

    async with trio.open_nursery() as nursery:
        for end in ends:
            nursery.start_soon(serve, end)
        for name in sockets:
            nursery.start_soon(listen, name)
        prober.start(trio.current_time())
        while prober.behaviour is None:
            wake = trio.Event()
            for request in prober.requests_to_send(trio.current_time()):
                await send(sockets[request.socket], request.destination, request.data)
            timer = prober.get_timer()
            assert timer is not None
            with trio.move_on_at(timer) as scope:
                await wake.wait()
            if scope.cancelled_caught:
                prober.handle_timer(trio.current_time())
        nursery.cancel_scope.cancel()
    for port in [*ends.values(), *sockets.values()]:
        port.close()
    return prober.behaviour


OfNat = Callable[[Topology], Awaitable[None]]
OF_EVERY_NAT: tuple[OfNat, ...] = (mapping, filtering, two_hosts, hairpin, classified)
