"""Processes die and networks change: users' traffic is back within two seconds, by itself.

One run of what `scripts/recovery` does many times: a ping and a slow download go on meanwhile.
"""

from collections.abc import Iterator

import pytest

from scripts.lab.recovery import BOUND, measure
from scripts.lab.recovery_scenarios import SCENARIOS, Scenario
from scripts.lab.recovery_site import FILES, RecoverySite, build
from tests.lab.conftest import reason_to_skip
from ztna.nat.kernel_lab import KernelLab

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
]

# Enough for all that a slow download brings during one run.
FILE_BYTES = 8 << 20
CHOSEN = (
    "intermediate killed, started at once",
    "connector killed, started at once",
    "agent killed, started at once",
    "agent's address changed",
    "agent moved to another gateway",
    "agent's cable pulled for 3 s",
    "NAT forgets, other ports",
    "intermediate frozen for 3 s",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecoverySite]:
    if reason := reason_to_skip():
        pytest.skip(reason)
    with KernelLab() as lab:
        yield build(lab, tmp_path_factory.mktemp("recovery"), FILE_BYTES)


@pytest.mark.parametrize(
    "scenario", [each for each in SCENARIOS if each.name in CHOSEN], ids=lambda each: each.name
)
def test_traffic_is_back(site: RecoverySite, scenario: Scenario) -> None:
    result = measure(site, scenario, 1)
    # The bound is the issue's. Measured: 0.5 s at worst on two idle cores.
    assert max(result.gaps) < BOUND
    if scenario.survives:
        assert max(result.download_gaps) < BOUND
        assert (result.broken, result.whole) == ([], 1)


def test_stopped_connector_is_refused_at_once(site: RecoverySite) -> None:
    """With a goodbye: nobody waits for a connector that left in order."""
    process = site.roles["connector"]
    assert process.stop() == 0
    words = ("curl", "-sS", "--max-time", "1", f"http://{FILES}/download")
    assert site.agent.run(*words, check=False).returncode == 7  # could not connect
    site.start("connector")
