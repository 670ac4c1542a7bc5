"""What lets flows go on after a session has begun anew: the agent asks, the connector is taken."""

import ipaddress

import pytest

from ztna.core.addresses import twin
from ztna.core.encapsulation import ServiceLabel
from ztna.core.identity import Identity, Role
from ztna.core.packet.icmp import build_echo, echo_reply
from ztna.core.packet.ip import ICMP, ICMPV6, parse_ip_untrusted
from ztna.core.policy import Policy, PolicyRule
from ztna.core.registry import Client, Registry
from ztna.core.routes import RouteTable, ServiceRoute

OWN = ipaddress.IPv4Address("10.100.64.1")
ECHO = ipaddress.IPv4Address("10.100.0.1")
WEB = ipaddress.IPv4Address("10.100.0.2")
LABELS = {"echo": ServiceLabel("echo", 1), "web": ServiceLabel("web", 2)}


@pytest.mark.parametrize(
    ("source", "destination", "protocol"),
    [(OWN, ECHO, ICMP), (twin(OWN), twin(ECHO), ICMPV6)],
)
def test_echo_request(
    source: ipaddress.IPv4Address | ipaddress.IPv6Address,
    destination: ipaddress.IPv4Address | ipaddress.IPv6Address,
    protocol: int,
) -> None:
    request = build_echo(source.packed, destination.packed, 0x1234, b"data")
    header = parse_ip_untrusted(request)
    assert (header.source, header.destination) == (source.packed, destination.packed)
    assert header.protocol == protocol
    assert request[header.header_size + 4 :] == b"\x12\x34\0\0data"
    reply = echo_reply(request)  # which checks the checksum
    assert reply is not None
    assert reply[header.header_size + 4 :] == b"\x12\x34\0\0data"


def table() -> RouteTable:
    table = RouteTable.of([ServiceRoute("echo", ECHO), ServiceRoute("web", WEB)])
    table.set_addresses([OWN])
    table.set_labels(LABELS)
    return table


def test_each_address_of_a_registered_service_is_asked_once() -> None:
    """Also before anything was sent: connections may be older than this agent."""
    routes = table()
    for _ in range(2):
        echoes = routes.echoes(["echo"])
        assert [label for label, _ in echoes] == [LABELS["echo"]] * 2
        headers = [parse_ip_untrusted(packet.data) for _, packet in echoes]
        assert [(h.source, h.destination) for h in headers] == [
            (OWN.packed, ECHO.packed),
            (twin(OWN).packed, twin(ECHO).packed),
        ]
    assert len(routes.echoes(["echo", "web"])) == 4
    routes.set_labels({"web": LABELS["web"]})
    assert [label.id for label, _ in routes.echoes(["echo", "web"])] == ["web"] * 2


def client(key: int, role: Role, name: str) -> Client:
    return Client(key, Identity("example.net", role, name), 1170)


def test_route_without_a_connector_takes_one_that_speaks() -> None:
    rules = [PolicyRule("agent/*", services=("*",)), PolicyRule("connector/*", provides=("*",))]
    registry = Registry(Policy.of("example.net", rules))
    agent = client(1, Role.AGENT, "laptop")
    home, spare, other = (
        client(key, Role.CONNECTOR, name) for key, name in enumerate(("home", "spare", "other"), 2)
    )
    for node in (agent, home, spare, other):
        registry.add(node)
    registry.register(agent, "echo")
    registry.register(home, "echo")
    registry.register(spare, "echo")
    registry.register(other, "web")
    route = agent.routes["echo"]
    assert not registry.serves(other, route)
    assert other.serves == 0
    assert registry.serves(spare, route)
    assert spare.serves == 1
    assert registry.serves(spare, route)
    assert spare.serves == 1
    assert not registry.serves(home, route)
    registry.remove(spare)
    assert not registry.serves(spare, route)
    assert registry.serves(home, route)
