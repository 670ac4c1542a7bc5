"""Scenarios that build their own networks, for both laboratories: time, changes while traffic
flows, several NATs, firewalls, IPv6, and the verbs of a lab."""

import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path

import attrs
import dpkt
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.nat.refusals import refusals
from tests.nat.scenarios import (
    OF_EVERY_NAT,
    AnyLab,
    build,
    heard_until,
    outer_address,
    send,
)
from ztna.core.natclass import FilteringKind, MappingKind, PortKind
from ztna.core.ports import Address
from ztna.errors import LocalProtocolError, SystemSetupError
from ztna.nat.lab import LabPort
from ztna.nat.link import LinkSpec
from ztna.nat.spec import (
    CGNAT,
    CLASSIC_NATS,
    FIREWALL,
    FULL_CONE,
    OPEN,
    PORT_RESTRICTED,
    SYMMETRIC,
    UDP_BLOCKED,
    UDP_REJECTED,
    GatewayKind,
    NatSpec,
    PortMapping,
)

# Every mapping with every filtering; each of them with another allocation, every second one with
# hairpin.
NATS66 = [
    NatSpec(
        *kinds,
        list(PortKind)[(number + number // 3) % 3],
        hairpin=bool(number % 2),
        ip_version=6,
    )
    for number, kinds in enumerate(itertools.product(MappingKind, FilteringKind))
]


async def arrived(lab: AnyLab, port: LabPort) -> list[tuple[bytes, Address]]:
    """All that has come to a port of what was sent by now."""
    got: list[tuple[bytes, Address]] = []

    async def take() -> None:
        while True:
            for batch in await port.receive():
                data = bytes(batch.data)
                size = batch.segment_size
                got.extend((data[i : i + size], batch.address) for i in range(0, len(data), size))

    await lab.settle()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    return got


async def timeouts(lab: AnyLab) -> None:
    """A mapping lives by outbound packets, and dies without."""
    for nat in (FULL_CONE, PORT_RESTRICTED, SYMMETRIC):
        top = build(lab, attrs.evolve(nat, ports=PortKind.RANDOM, mapping_timeout=1))
        async with top.inner.open_udp_port(5000) as inner, top.server.open_udp_port(7000) as server:
            outer = await outer_address(inner, server)
            for _ in range(2):
                await lab.sleep(0.6)
                assert await outer_address(inner, server) == outer
            await send(server, outer, b"alive")
            assert await heard_until(lab, inner, b"alive") == []
            await lab.sleep(1.3)
            await send(server, outer, b"late")
            assert await arrived(lab, inner) == []
            assert await outer_address(inner, server) != outer


async def rebinding(lab: AnyLab) -> None:
    """Old outer addresses are dead, new ones differ, and traffic goes on."""
    nats = (
        *CLASSIC_NATS,
        attrs.evolve(PORT_RESTRICTED, hairpin=True),
        attrs.evolve(FULL_CONE, hairpin=True, ip_version=6),
    )
    for nat in nats:
        top = build(lab, nat)
        free = "2001:db8::{:x}" if nat.ip_version == 6 else "198.51.100.{}"
        async with top.inner.open_udp_port(5000) as inner, top.server.open_udp_port(7000) as server:
            outer = await outer_address(inner, server)
            for address in (None, free.format(200 + len(lab.gateways))):
                top.gateway.rebind(address)
                await send(server, outer, b"to the old")
                assert await arrived(lab, inner) == []
                before, outer = outer, await outer_address(inner, server)
                assert outer != before
                assert outer[0] == top.gateway.address == address or before[0]
                await send(server, outer, b"to the new")
                assert await heard_until(lab, inner, b"to the new") == []


async def carrier_grade(lab: AnyLab) -> None:
    """Two homes behind one carrier reach each other by its hairpin."""
    carrier = lab.gateway(CGNAT.above or CGNAT)
    homes = [lab.gateway(PORT_RESTRICTED, behind=carrier) for _ in range(2)]
    hosts = [lab.host("10.1.0.9", behind=home) for home in homes]
    async with (
        lab.host().open_udp_port(7000) as server,
        hosts[0].open_udp_port(5000) as one,
        hosts[1].open_udp_port(5000) as two,
    ):
        outers = [await outer_address(port, server) for port in (one, two)]
        assert [outer[0] for outer in outers] == [carrier.address] * 2
        await send(one, outers[1], b"opens")
        await lab.settle()
        await send(two, outers[0], b"gets in")
        assert await heard_until(lab, one, b"gets in") == []
        await send(one, outers[1], b"answer")
        assert await heard_until(lab, two, b"answer") == []


async def chain(lab: AnyLab) -> None:
    """The strictest gateway decides what the world sees."""
    for nat in (CGNAT, attrs.evolve(FULL_CONE, above=SYMMETRIC)):
        assert nat.above is not None
        top = build(lab, nat)
        seen = nat.behaviour
        carrier = lab.gateways[-2]
        async with (
            top.inner.open_udp_port(5000) as inner,
            top.server.open_udp_port(7000) as server,
            top.other_server.open_udp_port(7000) as other,
        ):
            outer = await outer_address(inner, server)
            assert outer[0] == carrier.address != top.gateway.address
            same = await outer_address(inner, other) == outer
            assert same == (seen.mapping is MappingKind.EIM)
            await send(server, outer, b"back")
            assert await heard_until(lab, inner, b"back") == []


async def udp_blocked(lab: AnyLab) -> None:
    """Neither out nor, where a port is open, in."""
    for nat in (UDP_BLOCKED, UDP_REJECTED):
        inner_address = ("10.0.0.77", 5000)
        top = build(lab, attrs.evolve(nat, port_mappings=(PortMapping(4434, inner_address),)))
        host = lab.host(inner_address[0], behind=top.gateway)
        async with host.open_udp_port(5000) as inner, top.server.open_udp_port(7000) as server:
            await send(inner, server.local_address)
            await send(server, (top.gateway.address, 4434))
            assert await arrived(lab, server) == await arrived(lab, inner) == []


async def firewall(lab: AnyLab) -> None:
    """Addresses stay; who was not asked stays out."""
    for kind in (GatewayKind.FIREWALL, GatewayKind.ROUTER):
        for filtered in FilteringKind:
            for version in (4, 6):
                nat = NatSpec(filtering=filtered, kind=kind, ip_version=version)
                top = build(lab, nat)
                async with (
                    top.inner.open_udp_port(5000) as inner,
                    top.server.open_udp_port(7000) as server,
                    top.server.open_udp_port(7001) as other_port,
                    top.other_server.open_udp_port(7000) as other_host,
                ):
                    senders = {b"host": other_host, b"port": other_port, b"end": server}
                    await send(server, inner.local_address, b"first")
                    await lab.settle()
                    assert await outer_address(inner, server) == inner.local_address
                    for data, port in senders.items():
                        await send(port, inner.local_address, data)
                        await lab.settle()
                    got = [data for data, _ in await heard_until(lab, inner, b"end")]
                if kind is GatewayKind.ROUTER:
                    assert got == [b"first", b"host", b"port"]
                else:
                    order = list(FilteringKind).index(filtered)
                    assert got == [b"host", b"port"][order:]


async def nat66(lab: AnyLab) -> None:
    """IPv6 addresses are translated like those of IPv4."""
    for nat in NATS66:
        top = build(lab, nat)
        assert ":" in top.gateway.address
        for scenario in OF_EVERY_NAT:
            await scenario(top)


async def port_mapping(lab: AnyLab) -> None:
    """An open port is open for everybody, and its host is seen by it."""
    for nat in (PORT_RESTRICTED, SYMMETRIC, attrs.evolve(SYMMETRIC, ip_version=6)):
        inside = ("fd00::50" if nat.ip_version == 6 else "10.0.0.50", 5000)
        top = build(lab, attrs.evolve(nat, port_mappings=(PortMapping(4434, inside),)))
        host = lab.host(inside[0], behind=top.gateway)
        async with host.open_udp_port(5000) as inner, top.server.open_udp_port(7000) as server:
            await send(server, (top.gateway.address, 4434), b"uninvited")
            assert await heard_until(lab, inner, b"uninvited") == []
            async with top.other_server.open_udp_port(7000) as other:
                for port in (server, other):
                    assert await outer_address(inner, port) == (top.gateway.address, 4434)


async def overlapping_lans(lab: AnyLab) -> None:
    """Two homes with the same addresses inside find each other by their outer ones."""
    homes = [lab.gateway(PORT_RESTRICTED) for _ in range(2)]
    one, two = (lab.host("10.0.0.2", behind=home).open_udp_port(5000) for home in homes)
    async with one, two, lab.host().open_udp_port(7000) as server:
        outers = [await outer_address(port, server) for port in (one, two)]
        assert {outer[0] for outer in outers} == {home.address for home in homes}
        assert one.local_address == two.local_address
        await send(one, outers[1], b"lost")
        await lab.settle()
        await send(two, outers[0], b"punched")
        assert await heard_until(lab, one, b"punched") == []
        await send(one, outers[1], b"connected")
        assert await heard_until(lab, two, b"connected") == []


async def blocks_and_cables(lab: AnyLab) -> None:
    """What is blocked or unplugged is lost, and everything else is not."""
    for nat in (PORT_RESTRICTED, attrs.evolve(FIREWALL, ip_version=6)):
        top = build(lab, nat)
        async with (
            top.inner.open_udp_port(5000) as inner,
            top.server.open_udp_port(7000) as server,
            top.other_server.open_udp_port(7000) as other,
        ):
            outer = await outer_address(inner, server)
            top.inner.block(top.server.address)
            await send(inner, server.local_address, b"blocked")
            await send(server, outer, b"blocked")
            assert await outer_address(inner, other) == outer
            assert await arrived(lab, inner) == await arrived(lab, server) == []
            top.inner.unblock(top.server.address)
            assert await outer_address(inner, server) == outer
            for member in (top.inner, top.server):
                member.pull_cable()
                await send(inner, server.local_address, b"unplugged")
                await send(server, outer, b"unplugged")
                assert await arrived(lab, inner) == await arrived(lab, server) == []
                member.plug_cable()
                # Neighbour discovery begins anew.
                assert await outer_address(inner, server) == outer


async def uplinks(lab: AnyLab) -> None:
    """A phone goes from Wi-Fi to mobile to a public address and home again; its port stays."""
    wifi, mobile = lab.gateway(PORT_RESTRICTED), lab.gateway(SYMMETRIC)
    phone = lab.host(behind=wifi)
    home = phone.address
    async with phone.open_udp_port(5000) as port, lab.host().open_udp_port(7000) as server:
        assert await outer_address(port, server) == (wifi.address, 5000)
        lab.change_uplink(phone, behind=mobile)
        assert (await outer_address(port, server))[0] == mobile.address
        await send(server, (wifi.address, 5000), b"to the old")
        await lab.settle()
        lab.change_uplink(phone, address="203.0.113.77")
        assert await outer_address(port, server) == ("203.0.113.77", 5000) == port.local_address
        lab.change_uplink(phone, behind=wifi)
        assert phone.address == home
        await send(server, (await outer_address(port, server)), b"end")
        assert await heard_until(lab, port, b"end") == []


async def captures(lab: AnyLab, folder: Path) -> None:
    """What crosses a host's interface, in both directions, and nothing before or after."""
    top, file = build(lab, PORT_RESTRICTED), folder / "inner.pcap"
    async with top.inner.open_udp_port(5000) as inner, top.server.open_udp_port(7000) as server:
        outer = await outer_address(inner, server)
        with top.inner.capture(file):
            await send(inner, server.local_address, b"going out")
            await send(server, outer, b"coming in")
            await heard_until(lab, inner, b"coming in")
        await send(server, outer, b"too late")
        await lab.settle()
    with file.open("rb") as opened:
        reader = dpkt.pcap.Reader(opened)
        offset = 14 if reader.datalink() == dpkt.pcap.DLT_EN10MB else 0
        packets = [bytes(frame)[offset:] for _, frame in reader]
    datagrams = [
        dpkt.ip.IP(data).data
        for data in packets
        if data[0] >> 4 == 4 and data[9] == dpkt.ip.IP_PROTO_UDP
    ]
    assert [(udp.sport, udp.dport, bytes(udp.data)) for udp in datagrams] == [
        (5000, 7000, b"going out"),
        (7000, 5000, b"coming in"),
    ]


async def duplicates(lab: AnyLab) -> None:
    """Of each link by itself, in both directions, in order; and gone when they are taken away."""
    for nat in (PORT_RESTRICTED, attrs.evolve(FIREWALL, ip_version=6)):
        top = build(lab, nat)
        async with top.inner.open_udp_port(5000) as inner, top.server.open_udp_port(7000) as server:
            await outer_address(inner, server)
            lab.set_link(top.gateway, LinkSpec(duplicate=1.0))
            assert await copies(lab, inner, server, 10) == {2}
            lab.set_link(top.inner, LinkSpec(duplicate=1.0, delay=0.01))
            assert await copies(lab, inner, server, 10) == {4}
            lab.set_link(top.inner, LinkSpec())
            lab.set_link(top.gateway, LinkSpec(duplicate=0.5))
            assert await copies(lab, inner, server, 100) == {1, 2}
            lab.set_link(top.gateway, LinkSpec())
            assert await copies(lab, inner, server, 10) == {1}


async def copies(lab: AnyLab, inner: LabPort, server: LabPort, number: int) -> set[int]:
    """How often packets arrive, of so many that are sent at once each way."""
    payloads = [b"%d" % n for n in range(number)]
    for data in payloads:
        await send(inner, server.local_address, data)
    at_server = await arrived(lab, server)
    for data in payloads:
        await send(server, at_server[0][1], data)
    found = set()
    for packets in (at_server, await arrived(lab, inner)):
        got = [int(data) for data, _ in packets]
        assert got == sorted(got)
        found |= {got.count(n) for n in range(number)}
    return found


async def addresses(lab: AnyLab) -> None:
    """Addresses and ports are checked."""
    gateway = lab.gateway(PORT_RESTRICTED, "198.51.100.99", lan="192.168.7.0/24")
    assert gateway.address == "198.51.100.99"
    assert lab.host(behind=gateway).address == "192.168.7.2"
    host = lab.host("192.168.7.3", behind=gateway)
    for wrong in ("192.168.7.3", "10.0.0.2"):
        with pytest.raises(LocalProtocolError, match=wrong):
            lab.host(wrong, behind=gateway)
    async with host.open_udp_port(5000):
        with pytest.raises(SystemSetupError, match="cannot listen on UDP port 5000 on 192"):
            host.open_udp_port(5000)
    host.open_udp_port(5000).close()
    assert lab.gateway(OPEN).address != lab.gateway(OPEN).address


OfLab = Callable[[AnyLab], Awaitable[None]]
OF_EVERY_LAB: tuple[OfLab, ...] = (
    timeouts,
    rebinding,
    carrier_grade,
    chain,
    udp_blocked,
    firewall,
    nat66,
    port_mapping,
    overlapping_lans,
    blocks_and_cables,
    uplinks,
    duplicates,
    refusals,
    addresses,
)
