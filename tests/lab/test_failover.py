"""Direct paths of real processes break under a stream and a download: no connection is lost.

One run of what `scripts/failover` does many times, without its delays.
"""

from collections.abc import Iterator

import pytest

from scripts.lab.failover import measure
from scripts.lab.failover_scenarios import SCENARIOS, Scenario
from scripts.lab.failover_site import FailoverSite, build
from tests.lab.conftest import reason_to_skip
from ztna.nat.kernel_nat import KernelNatLab

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
]

BOUND = 2.0  # s; the for a change of the uplink; a cut takes half
# Enough for what a slow download brings during one run.
FILE_BYTES = 2 << 20
CHOSEN = (
    "cut from connector to agent",
    "agent's NAT forgets, other ports",
    "connector's NAT forgets, other ports",
    "agent's uplink changed",
    "agent killed, started at once",
    "connector killed, started at once",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FailoverSite]:
    with KernelNatLab() as lab:
        yield build(lab, tmp_path_factory.mktemp("failover"), FILE_BYTES, delay=0.0)


@pytest.mark.parametrize(
    "scenario", [each for each in SCENARIOS if each.name in CHOSEN], ids=lambda each: each.name
)
def test_traffic_goes_on(site: FailoverSite, scenario: Scenario) -> None:
    """And takes a direct path again by itself."""
    for result in measure(site, [scenario], 1):
        assert result.notes == []
        assert max(result.gaps) < BOUND
        if scenario.survives:
            assert max(result.download_gaps) < BOUND
            assert result.ended == []
            assert result.whole > 0
    assert site.all_direct()
