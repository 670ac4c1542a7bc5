"""How users' traffic fares when direct paths break: every way to break one, many times over.

All runs under a stream of a packet every 10 ms, there and back, and under a download. A
run: wait until both sides say that packets go directly, break, look for three seconds, mend, wait
for the direct path, look for a second. The gap is the longest silence of the stream's answers, and
of the download, in that time. The download's one TCP connection should live through all runs; in
the end it is read to its end, and the checksum compared.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from scripts.lab.deployment import NotReadyError
from scripts.lab.failover_figures import Figures, compare
from scripts.lab.failover_probes import Stream
from scripts.lab.failover_report import Result, iso, page, table
from scripts.lab.failover_scenarios import SCENARIOS, Scenario, wait
from scripts.lab.failover_site import FailoverSite, build
from scripts.lab.recovery_parallel import joined, run_in_parallel
from scripts.lab.recovery_probes import Download, longest_silence, wall_clock
from scripts.lab.recovery_scenarios import Back
from scripts.lab.recovery_site import FILES
from ztna.nat.kernel_nat import KernelNatLab, supported

WINDOW = 3.0  # s that are looked at after something broke
AFTER = 1.0  # s, after the direct path is back
_POLL = 0.02  # s
_STEADY = 1.0  # s on the direct path before it is broken
_LATE = 0.5  # s that a packet may still be under way: several round trips by the relay
_DEADLINE = 90.0  # s; a path that is forgotten is tried again after 30 s
_PATIENCE, _SHORT = 120.0, 4.0  # s; as in `recovery`
# Of the download, a run: most of what comes in one. When all has come it begins anew.
_RUN_BYTES = 1 << 20


def main() -> int:
    """Run what was asked for, print the table."""
    parser = argparse.ArgumentParser(prog="scripts/failover")
    parser.add_argument("--runs", type=int, default=20, help="of each scenario (20)")
    parser.add_argument("--only", action="append", default=[], help="part of a scenario's name")
    parser.add_argument("--long", action="store_true", help="also what takes minutes")
    parser.add_argument("--figures", action="store_true", help="also compare relay and direct path")
    parser.add_argument("--parallel", type=int, default=1, help="laboratories at once (1)")
    parser.add_argument("--delay", type=float, default=20.0, help="ms, of each link (20)")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a page there")
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
        print(f"scripts/failover: {reason}", file=sys.stderr)
        return 1
    began = wall_clock()
    found = _run_in_parallel(options) if options.parallel > 1 else _run(chosen, options)
    print(table(found.results), *(figures.words() for figures in found.figures), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(attrs.asdict(found), indent=1))
    if options.report:
        words = " ".join(["scripts/failover", *_words(options), f"--runs {options.runs}"])
        words += f" --parallel {options.parallel}" * (options.parallel > 1)
        seconds = wall_clock() - began
        options.report.write_text(page(words, found.results, found.figures, seconds))
    bad = [words for result in found.results for words in result.complaints()]
    print(f"\nLinux {platform.release()}, {os.cpu_count()} cores")
    print("\n".join(bad) or "all within the bounds")
    return 1 if bad else 0


@attrs.define
class Found:
    """What one laboratory, or several, have found."""

    results: list[Result] = attrs.Factory(list)
    figures: list[Figures] = attrs.Factory(list)


def _words(options: argparse.Namespace) -> list[str]:
    words = [f'--only "{name}"' for name in options.only]
    return [*words, *["--long"] * options.long, *["--figures"] * options.figures]


def _run_in_parallel(options: argparse.Namespace) -> Found:
    arguments = [word for name in options.only for word in ("--only", name)]
    arguments += ["--delay", str(options.delay), *["--long"] * options.long]
    parts = run_in_parallel(arguments, options.runs, options.parallel, "scripts.lab.failover")
    rows = zip(*(part["results"] for part in parts), strict=True)
    # Not beside others, whose traffic would be part of it.
    figures = _run([], options).figures if options.figures else []
    return Found([Result(**joined(row)) for row in rows], figures)


def _run(chosen: Sequence[Scenario], options: argparse.Namespace) -> Found:
    found = Found()
    file_bytes = options.runs * len(chosen) * _RUN_BYTES
    with tempfile.TemporaryDirectory() as folder, KernelNatLab() as lab:
        site = build(lab, Path(folder), file_bytes, options.delay / 1000)
        for survives in (True, False):
            if group := [each for each in chosen if each.survives is survives]:
                results = measure(site, group, options.runs)
                found.results += results
                print(table(results, head=False), file=sys.stderr, flush=True)
        if options.figures:
            found.figures.append(compare(site))
    return found


def measure(site: FailoverSite, scenarios: Sequence[Scenario], runs: int) -> list[Result]:
    """Run many rounds of some scenarios, which TCP connections all survive or do not: what came of
    breaking, and of mending where that is another. In turns, since a path that breaks again and
    again is held back for longer each time."""
    survives = scenarios[0].survives
    results = {
        name: Result(name, survives, scenario.lossless, scenario.bound)
        for scenario in scenarios
        for name in scenario.names
    }
    with (
        Stream(site.agent, site.apps) as stream,
        Download(site.agent, FILES, site.content, _PATIENCE if survives else _SHORT) as download,
    ):
        watch = Watch(site, stream, download)
        try:
            for _ in range(runs):
                for scenario in scenarios:
                    watch.run(scenario, results)
        except NotReadyError as error:
            results[scenario.name].notes.append("no direct path")
            print(f"  {scenario.name}: {error}", file=sys.stderr)
        ended = list(download.broken)
        if survives:
            download.finish()
    for result in results.values():
        result.ended, result.whole = ended, download.whole
    return list(results.values())


@attrs.frozen
class Watch:
    """Looks at what follows a moment."""

    site: FailoverSite
    stream: Stream
    download: Download

    def run(self, scenario: Scenario, results: Mapping[str, Result]) -> None:
        """Break once, and mend. Raises NotReadyError."""
        self.site.wait_direct(_DEADLINE, steady=_STEADY)
        self.stream.wait_answer(wall_clock(), _DEADLINE)
        broken = results[scenario.name]
        self.look(broken, scenario.fault(self.site), until_direct=scenario.mend is None)
        if scenario.mend is None:
            return
        if scenario.relayed and not self.site.all_relayed():
            broken.notes.append("not by the relay")
        wait(scenario.away - WINDOW)
        mended = results[scenario.names[1]]
        self.look(mended, scenario.mend(self.site), until_direct=True)

    def look(self, result: Result, back: Back, *, until_direct: bool) -> None:
        """Add what follows to the result, for three seconds; or until both sides have been on the
        direct path for a second, if that is later. Raises NotReadyError."""
        relayed, direct = math.nan, math.nan
        end = back.at + WINDOW
        while (now := wall_clock()) < end or (until_direct and not now >= direct + AFTER):
            if not self.site.all_direct():
                direct = math.nan
            elif math.isnan(direct):
                direct = now
            if math.isnan(relayed) and self.site.all_relayed():
                relayed = now
            if now > back.at + _DEADLINE:
                raise NotReadyError(f"not direct {_DEADLINE:.0f} s after that")
            time.sleep(_POLL)
        end = wall_clock()
        time.sleep(_LATE)
        lost = self.stream.lost(back.at, end)
        result.gaps.append(longest_silence(self.stream.arrivals(), back.at, end))
        result.download_gaps.append(longest_silence(self.download.arrivals, back.at, end))
        result.sent.append(lost.sent)
        result.lost_out.append(lost.out)
        result.lost_back.append(lost.back)
        result.loads.append(os.getloadavg()[0])
        if not math.isnan(relayed):
            result.relayed.append(relayed - back.at)
        if until_direct:
            result.direct.append(max(0.0, direct - back.at))
        if result.gaps[-1] > result.bound:
            print(f"  {result.name}: {result.gaps[-1]:.2f} s after {iso(back.at)}", file=sys.stderr)
            for role, process in self.site.roles.items():
                lines = "\n".join(process.output().splitlines()[-8:])
                print(f"  -- {role}:\n{lines}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
