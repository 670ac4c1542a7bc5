"""A network that blocks UDP: an agent works over TLS."""

import contextlib
from collections.abc import Iterator

import pytest

from tests.lab.conftest import ECHO, RELAY_ADDRESS, WEB, Site, reason_to_skip
from tests.lab.test_tunnel import curl, echo, udp_socket
from ztna.nat.deployment import LoggedProcess

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
]

OVER_TLS = "session over TLS"


def block(site: Site, verdict: str) -> None:
    """As the firewall of an office: nothing but TCP reaches the relay."""
    site.home.outside.namespace.nft(
        "table inet office { chain forward { type filter hook forward priority -200; "
        f"ip daddr {RELAY_ADDRESS} meta l4proto udp {verdict}; "
        f"ip saddr {RELAY_ADDRESS} meta l4proto udp drop; }}; }}"
    )


def unblock(site: Site) -> None:
    site.home.outside.namespace.nft("add table inet office\ndelete table inet office")


@contextlib.contextmanager
def blocked_agent(site: Site, verdict: str) -> Iterator[LoggedProcess]:
    """An agent that has never seen UDP pass; nothing but its TLS makes it ready."""
    block(site, verdict)
    file = site.deployment.node("agent", "visitor") / "agent.json"
    agent = site.start_agent(site.guest, file if file.exists() else site.agent_file("visitor"))
    try:
        yield agent
    finally:
        unblock(site)
        assert agent.stop() == 0


def test_services_work(site: Site) -> None:
    with blocked_agent(site, "drop") as agent:
        assert OVER_TLS in agent.output()
        assert '"value"' in curl(site.guest, f"http://{WEB}/get?name=value")
        with udp_socket(site.guest, (ECHO, 9999)) as udp:
            echo(udp, bytes(60_000))
