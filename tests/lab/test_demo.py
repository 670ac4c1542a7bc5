"""scripts/demo tells the truth and leaves nothing; scripts/bench gives its table."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.lab.bench import print_table
from scripts.lab.deployment import ROOT
from tests.lab.conftest import reason_to_skip
from ztna.nat.netns import NAMESPACES

needs_kernel = pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or "")


def start_demo(*flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "scripts.lab.demo", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def namespaces_of(process: subprocess.Popen[str]) -> Iterator[Path]:
    return NAMESPACES.glob(f"ztlab{process.pid:x}-*")


@pytest.mark.kernel
@pytest.mark.slow
@needs_kernel
def test_demo() -> None:
    with start_demo() as demo:
        output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 0, output
    assert "Hello from a web server that no one outside can connect to." in output
    assert "the page in clear among them: no" in output
    assert "OPEN" not in output
    assert not list(namespaces_of(demo))


@pytest.mark.kernel
@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_demo_that_is_kept_goes_away_on_a_signal(stop: signal.Signals) -> None:
    with start_demo("--keep") as demo:
        try:
            assert demo.stdout is not None
            told = [line for line in iter(demo.stdout.readline, "Ctrl-C ends it.\n") if line]
            assert list(namespaces_of(demo))
            (command,) = (line for line in told if "-- curl http://10.100.0.1/" in line)
            # What comes before it leads into the demo's user namespace; this test is there.
            words = command[command.index("nsenter --net") :].split()
            tried = subprocess.run(words, capture_output=True, text=True, check=False)
            assert "Hello" in tried.stdout, tried.stderr
        finally:
            demo.send_signal(stop)
        assert demo.wait(20) == 128 + stop
    assert not list(namespaces_of(demo))


@pytest.mark.kernel
@pytest.mark.slow
@needs_kernel
def test_bench(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    words = ("-m", "scripts.lab.bench", "--seconds", "1", "--only", "plain", "--only", "ztna relay")
    result = subprocess.run(
        [sys.executable, *words, "--json", file],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads(file.read_text())["results"]
    assert figures["plain"]["tcp1_gbps"] > figures["ztna relay"]["tcp1_gbps"] > 0.01
    assert figures["ztna relay"]["rss_mb:connector"] > 1


def test_table_with_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(
        {
            "plain": {"tcp1_gbps": 10.0},
            "ztna relay": {"tcp1_gbps": 1.5, "cpu_s_per_gb": 3.0, "rss_mb:agent": 70.0},
            "wireguard-go": {"tcp1_gbps": 0.5, "cpu_s_per_gb": 20.0},
        },
        {"nebula": "missing programs: nebula"},
        {"mode": "wire", "cpus": 2},
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mode wire, cpus 2"
    cells = {line[:42].strip(): line[42:].split() for line in lines[2:] if line[:42].strip()}
    assert cells["TCP, 1 stream [Gbit/s]"] == ["10.00", "1.50", "0.50"]
    assert cells["CPU, all processes [s/GB]"] == ["-", "3.0", "20.0"]
    assert cells["memory agent [MB]"] == ["-", "70.0", "-"]
    assert cells["ztna / this: TCP, 1 stream"] == ["0.15", "1.00", "3.00"]
    assert "nebula: not measured: missing programs: nebula" in lines
    assert lines[-1].startswith("TCP over the ztna relay is 3.00 times wireguard-go's")
