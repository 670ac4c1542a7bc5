"""What `scripts.lab.failover` has found, as a table and as a page."""

import datetime
import math
import os
import platform
import statistics
from collections.abc import Sequence

import attrs

from scripts.lab.failover_figures import Figures
from scripts.lab.recovery_probes import wall_clock


@attrs.define
class Result:
    """One scenario, or its mending. Lists have one entry a run; times in s.

    gaps, download_gaps: the longest silence. sent, lost_out, lost_back: packets of the stream.
    relayed: until both sides said that packets go by the relay, where they did; direct: until both
    were on a direct path for good. ended: why TCP connections ended early. whole: downloads whose
    checksum was right. survives, lossless, bound: what is asked for; the bound is of p95.
    """

    name: str
    survives: bool
    lossless: bool
    bound: float
    gaps: list[float] = attrs.Factory(list)
    download_gaps: list[float] = attrs.Factory(list)
    sent: list[int] = attrs.Factory(list)
    lost_out: list[int] = attrs.Factory(list)
    lost_back: list[int] = attrs.Factory(list)
    relayed: list[float] = attrs.Factory(list)
    direct: list[float] = attrs.Factory(list)
    loads: list[float] = attrs.Factory(list)
    ended: list[str] = attrs.Factory(list)
    whole: int = 0
    notes: list[str] = attrs.Factory(list)

    @property
    def lost(self) -> list[int]:
        """Packets without an answer, a run."""
        return [out + back for out, back in zip(self.lost_out, self.lost_back, strict=True)]

    def row(self) -> str:
        """A line of the table."""
        cells = [self.name, str(len(self.gaps))]
        cells += [_three(self.gaps), _three(self.download_gaps) if self.survives else "-"]
        cells += [_lost(self.lost), _lost(self.lost_out), _lost(self.lost_back)]
        cells += [_two(self.relayed), _two(self.direct), self._connections()]
        load = statistics.mean(self.loads) if self.loads else math.nan
        return f"| {' | '.join([*cells, f'{load:.1f}'])} |"

    def complaints(self) -> list[str]:
        """What is worse than what is asked for, in words."""
        words = list(self.notes)
        if not self.gaps:
            words.append("no run")
        elif quantile(self.gaps, 0.95) > self.bound:
            words.append(f"gap p95 {quantile(self.gaps, 0.95):.2f} s, over {self.bound:.0f} s")
        if self.survives and self.download_gaps:
            worst = quantile(self.download_gaps, 0.95)
            if worst > 2:
                words.append(f"download p95 {worst:.2f} s")
            if self.ended or not self.whole:
                words.append(self._connections())
        if self.lossless and any(self.lost):
            words.append(f"{sum(self.lost)} packets lost")
        return [f"{self.name}: {each}" for each in words]

    def _connections(self) -> str:
        if not self.survives:
            return "the connector's own, as they must"
        if self.ended:
            return f"{len(self.ended)}: {', '.join(sorted(set(self.ended)))}"
        return "none; checksum right" if self.whole else "none; NOT READ TO THE END"


HEAD = (
    "| what happens | runs | gap: p50, p95, worst s | download: p50, p95, worst s "
    "| packets lost: p50, worst | of them out | back | both by relay after: p50, worst s "
    "| both direct after: p50, worst s | connections lost | load |\n" + "|---" * 11 + "|"
)


def table(results: Sequence[Result], *, head: bool = True) -> str:
    """The lines, with their titles."""
    return "\n".join([*[HEAD] * head, *(result.row() for result in results)])


def page(
    command: str, results: Sequence[Result], figures: Sequence[Figures], seconds: float
) -> str:
    """In Markdown, with how it was made."""
    loads = [load for result in results for load in result.loads]
    bad = [f"- {words}" for result in results for words in result.complaints()]
    parts = [
        "# How users' traffic fares when direct paths break",
        (
            f"`{command}`, {iso(wall_clock())[:16]} UTC, {seconds / 60:.0f} minutes. Linux "
            f"{platform.release()}, Python {platform.python_version()}, {os.cpu_count()} cores, "
            f"which other work used as well: mean load {statistics.mean(loads or [0]):.1f}."
        ),
        __doc_page__.strip(),
        table(results),
        "\n".join(["Worse than what is asked for:", "", *bad]) if bad else "All within the bounds.",
    ]
    if figures:
        parts += ["## Relay against direct path", *(each.words() for each in figures)]
    return "\n\n".join(parts) + "\n"


__doc_page__ = """
Real `ztna` processes in network namespaces; agent and connector behind port-restricted NATs; 20 ms
a link and direction, so 80 ms there and back directly and 160 ms by the relay.

- Under a stream of a packet every 10 ms, there and back, and a download of some 200 kB/s; one TCP
  connection for all scenarios but the last. The scenarios take turns.
- Gap: the longest silence of the stream's answers, from the moment (of a process: when it has
  opened its UDP port) for 3 s, or until both sides have been on the direct path for a second. It
  includes the round trip, which is 80 ms longer by the relay. p95: the value that 95 % of the runs
  keep.
- Packets lost: of the stream, sent in that time, without an answer: out, those that the application
  never saw.
- Bounds: p95 of the gap 1 s for cuts, 2 s for everything else; the download's 2 s.
"""


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of all do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def iso(at: float) -> str:
    """A time for people."""
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat()


def _three(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{quantile(values, 0.5):.2f}, {quantile(values, 0.95):.2f}, {max(values):.2f}"


def _two(values: Sequence[float]) -> str:
    return f"{quantile(values, 0.5):.2f}, {max(values):.2f}" if values else "-"


def _lost(values: Sequence[int]) -> str:
    return f"{quantile(values, 0.5):.0f}, {max(values)}" if values else "-"
