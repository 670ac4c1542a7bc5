"""What the processes of a long run hold: memory, descriptors, threads, tasks, their statistics."""

import contextlib
import itertools
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs

from scripts.lab.deployment import LoggedProcess

_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
# A line of the statistics that a role prints on SIGUSR1.
_ROW = re.compile(r"^([a-z][\w.]*)  +(-?\d+(?:\.\d+)?)$", re.M)


@attrs.frozen
class Sample:
    """One look at a process. at: time.monotonic(); statistics: of the SIGUSR1 before this one."""

    at: float
    rss_mb: float
    descriptors: int
    threads: int
    cpu_seconds: float
    statistics: Mapping[str, float]


@attrs.define(eq=False)
class Watched:
    """A process and all samples of it."""

    process: LoggedProcess
    number: int
    samples: list[Sample] = attrs.field(factory=list)

    @property
    def name(self) -> str:
        """The role's name; from the second start on with a number."""
        return self.process.name + (f" #{self.number}" if self.number > 1 else "")

    def sample(self) -> None:
        """Take a sample, and ask for the statistics that the next one reads. Nothing, if dead."""
        pid = self.process.pid
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            rss = re.search(r"VmRSS:\s+(\d+) kB", status)
            threads = re.search(r"Threads:\s+(\d+)", status)
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if rss is None or threads is None:
                return  # it has ended, and nobody has waited for it yet
            self.samples.append(
                Sample(
                    time.monotonic(),
                    int(rss[1]) / 1024,
                    len(list(Path(f"/proc/{pid}/fd").iterdir())),
                    int(threads[1]),
                    (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS,
                    self._statistics(),
                )
            )
            os.kill(pid, signal.SIGUSR1)

    def _statistics(self) -> Mapping[str, float]:
        """The newest of each row in the end of the log."""
        with self.process.log.open("rb") as log:
            log.seek(max(0, self.process.log.stat().st_size - 32_768))
            text = log.read().decode(errors="replace")
        return {name: float(value) for name, value in _ROW.findall(text)}

    def after(self, warm_up: float) -> list[Sample]:
        """The samples that are later than the first by `warm_up` seconds."""
        return [s for s in self.samples if s.at >= self.samples[0].at + warm_up]

    def gauges(self) -> Iterator[tuple[str, list[float]]]:
        """The statistics that ever fell, so are no counters: names and values in order."""
        names = {name for sample in self.samples for name in sample.statistics}
        for name in sorted(names):
            values = [s.statistics[name] for s in self.samples if name in s.statistics]
            if any(after < before for before, after in itertools.pairwise(values)):
                yield name, values


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line with the least squares through (seconds, value): value an hour."""
    if len(points) < 2:
        return 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    rise = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return 3_600 * rise / spread if spread else 0.0
