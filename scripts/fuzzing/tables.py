"""Targets with state: the tables that users' packets fill."""

import ipaddress
import itertools
from collections.abc import Callable

from scripts.fuzzing.examples import SERVICE4, SERVICE6, USER4, USER6
from ztna.core.encapsulation import ServiceLabel
from ztna.core.flow import FlowActive, FlowBroken, FlowOpened, OfferedService, TcpFlow, UdpFlow
from ztna.core.flows import FlowTable
from ztna.core.identity import Identity, Role
from ztna.core.outbound import OutboundTable
from ztna.core.policy import Policy, PolicyRule
from ztna.core.ports import IpPacket
from ztna.core.registry import Client, Registry
from ztna.core.relay import Relay
from ztna.core.routes import RouteTable, ServiceRoute
from ztna.core.tcp.state import TcpConfig
from ztna.core.wire import FEATURES

Parser = Callable[[bytes], object]


def _tcp_config(ipv6: bool) -> TcpConfig:
    return TcpConfig(mss=1101 if ipv6 else 1121)


def make_flows() -> Parser:
    """The connector's flow table, with a backend that accepts everything."""
    table = FlowTable(
        {"web": OfferedService("web", ports=frozenset({80}))},
        ipaddress.IPv4Network("10.100.0.0/24"),
        _tcp_config,
        lambda _key, _now: (7000, 0),
    )
    times = itertools.count()

    def parse(data: bytes) -> None:
        now = next(times) * 0.01
        table.receive_packets([("web", IpPacket(data))], now)
        while (event := table.next_event()) is not None:
            match event:
                case FlowBroken(_, error):
                    raise error
                case FlowOpened(TcpFlow() as flow):
                    table.connect_finished(flow)
                    flow.connection.establish(now)
                    table.touch(flow, now)
                case FlowActive(TcpFlow() as flow) if flow.connection.readable:
                    flow.connection.read(1 << 20)
                    table.touch(flow, now)
                case FlowActive(UdpFlow() as flow):
                    table.send_datagrams(flow, list(flow.inbox), now)
                    flow.inbox.clear()
        table.packets_to_send(now, 1 << 20)

    return parse


def make_outbound() -> Parser:
    """The table of an agent without a TUN, with three flows open."""
    table = OutboundTable(_tcp_config, bytes(16))
    table.set_address(ipaddress.IPv4Address(USER4), 0.0)
    table.open_tcp("web", SERVICE4, 80, 0.0)
    table.open_tcp("web", SERVICE6, 80, 0.0)
    table.open_udp("web", SERVICE4, 80, 0.0)
    own = [bytes(packet.data) for packet in table.packets_to_send(0.0, 1 << 20)]
    times = itertools.count()

    def parse(data: bytes) -> None:
        now = next(times) * 0.001
        # As often as not for a flow that is there: its port is random.
        if own and len(data) > 24 and data[:1] == b"\x45":
            data = data[:22] + own[0][20:22] + data[24:]
        table.receive_packets([IpPacket(data)], now)
        while (event := table.next_event()) is not None:
            if isinstance(event, FlowBroken):
                raise event.error
        table.packets_to_send(now, 1 << 20)

    return parse


# Bytes of the largest packet of a session that cuts nothing by itself: less than the corpus has, so
# that such packets are cut.
_SMALL_SESSION = 60


def make_routes() -> Parser:
    """The agent's filter, both ways."""
    table = RouteTable.of([ServiceRoute("web", ipaddress.IPv4Address(SERVICE4))])
    table.set_addresses([ipaddress.IPv4Address(USER4)])
    table.set_labels({"web": ServiceLabel("web", 1)})

    def parse(data: bytes) -> None:
        table.largest_packet = 0
        table.route_outbound([IpPacket(data)], 0.0)
        table.largest_packet = _SMALL_SESSION
        table.route_outbound([IpPacket(data)], 0.0)
        table.route_inbound([(1, IpPacket(data)), ("web", IpPacket(data)), (None, IpPacket(data))])

    return parse


def relay_maker(sender: str) -> Callable[[], Parser]:
    """A relay between agent 'a' and connector 'c'; the sender is hostile."""

    def make() -> Parser:
        policy = Policy.of(
            "example.net",
            [PolicyRule("agent/*", services=("*",)), PolicyRule("connector/*", provides=("*",))],
        )
        relay = Relay(Registry(policy))
        clients = {}
        for key, (role, name) in enumerate(((Role.AGENT, "a"), (Role.CONNECTOR, "c"))):
            client = Client(key, Identity("example.net", role, name), 1170)
            relay.registry.add(client)
            client.features, client.speaks_control = FEATURES, True
            relay.add(client)
            relay.registry.register(client, "web")
            clients[name] = client
        relay.registry.assign_addresses(clients["a"], frozenset([USER4, USER6]))
        times = itertools.count()

        def parse(data: bytes) -> None:
            outgoing = relay.receive_messages(clients[sender], [data], next(times) * 0.01)
            for target, batch in outgoing.items():
                assert all(len(message) <= target.max_size for message in batch)

        return parse

    return make
