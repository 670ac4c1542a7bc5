"""Real processes behind two symmetric NATs: direct, as the connector's gateway maps its port, or
its router opens the firewall of IPv6."""

import json
from pathlib import Path

import attrs
import pytest

from tests.lab.conftest import reason_to_skip
from tests.lab.mtu_site import second_uplink
from tests.nat.miniupnpd import (
    MISSING,
    OUTER,
    PROGRAM,
    installed_rules,
    miniupnpd,
    open_pinholes,
    pinholes,
)
from ztna.nat.deployment import DIRECT
from ztna.nat.site import open_site, prepare
from ztna.nat.spec import OPEN, SYMMETRIC

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


def test_direct_through_a_pinhole(tmp_path: Path) -> None:
    """Over IPv6, from behind a NAT whose ports nobody can know, and nobody guesses them: without
    the pinhole the firewall before the connector lets none of the agent's packets in."""
    files = prepare(tmp_path)
    no_guesses = {"direct": {"birthday": False, "predict": False}}
    files.agent.write_text(json.dumps({**json.loads(files.agent.read_text()), **no_guesses}))
    files.intermediate.write_text(
        json.dumps({**json.loads(files.intermediate.read_text()), "bind": "::"})
    )
    files = attrs.evolve(files, connector={**files.connector, **no_guesses})
    with open_site(files, SYMMETRIC, SYMMETRIC) as site:
        second_uplink(site.lab, site.agent, SYMMETRIC)
        router, address = second_uplink(site.lab, site.connector, OPEN)
        router.namespace.ip(f"addr add {OUTER}/24 dev wan")
        with pinholes(router.namespace, "link1", tmp_path):
            site.start()
            agent, connector = (
                next(each for each in files.deployment.processes if name in each.name)
                for name in ("agent", "connector")
            )
            agent.wait_for(DIRECT)
            connector.wait_for(DIRECT)
            line = next(text for text in agent.output().splitlines() if DIRECT in text)
            assert f"(peer: [{address}]:4434)" in line
            assert open_pinholes(router.namespace).count("dport 4434") == 1
            assert site.wait_for_answer(5) is not None
            connector.stop()
            assert "dport" not in open_pinholes(router.namespace)
