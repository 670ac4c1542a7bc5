"""Real processes behind two symmetric NATs: direct, as the connector's gateway maps its port."""

from pathlib import Path

import pytest

from tests.lab.conftest import reason_to_skip
from tests.nat.miniupnpd import MISSING, OUTER, PROGRAM, installed_rules, miniupnpd
from ztna.nat.deployment import DIRECT
from ztna.nat.site import open_site, prepare
from ztna.nat.spec import SYMMETRIC

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
    pytest.mark.skipif(PROGRAM is None, reason=MISSING),
]


@pytest.mark.parametrize("upnp", [False, True], ids=["PCP", "UPnP"])
def test_direct_through_a_mapped_port(tmp_path: Path, upnp: bool) -> None:
    """And the mapping is gone when the connector has stopped."""
    with open_site(prepare(tmp_path), SYMMETRIC, SYMMETRIC) as site:
        _, office = site.lab.gateways
        office.rebind(OUTER)
        with miniupnpd(office.namespace, office.pool.router, tmp_path, upnp=upnp):
            site.start()
            processes = site.files.deployment.processes
            agent, connector = (
                next(each for each in processes if name in each.name)
                for name in ("agent", "connector")
            )
            agent.wait_for(DIRECT)
            connector.wait_for(DIRECT)
            line = next(text for text in agent.output().splitlines() if DIRECT in text)
            assert f"(peer: {OUTER}:" in line
            assert site.connector.address in installed_rules(office.namespace)
            connector.stop()
            assert "dnat" not in installed_rules(office.namespace)
