"""Direct paths of real processes behind NATs in the kernel: found, cut, and found again."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.conftest import reason_to_skip
from tests.lab.echo_stream import EchoStream
from ztna.nat.applications import ECHO_PORT
from ztna.nat.deployment import DIRECT, LoggedProcess
from ztna.nat.site import ECHO_IP, Site, open_site, prepare
from ztna.nat.spec import PORT_RESTRICTED

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
]

RELAYED = "Path selected: RELAY"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder: Path = tmp_path_factory.mktemp("direct")
    with open_site(prepare(folder), PORT_RESTRICTED, PORT_RESTRICTED) as found:
        found.start()
        yield found


def roles(site: Site) -> list[LoggedProcess]:
    """Connector and agent."""
    return [each for each in site.files.deployment.processes if "intermediate" not in each.name]


def test_direct_then_cut_then_direct(site: Site) -> None:
    """Begins on the relay; both log each change; a cut costs less than a second and a half, the
    machine's own delays included."""
    for role in roles(site):
        role.wait_for(RELAYED)
        role.wait_for(DIRECT)
    home, office = site.lab.gateways
    with EchoStream(site.agent, (ECHO_IP, ECHO_PORT)) as pings:
        time.sleep(2)
        cut_at = time.monotonic()
        home.outside.block(office.address)
        for role in roles(site):
            role.wait_for(RELAYED, times=2)
        assert time.monotonic() - cut_at < 3
        time.sleep(2)
        assert pings.longest_gap(cut_at) < 1.5
        home.outside.unblock(office.address)
        mended_at = time.monotonic()
        for role in roles(site):
            role.wait_for(DIRECT, deadline=45, times=2)
        time.sleep(1)
        # The way back costs nothing.
        assert pings.longest_gap(mended_at) < 0.7


def test_intermediate_stops_while_direct(site: Site) -> None:
    """The proof that no packet needs it."""
    for role in roles(site):
        role.wait_for(DIRECT)
    (intermediate,) = [
        each for each in site.files.deployment.processes if "intermediate" in each.name
    ]
    with EchoStream(site.agent, (ECHO_IP, ECHO_PORT)) as pings:
        time.sleep(1)
        intermediate.kill()
        killed_at = time.monotonic()
        time.sleep(4)
        assert pings.longest_gap(killed_at) < 0.7
