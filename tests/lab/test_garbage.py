"""Garbage at full speed on every port: what is up stays up, memory is flat, nothing is amplified.

Five seconds of what `scripts/abuse` does for a minute each.
"""

from collections.abc import Iterator

import attrs
import pytest

from scripts.lab.abuse import Flood, floods_on, measure, show
from scripts.lab.recovery_site import RecoverySite, build
from tests.lab.conftest import reason_to_skip
from ztna.nat.kernel_lab import KernelLab

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
]

SECONDS = 5
FILE_BYTES = 4 << 20
# Tables that are full once, and the kernel's pages of the socket's buffer; a leak of one word a
# datagram would be more.
MAX_GROWTH = 32 << 20


@attrs.frozen
class Scene:
    site: RecoverySite
    floods: list[Flood]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    if reason := reason_to_skip():
        pytest.skip(reason)
    with KernelLab() as lab:
        site = build(lab, tmp_path_factory.mktemp("garbage"), FILE_BYTES)
        yield Scene(site, floods_on(site, lab))


@pytest.mark.parametrize("number", range(4))
def test_flood(scene: Scene, number: int) -> None:
    report = measure(scene.site, scene.floods[number], SECONDS)
    assert report.sent > 1000
    # The flood and the roles share two cores: slow is fair, broken or lost is not.
    assert report.downloads >= 1
    assert (report.broken, report.ping_lost, report.registrations) == (0, 0, 0), show(report)
    if report.ratio is not None:
        assert report.ratio <= 3
    assert max(report.growth.values()) < MAX_GROWTH
    # And afterwards all is as before.
    after = measure(scene.site, None, 2)
    assert (after.broken, after.ping_lost, after.registrations) == (0, 0, 0), show(after)
