"""Real processes with IPv6 beside IPv4: where NATs of IPv4 let nobody in, IPv6 goes through the
firewalls on both sides."""

import json
from pathlib import Path

import pytest

from tests.lab.conftest import reason_to_skip
from tests.lab.mtu_site import second_uplink
from ztna.nat.deployment import DIRECT
from ztna.nat.site import open_site, prepare
from ztna.nat.spec import FIREWALL, SYMMETRIC

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
]


def test_direct_over_ipv6_through_two_firewalls(tmp_path: Path) -> None:
    """The control sessions run over IPv4, to an intermediate that serves both."""
    files = prepare(tmp_path)
    config = json.loads(files.intermediate.read_text())
    files.intermediate.write_text(json.dumps({**config, "bind": "::"}))
    with open_site(files, SYMMETRIC, SYMMETRIC) as site:
        addresses = {
            name: second_uplink(site.lab, site.hosts[name], FIREWALL)[1]
            for name in ("agent", "connector")
        }
        site.start()
        for name, peer in (("agent", "connector"), ("connector", "agent")):
            (role,) = [each for each in files.deployment.processes if name in each.name]
            role.wait_for(DIRECT)
            line = next(text for text in role.output().splitlines() if DIRECT in text)
            assert f"(peer: [{addresses[peer]}]:" in line
        assert site.wait_for_answer(5) is not None
