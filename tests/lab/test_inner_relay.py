"""A firewall that passes QUIC and drops the relay's raw packets: the relay goes inside the session,
under load, and comes back."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.conftest import ECHO, RELAY_ADDRESS, WEB, Site, reason_to_skip
from tests.lab.test_tunnel import curl, echo, udp_socket
from tests.lab.test_udp_blocked import CHANGED, download

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
]

FALLEN = "the relay runs inside the control session"
RAISED = "the relay takes raw packets again"


def drop_raw(site: Site) -> None:
    """UDP payloads that begin with 0x80, both ways."""
    site.home.outside.namespace.nft(
        "table inet strict { chain forward { type filter hook forward priority -200; "
        f"ip daddr {RELAY_ADDRESS} udp dport 4433 @th,64,8 0x80 counter drop; "
        f"ip saddr {RELAY_ADDRESS} udp sport 4433 @th,64,8 0x80 counter drop; }}; }}"
    )


def pass_raw(site: Site) -> None:
    site.home.outside.namespace.nft("add table inet strict\ndelete table inet strict")


@pytest.fixture
def relayed_only(site: Site) -> Iterator[None]:
    """No direct path: what is not the relay's is dropped."""
    site.home.outside.namespace.nft(
        "table inet nobody { chain forward { type filter hook forward priority -200; "
        f"ip daddr != {RELAY_ADDRESS} ip saddr != {RELAY_ADDRESS} meta l4proto udp drop; }}; }}"
    )
    yield
    pass_raw(site)
    site.home.outside.namespace.nft("delete table inet nobody")


def test_the_relay_goes_inside_and_comes_back(
    site: Site, relayed_only: None, tmp_path: Path
) -> None:
    drop_raw(site)
    agent = site.start_agent(site.guest, site.agent_file("visitor"))
    try:
        agent.wait_for(FALLEN, CHANGED)
        assert '"value"' in curl(site.guest, f"http://{WEB}/get?name=value")
        with udp_socket(site.guest, (ECHO, 9999)) as udp:
            echo(udp, bytes(60_000))
        with download(site, tmp_path / "first"):
            pass_raw(site)
            agent.wait_for(RAISED, CHANGED)
        with download(site, tmp_path / "second"):
            drop_raw(site)
            agent.wait_for(FALLEN, CHANGED, times=2)
    finally:
        assert agent.stop() == 0
