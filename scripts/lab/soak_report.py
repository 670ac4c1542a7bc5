"""The report of a long run, in markdown: what failed and why, outages, and what grew."""

import collections
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import attrs

from scripts.lab.soak_memory import Sample, Watched, slope
from scripts.lab.soak_probes import Attempt, Probe, longest_outage

PING_INTERVAL = 0.2  # s
_WINDOW = 60.0  # s after an event in which an outage is laid to it
_WARM_UP = 300.0  # s; until then caches, arenas and tables fill
_SHORT_LIFE = 240.0  # s; processes that lived less tell nothing about growth
_COMPLAINT = re.compile(r"\[(warning|error|critical)\s*\]\s+(.+?)(?:\s{2,}|\s+\w+=|$)", re.M)


@attrs.frozen
class Event:
    """Something that was done to the network. down: seconds until the process was back."""

    at: float
    words: str
    down: float = 0.0


@attrs.define(eq=False)
class Run:
    """All that was seen."""

    began: float = 0.0
    seconds: float = 0.0
    probes: Sequence[Probe] = ()
    ping: list[Attempt] = attrs.field(factory=list)
    ping_summary: list[str] = attrs.field(factory=list)
    connections_opened: int = 0
    events: list[Event] = attrs.field(factory=list)
    watched: list[Watched] = attrs.field(factory=list)
    visits: int = 0
    visits_failed: list[str] = attrs.field(factory=list)
    deaths: list[str] = attrs.field(factory=list)
    loads: list[float] = attrs.field(factory=list)


def write_report(run: Run) -> str:
    """The whole report."""
    parts = [_head(run), _requests(run), _events(run), _memory(run), _gauges(run), _complaints(run)]
    return "\n\n".join(parts) + "\n"


def _head(run: Run) -> str:
    load = statistics.fmean(run.loads or [0.0])
    ended = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    lines = [
        "# A long run in the kernel laboratory",
        "",
        f"`scripts/soak`, {run.seconds / 60:.1f} minutes, ended {ended} UTC.",
        f"Linux {platform.release()}, Python {platform.python_version()}, {os.cpu_count()} cores,",
        f"mean load {load:.1f}; what the table of CPU time below does not explain was other work.",
        "",
        "One agent and the connector lived through the whole run, each behind a NAT that gives a",
        "new port after every `conntrack -F`. A second agent came and went",
        f"{run.visits} times ({len(run.visits_failed)} times in vain). The intermediate was",
        "stopped or killed, and started again.",
    ]
    lines += [f"- second agent: {reason}" for reason in run.visits_failed]
    if run.deaths:
        lines += ["", "**Died or would not start:**", ""]
        lines += [f"```\n{words}\n```" for words in run.deaths]
    else:
        lines += ["", "No process died that was not killed."]
    return "\n".join(lines)


def _requests(run: Run) -> str:
    rows = []
    reasons: list[str] = []
    for probe in run.probes:
        good = [attempt for attempt in probe.attempts if not attempt.error]
        bad = [attempt for attempt in probe.attempts if attempt.error]
        outside = [attempt for attempt in bad if not _explained(attempt, run.events)]
        times = sorted(attempt.seconds for attempt in good)
        rows.append(
            (
                probe.name,
                len(good),
                len(bad),
                len(outside),
                *(f"{1_000 * _quantile(times, q):.0f}" for q in (0.5, 0.99, 1.0)),
                f"{longest_outage(probe.attempts, 0, run.began + run.seconds, probe.interval):.1f}",
            )
        )
        for reason, count in collections.Counter(a.error for a in bad).most_common():
            reasons.append(f"- {probe.name}: {count} times {reason}")
        reasons += [
            f"- {probe.name}: outside of events at {_clock(a.at, run)}: {a.error}" for a in outside
        ]
    titles = "| probe | done | failed | failed, no event | p50 ms | p99 ms | worst ms | outage s |"
    text = ["## Requests", "", *_table(titles, rows), ""]
    text.append(
        f"The TCP connection that was to last for the whole run was opened {run.connections_opened}"
        " time(s). Failed, no event: more than 60 s after the last restart or rebinding."
    )
    times = sorted(attempt.seconds for attempt in run.ping)
    text.append(
        f"Ping every {PING_INTERVAL} s: `{' '.join(run.ping_summary)}`;"
        f" p50 {1_000 * _quantile(times, 0.5):.1f} ms, p99 {1_000 * _quantile(times, 0.99):.1f} ms."
    )
    return "\n".join([*text, "", *(reasons or ["Nothing failed."])])


def _events(run: Run) -> str:
    rows = []
    ends = [event.at for event in run.events[1:]] + [run.began + run.seconds]
    for event, end in zip(run.events, ends, strict=True):
        until = min(end, event.at + _WINDOW)
        series = [(run.ping, PING_INTERVAL)]
        series += [(probe.attempts, probe.interval) for probe in run.probes]
        outages = [longest_outage(tries, event.at, until, every) for tries, every in series]
        rows.append(
            (
                _clock(event.at, run),
                event.words,
                f"{event.down:.1f}" if event.down else "-",
                *(f"{max(0.0, outage):.1f}" for outage in outages[:3]),
                f"{max(0.0, outages[4]):.1f}",
            )
        )
    titles = "| at | event | process away s | ping s | HTTP s | UDP s | TCP line s |"
    words = (
        "Longest time without a success that meets the minute after the event, less the interval"
        " of the probe. 'Process away' is from the end of the old process to 'ready' of the new."
    )
    return "\n".join(["## Longest outage of each event", "", words, "", *_table(titles, rows)])


def _memory(run: Run) -> str:
    rows = []
    for watched in _long_lived(run):
        samples = watched.samples
        warm = _warm(watched)
        life = samples[-1].at - samples[0].at
        rows.append(
            (
                watched.name,
                f"{life / 60:.0f}",
                *_three(samples, warm, lambda s: s.rss_mb, "{:.1f}"),
                f"{slope([(s.at, s.rss_mb) for s in warm]):+.2f}",
                *_three(samples, warm, lambda s: s.descriptors, "{:.0f}"),
                f"{samples[0].threads}/{samples[-1].threads}",
                "/".join(
                    f"{s.statistics.get('process.tasks', 0):.0f}" for s in (warm[0], samples[-1])
                ),
                f"{100 * (samples[-1].cpu_seconds - samples[0].cpu_seconds) / life:.1f}",
            )
        )
    titles = (
        "| process | min | RSS MB start | warm | end | MB/h | fds start | warm | end"
        " | threads start/end | tasks warm/end | CPU % |"
    )
    own = resource.getrusage(resource.RUSAGE_SELF)
    words = (
        f"Warm: {_WARM_UP:.0f} s after the start of the process, or a third of a shorter life."
        " MB/h: slope of the least-squares line from then on; over a few minutes it says little."
        f" The test driver itself used {own.ru_utime + own.ru_stime:.0f} s of CPU."
    )
    return "\n".join(["## Memory, descriptors, tasks", "", words, "", *_table(titles, rows)])


def _gauges(run: Run) -> str:
    rows = []
    for watched in _long_lived(run):
        if " #" in watched.name:
            continue  # one life of each role is enough
        for name, values in watched.gauges():
            rest = values[len(values) // 4 :]
            shown = (values[0], rest[0], max(values), values[-1])
            rows.append((watched.name, name, *(f"{value:g}" for value in shown)))
    titles = "| process | statistic | start | after a quarter | most | end |"
    words = "Statistics that are no counters (they fell at least once):"
    return "\n".join(["## Tables and queues", "", words, "", *_table(titles, rows)])


def _complaints(run: Run) -> str:
    counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for watched in run.watched:
        role = watched.process.name
        for level, words in _COMPLAINT.findall(watched.process.output()):
            counts[role, level, words.strip()] += 1
    rows = [(*key, count) for key, count in counts.most_common(30)]
    titles = "| process | level | words | times |"
    return "\n".join(["## Warnings and errors in the logs", "", *_table(titles, rows)])


def _long_lived(run: Run) -> Iterator[Watched]:
    limit = min(_SHORT_LIFE, run.seconds / 4)
    for watched in run.watched:
        if watched.samples and watched.samples[-1].at - watched.samples[0].at >= limit:
            yield watched


def _warm(watched: Watched) -> list[Sample]:
    life = watched.samples[-1].at - watched.samples[0].at
    return watched.after(min(_WARM_UP, life / 3))


def _three(
    samples: Sequence[Sample], warm: Sequence[Sample], value: Callable[[Sample], float], form: str
) -> Iterator[str]:
    for sample in (samples[0], warm[0], samples[-1]):
        yield form.format(value(sample))


def _explained(attempt: Attempt, events: Sequence[Event]) -> bool:
    end = attempt.at + attempt.seconds
    return any(event.at <= end and attempt.at <= event.at + _WINDOW for event in events)


def _quantile(ordered: Sequence[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0


def _clock(at: float, run: Run) -> str:
    minutes, seconds = divmod(int(at - run.began), 60)
    return f"{minutes:02}:{seconds:02}"


def _table(titles: str, rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield titles
    yield "|" + "---|" * (titles.count("|") - 1)
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"
