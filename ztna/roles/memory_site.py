"""A deployment on a laboratory network in memory: the three roles, a UDP echo, and a user's packet.

The counterpart of `nat.site` on the virtual clock: the roles are the same functions that the
programs run, over `nat.memory_lab`'s ports and a TUN in memory.

    user's packet -> MemoryTun -> agent -- NAT -- intermediate -- NAT -- connector -> echo

The path is what the agent logs of it, as of a program.
"""

import datetime
import ipaddress
import logging
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import attrs
import structlog
import trio
from cryptography.hazmat.primitives.asymmetric import ec
from structlog.typing import EventDict
from trio.testing import MockClock

from ztna.authority import Authority, Request, create_authority
from ztna.backend.sockets import Datagram, DatagramSocket
from ztna.config.model import (
    AgentConfig,
    AgentService,
    ConnectorConfig,
    ConnectorService,
    IdentityFiles,
    IntermediateAddress,
    IntermediateConfig,
)
from ztna.core.identity import Identity, Role
from ztna.core.packet.ip import UDP, parse_ip_untrusted
from ztna.core.packet.udp import build_udp_packet
from ztna.core.policy import PolicyRule
from ztna.core.ports import Address
from ztna.nat.deployment import DIRECT, PATH
from ztna.nat.link import LinkSpec
from ztna.nat.memory_lab import MemoryLab, MemoryLabHost, open_lab
from ztna.nat.spec import NatSpec
from ztna.pki import Credentials
from ztna.roles.address_book import AddressBook
from ztna.roles.agent import run_agent
from ztna.roles.connector import run_connector
from ztna.roles.intermediate import run_intermediate
from ztna.tun.loopback import MemoryTun

_TRUST_DOMAIN, _AGENT, _CONNECTOR = "example.net", "laptop", "office"
_RELAY, _PORT = "198.51.100.10", 4433
_ECHO_IP, _ECHO_PORT = ipaddress.IPv4Address("10.100.0.1"), 9999
_USER_PORT = 5000
_SETTLING = 2.0  # s for the connector to register before the agent's time begins
_PROBE_INTERVAL = 0.05  # s; our choice: about a round trip
# Credentials are given directly; nothing reads these.
_NO_FILES = IdentityFiles(Path("none.crt"), Path("none.key"), Path("none.ca"))


@attrs.frozen
class Nodes:
    """Certificates of three nodes, for any number of deployments."""

    intermediate: Credentials
    connector: Credentials
    agent: Credentials

    @classmethod
    def create(cls) -> "Nodes":
        """Make a CA, use it, and forget it."""
        now = datetime.datetime.now(datetime.UTC)
        with tempfile.TemporaryDirectory() as folder:
            authority = create_authority(Path(folder), _TRUST_DOMAIN, now)
        return cls(
            _credentials(authority, Role.INTERMEDIATE, "relay", now, _RELAY),
            _credentials(authority, Role.CONNECTOR, _CONNECTOR, now),
            _credentials(authority, Role.AGENT, _AGENT, now),
        )


@attrs.define
class PathTimes:
    """Virtual seconds from the agent's start. answer: to the first one from the echo; None: there
    was none. direct: to the direct path that is in use at the end; None: it is no direct one."""

    answer: float | None = None
    direct: float | None = None


def measure_paths(
    nodes: Nodes,
    agent_nat: NatSpec,
    connector_nat: NatSpec,
    uplink: LinkSpec,
    patience: float,
    *,
    verbose: bool = False,
) -> PathTimes:
    """Start a deployment behind these NATs and ask its echo, until a direct path is in use; or, if
    the agent names none, until the first answer; or for `patience` virtual seconds.

    uplink: what the link between each NAT and the internet does. verbose: show what is logged, not
    only errors.
    """
    measure = partial(_measure, nodes, agent_nat, connector_nat, uplink, patience, verbose)
    return trio.run(measure, clock=MockClock(autojump_threshold=0))


async def _measure(
    nodes: Nodes,
    agent_nat: NatSpec,
    connector_nat: NatSpec,
    uplink: LinkSpec,
    patience: float,
    verbose: bool,
) -> PathTimes:
    times, begin = PathTimes(), 0.0
    named, direct = False, trio.Event()

    def path_selected(words: str) -> None:
        nonlocal named, direct
        named = True
        if not words.startswith(DIRECT):
            times.direct, direct = None, trio.Event()
        elif times.direct is None:
            times.direct = trio.current_time() - begin
            direct.set()

    async with open_lab() as lab:
        relay = lab.host(_RELAY)
        agent, connector = (_behind(lab, nat, uplink) for nat in (agent_nat, connector_nat))
        with _paths_of_agent(path_selected, verbose=verbose):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_run_intermediate, relay, nodes)
                nursery.start_soon(_run_connector, connector, nodes)
                await trio.sleep(_SETTLING)
                begin = trio.current_time()
                with trio.move_on_after(patience):
                    user = _User()
                    nursery.start_soon(_run_agent, agent, nodes, user)
                    await user.ask_until_answered()
                    times.answer = trio.current_time() - begin
                    nursery.start_soon(user.ask_for_ever)
                    while named and times.direct is None:
                        await direct.wait()
                nursery.cancel_scope.cancel()
    return times


@contextmanager
def _paths_of_agent(tell: Callable[[str], None], *, verbose: bool) -> Iterator[None]:
    """Give what the agent logs of its paths to `tell`; of all that is logged, show errors only."""

    def watch(_: object, method: str, event: EventDict) -> EventDict:
        words = str(event["event"])
        if event.get("node") == _AGENT and words.startswith(PATH):
            tell(words)
        if not verbose and getattr(logging, method.upper()) < logging.ERROR:
            raise structlog.DropEvent
        return event

    before = structlog.get_config()
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, watch, *before["processors"]],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.DEBUG if verbose else logging.INFO
        ),
    )
    try:
        yield
    finally:
        structlog.configure(**before)


def _behind(lab: MemoryLab, nat: NatSpec, uplink: LinkSpec) -> MemoryLabHost:
    gateway = lab.gateway(nat)
    lab.set_link(gateway, uplink)
    return lab.host(behind=gateway)


async def _run_intermediate(host: MemoryLabHost, nodes: Nodes) -> None:
    policy = (
        PolicyRule(f"agent/{_AGENT}", services=("echo",)),
        PolicyRule(f"connector/{_CONNECTOR}", provides=("echo",)),
    )
    config = IntermediateConfig(_NO_FILES, policy=policy)
    async with host.open_udp_port(_PORT) as port:
        await run_intermediate(config, port, nodes.intermediate, AddressBook(config.tunnel_range))


async def _run_connector(host: MemoryLabHost, nodes: Nodes) -> None:
    services = (ConnectorService("echo", ("127.0.0.1", _ECHO_PORT), _ECHO_IP),)
    config = ConnectorConfig(IntermediateAddress(_RELAY, _PORT), _NO_FILES, services)
    async with host.open_udp_port() as port:
        await run_connector(config, port, nodes.connector, _EchoDialer())


async def _run_agent(host: MemoryLabHost, nodes: Nodes, user: "_User") -> None:
    # Whose log it is, for this task and all below it.
    structlog.contextvars.bind_contextvars(node=_AGENT)
    services = (AgentService("echo", _ECHO_IP),)
    config = AgentConfig(IntermediateAddress(_RELAY, _PORT), _NO_FILES, services)
    async with host.open_udp_port() as port:
        await run_agent(config, port, user.tun, nodes.agent, user.configure)


@attrs.define(eq=False)
class _User:
    """A program on the agent's machine, which asks the echo."""

    tun: MemoryTun = attrs.field(factory=MemoryTun)
    _address: ipaddress.IPv4Address | None = None
    _configured: trio.Event = attrs.field(factory=trio.Event)

    @asynccontextmanager
    async def configure(self, address: ipaddress.IPv4Address) -> AsyncIterator[None]:
        """Take the tunnel address that the agent was given."""
        self._address = address
        self._configured.set()
        yield

    async def ask_for_ever(self) -> None:
        """Be a program whose packets use whatever path there is."""
        while True:
            await self.ask_until_answered()
            await trio.sleep(_PROBE_INTERVAL)

    async def ask_until_answered(self) -> None:
        """Wait for the address, then send packet after packet until one from the echo comes."""
        await self._configured.wait()
        assert self._address is not None
        question = build_udp_packet(
            self._address.packed, _ECHO_IP.packed, _USER_PORT, _ECHO_PORT, b"?"
        )
        while True:
            self.tun.host_send([question])
            with trio.move_on_after(_PROBE_INTERVAL):
                while True:
                    for packet in await self.tun.host_receive():
                        if _is_answer(bytes(packet.data)):
                            return


def _is_answer(packet: bytes) -> bool:
    """Whether it is the echo's, and not an ICMP error while services are not yet registered."""
    header = parse_ip_untrusted(packet)
    return header.protocol == UDP and header.source == _ECHO_IP.packed


@attrs.define(eq=False)
class _Echo:
    """A connected UDP socket whose backend sends everything back."""

    _answers: deque[Datagram] = attrs.field(factory=deque)
    _arrived: trio.Event = attrs.field(factory=trio.Event)

    async def receive(self) -> Sequence[Datagram]:
        """Wait for what was sent."""
        await self._arrived.wait()
        self._arrived = trio.Event()
        answers = list(self._answers)
        self._answers.clear()
        return answers

    def send_nowait(self, datagrams: Sequence[Datagram]) -> int:
        """Take it; nothing is dropped, as few packets are ever asked."""
        self._answers += datagrams
        self._arrived.set()
        return 0

    def close(self) -> None:
        """Nothing to close."""


class _EchoDialer:
    """The connector's way to its backends: a UDP echo at every address, and nothing by TCP."""

    async def open_stream(self, address: Address) -> trio.abc.HalfCloseableStream:
        """Refuse."""
        await trio.lowlevel.checkpoint()
        raise ConnectionRefusedError(f"{address} has a UDP echo only")

    async def open_datagrams(self, address: Address) -> DatagramSocket:
        """The echo."""
        assert address[1] == _ECHO_PORT
        await trio.lowlevel.checkpoint()
        return _Echo()


def _credentials(
    authority: Authority, role: Role, name: str, now: datetime.datetime, *ips: str
) -> Credentials:
    identity = Identity(_TRUST_DOMAIN, role, name)
    key = ec.generate_private_key(ec.SECP256R1())
    addresses = tuple(ipaddress.ip_address(ip) for ip in ips)
    certificate = authority.issue(Request(identity, key.public_key(), ips=addresses), now)
    ends = certificate.not_valid_after_utc
    return Credentials(certificate, (), key, (authority.certificate,), identity, ends)
