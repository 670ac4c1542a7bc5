"""scripts/bench: ztna beside what people use today, in one run on one machine, as one table."""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.lab.bench_measure import UDP_PAYLOAD, MeasurementError, measure
from scripts.lab.bench_network import open_network
from scripts.lab.bench_tunnels import CONTENDERS, Contender
from scripts.lab.deployment import NotReadyError
from ztna.errors import SystemSetupError
from ztna.nat.netns import supported

Figures = Mapping[str, float]

_ROWS = (
    ("TCP, 1 stream", "Gbit/s", "tcp1_gbps", "{:.2f}"),
    ("TCP, 4 streams", "Gbit/s", "tcp4_gbps", "{:.2f}"),
    (f"UDP, {UDP_PAYLOAD} bytes, < 1 % lost", "kpackets/s", "udp_kpps", "{:.1f}"),
    ("ping p50", "us", "ping_p50_us", "{:.0f}"),
    ("ping p99", "us", "ping_p99_us", "{:.0f}"),
    ("CPU, all processes", "s/GB", "cpu_s_per_gb", "{:.1f}"),
)
_OURS, _YARDSTICK = "ztna relay", "wireguard-go"


def main() -> int:
    """Run the benchmark; the exit code tells whether all that is here could be measured."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=int, default=10, help="length of a run (default 10)")
    length.add_argument("--quick", action="store_const", const=3, dest="seconds", help="3 s runs")
    parser.add_argument("--install", action="store_true", help="install the rivals with apt-get")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--mode", choices=("wire", "veth"), default="wire", help="kind of cable")
    parser.add_argument("--rounds", type=int, default=1, help="take the median of so many rounds")
    parser.add_argument("--only", action="append", metavar="NAME", help="this column (repeatable)")
    options = parser.parse_args()
    if reason := supported():
        print(f"scripts/bench: {reason}", file=sys.stderr)
        return SystemSetupError.exit_code
    seconds: int = options.seconds
    rounds: dict[str, list[Figures]] = {}
    missing: dict[str, str] = {}
    failed = False
    with open_network(options.mode) as network, tempfile.TemporaryDirectory() as folder:
        congestion_control = network.congestion_control
        for number in range(options.rounds):
            for contender in CONTENDERS:
                if options.only and contender.name not in options.only:
                    continue
                if reason := _unavailable(contender):
                    missing[contender.name] = reason
                    continue
                print(f"round {number + 1}: {contender.name} ...", file=sys.stderr)
                place = Path(folder, f"{number}-{contender.name.replace(' ', '-')}")
                place.mkdir()
                try:
                    with contender.open(network, place) as tunnel:
                        figures = measure(network, tunnel, seconds)
                except (MeasurementError, NotReadyError, SystemSetupError) as error:
                    missing[contender.name] = str(error)
                    failed = True
                    print(f"  {error}", file=sys.stderr)
                else:
                    rounds.setdefault(contender.name, []).append(figures)
    results = {name: _median(figures) for name, figures in rounds.items()}
    conditions = {
        "mode": options.mode,
        "seconds": seconds,
        "rounds": options.rounds,
        "congestion_control": congestion_control,
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    print_table(results, missing, conditions)
    if options.json is not None:
        document = {"conditions": conditions, "results": results, "missing": missing}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if failed else 0


def print_table(
    results: Mapping[str, Figures], missing: Mapping[str, str], conditions: Mapping[str, object]
) -> None:
    """Print the figures, a row a quantity and a column a tunnel, and our ratios."""
    print(", ".join(f"{key} {value}" for key, value in conditions.items()))
    rows = [["", *results]]
    for words, unit, key, form in _ROWS:
        cells = [_cell(figures.get(key), form) for figures in results.values()]
        rows.append([f"{words} [{unit}]", *cells])
    roles = sorted({key for figures in results.values() for key in figures if ":" in key})
    for key in roles:
        kind, _, role = key.partition(":")
        words = {"cpu_s_per_gb": f"CPU {role} [s/GB]", "rss_mb": f"memory {role} [MB]"}[kind]
        rows.append([words, *(_cell(figures.get(key), "{:.1f}") for figures in results.values())])
    if _OURS in results:
        for words, _, key, _ in _ROWS[:3]:
            own = results[_OURS].get(key)
            cells = [_ratio(own, figures.get(key)) for figures in results.values()]
            rows.append([f"ztna / this: {words}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *cells = row
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *padded]))
    for name, reason in missing.items():
        print(f"{name}: not measured: {reason.splitlines()[0]}")
    if _OURS in results and _YARDSTICK in results:
        ratio = results[_OURS]["tcp1_gbps"] / results[_YARDSTICK]["tcp1_gbps"]
        print(f"TCP over the ztna relay is {ratio:.2f} times wireguard-go's direct tunnel.")


def _unavailable(contender: Contender) -> str | None:
    missing = [name for name in contender.programs if shutil.which(name) is None]
    return f"missing programs: {', '.join(missing)} (--install gets them)" if missing else None


def _median(rounds: Sequence[Figures]) -> Figures:
    keys = rounds[0].keys()
    return {key: statistics.median(figures[key] for figures in rounds) for key in keys}


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _ratio(own: float | None, other: float | None) -> str:
    return "-" if own is None or not other else f"{own / other:.2f}"


if __name__ == "__main__":
    sys.exit(main())
