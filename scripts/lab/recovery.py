"""How fast users' traffic is back: everything that may break is broken, many times over.

Each scenario runs under one ping and one download. A run: wait until the ping is steady, break,
mend, and note the longest silence between 'the peer is back' and three seconds later, of the ping
and of the download. The download's one TCP connection should live through all runs; in the end it
is read to its end, and the checksum compared.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import attrs

from scripts.lab import recovery_stop
from scripts.lab.recovery_big import BigDownload, big_download
from scripts.lab.recovery_parallel import big_of, joined, run_in_parallel, stopped_of
from scripts.lab.recovery_probes import Download, Ping, longest_silence, wall_clock
from scripts.lab.recovery_scenarios import SCENARIOS, Scenario
from scripts.lab.recovery_site import ECHO, FILES, RecoverySite, build
from ztna.nat.kernel_lab import KernelLab, supported

WINDOW = 3.0  # s after the peer is back that are looked at, once the ping answers
BOUND = 2.0  # s; what the measure is compared with
_STEADY = 0.7  # s
# Of the download: longer than any silence that a connection survives, and one that saves time.
_PATIENCE, _SHORT_PATIENCE = 400.0, 4.0  # s
_DEADLINE = 45.0  # s; longer than any idle timeout


@attrs.frozen
class Result:
    """One scenario. gaps, download_gaps, start_ups: seconds, one a run. load: the machine's, of one
    minute, the mean."""

    name: str
    gaps: list[float]
    download_gaps: list[float]
    start_ups: list[float]
    broken: list[str]
    whole: int
    survives: bool
    load: float
    note: str = ""

    def row(self) -> str:
        """A line of the table."""
        if not self.gaps:
            return f"| {self.name} | 0 | - | - | - | - | - | {self.load:.1f} | {self.note} |"
        downloads = "-", "-"
        if self.survives:
            median = statistics.median(self.download_gaps)
            downloads = f"{median:.2f}", f"{max(self.download_gaps):.2f}"
        return (
            f"| {self.name} | {len(self.gaps)} | {statistics.median(self.gaps):.2f} | "
            f"{max(self.gaps):.2f} | {downloads[0]} | {downloads[1]} | "
            f"{statistics.median(self.start_ups):.2f} | {self.load:.1f} | "
            f"{self.words()} |"
        )

    def words(self) -> str:
        """What became of the download."""
        if not self.survives:
            return "connections end with the connector, as they must"
        if not self.broken:
            return "one connection lived through all; checksum right"
        return f"{len(self.broken)} connections broke: {', '.join(sorted(set(self.broken)))}"


HEAD = (
    "| scenario | runs | ping: median s | worst s | download: median s | worst s "
    "| program's start s | load | download |\n|---|---|---|---|---|---|---|---|---|"
)


def main() -> int:
    """Run what was asked for, print the table."""
    parser = argparse.ArgumentParser(prog="scripts/recovery")
    parser.add_argument("--runs", type=int, default=20, help="of each scenario")
    parser.add_argument("--only", action="append", default=[], help="part of a scenario's name")
    parser.add_argument("--long", action="store_true", help="also what takes minutes")
    parser.add_argument("--parallel", type=int, default=1, help="laboratories at once (1)")
    parser.add_argument("--big", action="store_true", help="also a download of 1 GiB over kills")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--list", action="store_true", help="name the scenarios")
    options = parser.parse_args()
    chosen = [
        scenario
        for scenario in SCENARIOS
        if (options.long or not scenario.long)
        and (not options.only or any(words in scenario.name for words in options.only))
    ]
    if options.list:
        print("\n".join(scenario.name for scenario in chosen))
        return 0
    if reason := supported():
        print(f"scripts/recovery: {reason}", file=sys.stderr)
        return 1
    stops = not options.only or any("SIGTERM" in words for words in options.only)
    if options.parallel > 1:
        found = _run_in_parallel(options)
    else:
        found = _run(chosen, options.runs, stops=stops, big=options.big)
    if options.json:
        facts = {"when": _now(), "kernel": platform.release(), "cores": os.cpu_count()}
        options.json.write_text(json.dumps({**facts, **attrs.asdict(found)}, indent=1))
    late = [r.name for r in found.results if not r.gaps or max(r.gaps) > BOUND]
    late += [r.name for r in found.results if r.survives and r.broken]
    late += [f"SIGTERM of {s.role}" for s in found.stopped if max(s.once) > BOUND]
    late += ["1 GiB" for big in found.big if not big.intact]
    print(f"\n{_now()}, Linux {platform.release()}, {os.cpu_count()} cores")
    print(f"over {BOUND:.0f} s or broken: {', '.join(dict.fromkeys(late)) or 'none'}")
    return 1 if late else 0


@attrs.define
class Found:
    """What one laboratory, or several, have found."""

    results: list[Result] = attrs.Factory(list)
    stopped: list[recovery_stop.Stopped] = attrs.Factory(list)
    big: list[BigDownload] = attrs.Factory(list)


def _run_in_parallel(options: argparse.Namespace) -> Found:
    arguments = [word for name in options.only for word in ("--only", name)]
    arguments += ["--long"] * options.long + ["--big"] * options.big
    parts = run_in_parallel(arguments, options.runs, options.parallel)
    rows = zip(*(part["results"] for part in parts), strict=True)
    found = Found([Result(**joined(row)) for row in rows], stopped_of(parts), big_of(parts))
    print("\n".join([HEAD, *(result.row() for result in found.results)]))
    if found.stopped:
        print("\n".join(["", recovery_stop.HEAD, *(each.row() for each in found.stopped)]))
    for big in found.big:
        print(f"\n{big.words()}")
    return found


def _run(chosen: Sequence[Scenario], runs: int, *, stops: bool, big: bool) -> Found:
    found = Found()
    with tempfile.TemporaryDirectory() as folder, KernelLab() as lab:
        # A run takes some ten seconds of a slow download, a freeze no more: nothing comes then.
        site = build(lab, Path(folder), (8 + 4 * runs) << 20)
        print(HEAD, flush=True)
        for scenario in chosen:
            found.results.append(measure(site, scenario, runs))
            print(found.results[-1].row(), flush=True)
        if stops:
            print(f"\n{recovery_stop.HEAD}", flush=True)
            for role in ("agent", "connector", "intermediate"):
                found.stopped.append(recovery_stop.measure(site, role, runs))
                print(found.stopped[-1].row(), flush=True)
        if any(scenario.long for scenario in chosen):
            print(f"\n{recovery_stop.replaced_identity(site)}", flush=True)
        if big:
            found.big.append(big_download(site))
            print(f"\n{found.big[-1].words()}", flush=True)
    return found


def measure(site: RecoverySite, scenario: Scenario, runs: int) -> Result:
    """Run one scenario many times."""
    gaps: list[float] = []
    download_gaps: list[float] = []
    start_ups: list[float] = []
    loads: list[float] = []
    note = ""
    folder = site.deployment.folder
    with (
        Ping(site.agent, ECHO, folder / "ping.log") as ping,
        Download(
            site.agent, FILES, site.content, _PATIENCE if scenario.survives else _SHORT_PATIENCE
        ) as download,
    ):
        for _ in range(runs):
            if not ping.wait_steady(_STEADY, _DEADLINE):
                note = f"no steady ping after {_DEADLINE:.0f} s"
                _show_logs(site)
                break
            mended = scenario.fault(site)
            start_ups.append(mended.start_up)
            back = mended.at
            answered = ping.wait_answer(back, _DEADLINE)
            if scenario.survives and answered:
                answered = download.wait_arrival(back, _DEADLINE)
            end = max(wall_clock(), back + WINDOW) if answered else wall_clock()
            time.sleep(max(0.0, end - wall_clock()))
            gaps.append(longest_silence(ping.answers(), back, end))
            download_gaps.append(longest_silence(download.arrivals, back, end))
            loads.append(os.getloadavg()[0])
            if gaps[-1] > BOUND or (scenario.survives and download_gaps[-1] > BOUND):
                words = f"ping {gaps[-1]:.2f} s, download {download_gaps[-1]:.2f} s"
                print(f"  {scenario.name}: {words}; back at {_iso(back)}", file=sys.stderr)
                _show_logs(site)
        broken = list(download.broken)
        if scenario.survives:
            download.finish()
    return Result(
        scenario.name,
        gaps,
        download_gaps,
        start_ups,
        broken,
        download.whole,
        scenario.survives,
        statistics.mean(loads or [0.0]),
        note,
    )


def _show_logs(site: RecoverySite) -> None:
    for role, process in site.roles.items():
        lines = "\n".join(process.output().splitlines()[-8:])
        print(f"  -- {role}:\n{lines}", file=sys.stderr)


def _iso(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat()


def _now() -> str:
    return _iso(wall_clock())[:16]


if __name__ == "__main__":
    sys.exit(main())
