"""A whole probe of this machine on loopback: IP versions, sessions, second servers, silence."""

import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from tests.net.certificates import Deployment, make_agent, make_deployment
from tests.ports import free_port
from ztna.config.model import DEFAULT_PORT
from ztna.config.stun import DEFAULT_ALTERNATE_PORT
from ztna.core import natprobe, wire
from ztna.core.identity import Role
from ztna.core.mtuprobe import PathMtu
from ztna.core.natclass import FilteringKind, MappingKind, Presence
from ztna.core.ports import Address
from ztna.errors import SystemSetupError, UnreachableError
from ztna.net.endpoint import Endpoint
from ztna.net.stun import StunAddresses, open_stun_responder
from ztna.net.udp import open_udp_port
from ztna.pki import Credentials
from ztna.roles import observed
from ztna.roles.nat_probe import NO_CREDENTIALS, FamilyReport, ProbeOptions, probe_nat
from ztna.roles.observed import SESSIONS_OF_ONE_SOCKET

LOOP, LOOP_2 = "127.0.0.1", "127.0.0.2"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence on loopback needs no retries of seconds."""
    monkeypatch.setattr(natprobe, "FIRST_INTERVAL", 0.02)


@pytest.fixture(scope="module")
def deployment() -> Deployment:
    return make_deployment()


@asynccontextmanager
async def relay(
    host: str, addresses: StunAddresses, credentials: Credentials, port: int = 0
) -> AsyncGenerator[Address, None]:
    """An endpoint that answers STUN, and tells each session as whom it sees it."""
    async with (
        open_udp_port(host, port, server=True) as udp,
        open_stun_responder(udp, addresses) as responder,
        trio.open_nursery() as nursery,
    ):
        endpoint = Endpoint(udp, stun=responder.answer)
        await nursery.start(endpoint.run)
        nursery.start_soon(responder.run)
        accepted = endpoint.listen(credentials, [Role.AGENT])

        async def tell() -> None:
            async for session in accepted:
                session.send_datagrams([b"\x12\0\1x"])  # something else first
                session.send_datagrams([wire.encode_observed_address(session.remote_address)])

        nursery.start_soon(tell)
        yield udp.local_address
        nursery.cancel_scope.cancel()


def family(found: FamilyReport | str) -> FamilyReport:
    assert isinstance(found, FamilyReport), found
    return found


async def test_two_addresses_tell_all(deployment: Deployment) -> None:
    said: list[str] = []
    addresses = StunAddresses(None, free_port(), LOOP_2)
    async with relay(LOOP, addresses, deployment.intermediate) as server:
        report = await probe_nat(ProbeOptions((server,)), said.append)
    found = family(report.families[4])
    assert report.best is found
    assert (found.server, found.source) == (server, LOOP)
    assert found.behaviour.presence is Presence.OPEN
    assert found.mtu == PathMtu(1500, 1500)
    assert (found.observed, found.not_observed) == ((), NO_CREDENTIALS)
    assert report.families[6] == f"no IPv6 address of {LOOP}"
    assert "IPv4: first answer: answered" in said
    assert said[-1] == "IPv4: measuring the path's MTU"


async def test_both_ip_versions(deployment: Deployment) -> None:
    async with (
        relay(LOOP, StunAddresses(), deployment.intermediate) as four,
        relay("::1", StunAddresses(), deployment.intermediate, four[1]) as six,
    ):
        report = await probe_nat(ProbeOptions((four, six)), lambda _: None)
    assert family(report.families[4]).behaviour.presence is Presence.NO_NAT
    found = family(report.families[6])
    assert (found.server, found.source) == (("::1", four[1]), "::1")
    assert found.behaviour.external_hosts == {"::1"}


async def test_bound_to_an_address(deployment: Deployment) -> None:
    async with relay(LOOP, StunAddresses(), deployment.intermediate) as server:
        report = await probe_nat(ProbeOptions((server,), bind=LOOP_2), lambda _: None)
        found = family(report.families[4])
        assert found.source == LOOP_2
        assert found.behaviour.external_hosts == {LOOP_2}
        assert report.families[6] == f"not tried: {LOOP_2} is an IPv4 address"
        with pytest.RaisesGroup(SystemSetupError, flatten_subgroups=True):
            await probe_nat(ProbeOptions((server,), bind="203.0.113.1"), lambda _: None)
        with pytest.raises(UnreachableError, match="no IPv6 address of 127"):
            await probe_nat(ProbeOptions((server,), bind="::1"), lambda _: None)


async def test_an_intermediates_other_port_is_asked_unnamed(deployment: Deployment) -> None:
    """It has one address, and the usual ports."""
    said: list[str] = []
    addresses, host = StunAddresses(None, DEFAULT_ALTERNATE_PORT), "127.44.33.1"
    async with relay(host, addresses, deployment.intermediate, DEFAULT_PORT) as server:
        await probe_nat(ProbeOptions((server,), bind=LOOP), said.append)
    assert f"IPv4: mapping towards {host} port {DEFAULT_ALTERNATE_PORT}: answered" in said


async def test_a_second_port_as_a_second_server(deployment: Deployment) -> None:
    other = free_port()
    async with relay(LOOP, StunAddresses(None, other), deployment.intermediate) as server:
        options = ProbeOptions((server, (LOOP, other)))
        found = family((await probe_nat(options, lambda _: None)).families[4])
    assert found.behaviour.filterings == {FilteringKind.EIF, FilteringKind.ADF}


async def test_the_next_server_is_asked_when_one_is_silent(deployment: Deployment) -> None:
    async with relay(LOOP, StunAddresses(), deployment.intermediate) as server:
        options = ProbeOptions(((LOOP_2, free_port()), server))
        found = family((await probe_nat(options, lambda _: None)).families[4])
    assert found.server == server
    assert found.behaviour.mapping is MappingKind.EIM


async def test_nobody_answers() -> None:
    server = (LOOP, free_port())
    report = await probe_nat(ProbeOptions((server,)), lambda _: None)
    assert report.best.server == server
    assert report.best.behaviour.presence is Presence.UDP_BLOCKED
    assert report.best.mtu == PathMtu(None, None)


async def test_sessions_are_observed(deployment: Deployment) -> None:
    agent = make_agent(deployment.ca, deployment.now, "probe")
    async with relay(LOOP, StunAddresses(), deployment.intermediate) as server:
        options = ProbeOptions((server,), credentials=agent, server_name="127.0.0.1")
        found = family((await probe_nat(options, lambda _: None)).families[4])
    assert found.not_observed == ""
    assert len(found.observed) == SESSIONS_OF_ONE_SOCKET + observed.OTHER_SOCKETS
    sockets = [sample.local for sample in found.observed]
    assert len(set(sockets[:SESSIONS_OF_ONE_SOCKET])) == 1
    assert len(set(sockets)) == 1 + observed.OTHER_SOCKETS
    assert all(sample.mapped == sample.local for sample in found.observed)
    assert {sample.destination for sample in found.observed} == {server}


async def test_sessions_that_fail_do_not_end_the_probe(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observed, "DEADLINE", 0.3)
    agent = make_agent(deployment.ca, deployment.now, "probe")
    stranger = attrs.evolve(agent, roots=make_deployment().intermediate.roots)
    async with relay(LOOP, StunAddresses(), deployment.intermediate) as server:
        for options, words in (
            (ProbeOptions((server,), credentials=stranger, server_name="127.0.0.1"), "certificate"),
            (ProbeOptions((server,), credentials=agent, server_name="other.example"), "other"),
        ):
            found = family((await probe_nat(options, lambda _: None)).families[4])
            assert found.observed == ()
            assert words in found.not_observed
            assert found.behaviour.mapping is MappingKind.EIM
    async with open_udp_port(LOOP, 0) as deaf:
        options = ProbeOptions((deaf.local_address,), credentials=agent)
        found = family((await probe_nat(options, lambda _: None)).families[4])
        assert "is it an intermediate" in found.not_observed


async def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(host: str, *_: object, **__: object) -> list[object]:
        await trio.lowlevel.checkpoint()
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(trio.socket, "getaddrinfo", nothing)
    words = r"no IPv4 address of relay\.invalid; no IPv6 address of relay\.invalid; check --server"
    with pytest.raises(UnreachableError, match=words):
        await probe_nat(ProbeOptions((("relay.invalid", 1),)), lambda _: None)
