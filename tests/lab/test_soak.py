"""The long run's arithmetic and report; the run itself is started by hand (scripts/soak)."""

import subprocess
from pathlib import Path

import pytest

from scripts.lab.deployment import LoggedProcess
from scripts.lab.soak_memory import Sample, Watched, slope
from scripts.lab.soak_probes import Attempt, Probe, longest_outage, read_ping
from scripts.lab.soak_report import Event, Run, write_report


def attempts(*ends: float, failed: tuple[float, ...] = ()) -> list[Attempt]:
    """Tries that took 0.1 s each."""
    tries = [Attempt(end - 0.1, 0.1) for end in ends]
    tries += [Attempt(end - 0.1, 0.1, "timed out") for end in failed]
    return sorted(tries, key=lambda attempt: attempt.at)


@pytest.mark.parametrize(
    ("start", "end", "outage"),
    [
        (0, 20, 5.0),  # between 3 and 9
        (4, 20, 5.0),  # an outage that had begun counts whole
        (9.5, 20, 0.0),
        (9.5, 14, 2.0),  # nothing comes after 11: to the end of the window
        (0, 2.5, 0.0),
    ],
)
def test_longest_outage(start: float, end: float, outage: float) -> None:
    tries = attempts(1, 2, 3, 9, 10, 11, failed=(4, 5, 6))
    last = attempts(12, 13, 14, 15, 16, 17, 18, 19, 20) if end == 20 else []
    found = longest_outage([*tries, *last], start, end, 1)
    assert found == pytest.approx(outage)


def test_ping_is_read_in_the_order_of_sending(tmp_path: Path) -> None:
    log = tmp_path / "ping.log"
    log.write_text(
        "PING 10.100.0.2 (10.100.0.2) 56(84) bytes of data.\n"
        "[1000.500] 64 bytes from 10.100.0.2: icmp_seq=2 ttl=64 time=10.0 ms\n"
        "[1000.510] 64 bytes from 10.100.0.2: icmp_seq=1 ttl=64 time=200 ms\n"
        "[1001.000] From 10.100.0.2 icmp_seq=3 Destination Host Unreachable\n"
    )
    first, second = read_ping(log)
    assert (first.seconds, second.seconds) == (0.2, 0.01)
    assert second.at - first.at == pytest.approx(0.18)
    assert read_ping(tmp_path / "none") == []


def test_slope_is_an_hours() -> None:
    assert slope([(0, 5), (1800, 6), (3600, 7)]) == pytest.approx(2)
    assert slope([(0, 5)]) == slope([(3, 5), (3, 6)]) == 0


def watched(folder: Path) -> Watched:
    log = folder / "log"
    log.write_text(
        "2026 [warning  ] trying again                       what='session'\n"
        "2026 [info     ] ready\n"
        "process.tasks  12\n"
    )
    process = LoggedProcess("agent-agent", subprocess.Popen(["true"], text=True), log)
    process.wait()
    found = Watched(process, 1)
    for minute in range(61):
        rows = {"process.tasks": 12.0, "flows.tcp": float(minute % 2), "packets": float(minute)}
        found.samples.append(Sample(minute * 60, 70 + minute / 60, 11, 2, minute, rows))
    return found


def test_report(tmp_path: Path) -> None:
    probe = Probe("HTTP", 1, lambda: None, attempts(*range(1, 100), *range(105, 3600)))
    probe.attempts += attempts(failed=(101, 2000))
    run = Run(0, 3600, [probe] * 4, attempts(*range(1, 3600)), ["2 packets", "rtt"], 1)
    run.events = [Event(99, "intermediate killed", 2.5), Event(3000, "rebinding")]
    run.watched = [watched(tmp_path)]
    run.visits, run.visits_failed = 2, ["no page"]
    text = write_report(run)
    assert "60.0 minutes" in text
    assert "| HTTP | 3594 | 2 | 1 | 100 | 100 | 100 | 5.0 |" in text
    assert "- HTTP: outside of events at 33:19: timed out" in text
    assert "| 01:39 | intermediate killed | 2.5 |" in text
    assert "5.0 |" in text.split("| 01:39 |")[1].splitlines()[0]
    memory = "| agent-agent | 60 | 70.0 | 70.1 | 71.0 | +1.00 | 11 | 11 | 11 | 2/2 | 12/12 | 1.7 |"
    assert memory in text
    assert "| agent-agent | flows.tcp | 0 | 1 | 1 | 0 |" in text
    assert "| packets |" not in text  # a counter
    assert "| agent-agent | warning | trying again | 1 |" in text
    assert "- second agent: no page" in text
    assert "No process died" in text
    run.deaths.append("agent-agent: exit code 70")
    assert "**Died or would not start:**\n\n```\nagent-agent: exit code 70" in write_report(run)


def test_sample_of_a_running_process_and_of_a_dead_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("process.tasks     7\nudp.packets  1\nprocess.tasks     9\nsession.peer  x\n")
    words = ["bash", "-c", "trap : USR1; echo begun; while true; do sleep 0.05; done"]
    program = subprocess.Popen(words, text=True, stdout=subprocess.PIPE)
    assert program.stdout is not None
    assert program.stdout.readline() == "begun\n"
    process = LoggedProcess("role", program, log)
    found = Watched(process, 2)
    assert found.name == "role #2"
    found.sample()
    process.kill()
    program.stdout.close()
    found.sample()
    (sample,) = found.samples
    assert sample.rss_mb > 0.5
    assert (sample.threads, sample.descriptors >= 3) == (1, True)
    assert sample.statistics == {"process.tasks": 9, "udp.packets": 1}
