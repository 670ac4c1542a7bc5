"""How long a role takes to end: by one SIGTERM, with goodbyes, and by a second one, at once.

And what a replaced identity does: it waits for 30 s.
"""

import signal
import statistics
import time

import attrs

from scripts.lab.deployment import REGISTERED
from scripts.lab.recovery_site import SERVICES, RecoverySite

HEAD = (
    "| SIGTERM | runs | one: median s | worst s | two: median s | worst s | exit code |"
    "\n|---|---|---|---|---|---|---|"
)
_REPLACED_DEADLINE = 60.0  # s


@attrs.frozen
class Stopped:
    """Seconds until the end of a role, by one signal and by two."""

    role: str
    once: list[float]
    twice: list[float]
    codes: list[int]

    def row(self) -> str:
        """A line of the table."""
        return (
            f"| {self.role} | {len(self.once)} | {statistics.median(self.once):.2f} | "
            f"{max(self.once):.2f} | {statistics.median(self.twice):.2f} | "
            f"{max(self.twice):.2f} | {', '.join(map(str, sorted(set(self.codes))))} |"
        )


def measure(site: RecoverySite, role: str, runs: int) -> Stopped:
    """End a role by SIGTERM many times, alternately by one and by two of them."""
    once: list[float] = []
    twice: list[float] = []
    codes: list[int] = []
    for _ in range(runs):
        for results, signals in ((once, 1), (twice, 2)):
            process = site.roles[role]
            begin = time.monotonic()
            for _ in range(signals):
                process.process.send_signal(signal.SIGTERM)
                time.sleep(0.002)
            code = process.wait()
            results.append(time.monotonic() - begin)
            if signals == 1:
                codes.append(code)
            site.start(role)
    return Stopped(role, once, twice, codes)


def replaced_identity(site: RecoverySite) -> str:
    """Start a second agent with the first one's identity; say how long the first one waits."""
    first = site.roles["agent"]
    before = first.output().count(REGISTERED)
    second = site.deployment.run(site.second, "agent", site.files["agent"])
    second.wait_for(REGISTERED, times=len(SERVICES))
    begin = time.monotonic()
    first.wait_for(REGISTERED, deadline=_REPLACED_DEADLINE, times=before + len(SERVICES))
    waited = time.monotonic() - begin
    second.kill()
    return f"A replaced agent came back after {waited:.1f} s (30 s are asked for)."
