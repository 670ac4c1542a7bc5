"""`scripts/recovery --parallel N`: the runs of each scenario, spread over N laboratories at once.

A frozen process costs no CPU, so ten laboratories wait 120 s as cheaply as one. Each is a process
of its own, which prints nothing and leaves its figures in a file; they start one behind the other,
so that not all break and mend at the same moment.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.lab.deployment import PYTHON, ROOT
from scripts.lab.recovery_big import BigDownload
from scripts.lab.recovery_scenarios import LONG
from scripts.lab.recovery_stop import Stopped

_DEADLINE = 3600.0  # s


def shares(runs: int, laboratories: int) -> list[int]:
    """How many runs each laboratory makes; fewer laboratories where there are fewer runs."""
    laboratories = min(runs, laboratories)
    return [runs // laboratories + (i < runs % laboratories) for i in range(laboratories)]


def run_in_parallel(
    arguments: Sequence[str], runs: int, laboratories: int, module: str = "scripts.lab.recovery"
) -> list[dict[str, Any]]:
    """What each laboratory has found, as it wrote it; the first ones have a run more, if any.

    arguments: of the module, without --runs, --json and --parallel.
    """
    counts = shares(runs, laboratories)
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for number, count in enumerate(counts):
            file = Path(folder) / f"{number}.json"
            log = Path(folder) / f"{number}.log"
            words = [str(PYTHON), "-m", module, *arguments]
            words += ["--runs", str(count), "--json", str(file)]
            if number:
                time.sleep(LONG / len(counts) if "--long" in arguments else 2.0)
            with log.open("w") as output:
                process = subprocess.Popen(
                    words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=output, text=True
                )
            processes.append((process, file, log))
        found = []
        for process, file, log in processes:
            process.wait(_DEADLINE)
            if not file.exists():
                raise RuntimeError(f"a laboratory failed:\n{log.read_text()[-2000:]}")
            sys.stderr.write(log.read_text())
            found.append(json.loads(file.read_text()))
    return found


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one scenario from several laboratories, as one."""
    whole = dict(parts[0])
    for name, value in whole.items():
        if isinstance(value, list):
            whole[name] = [each for part in parts for each in part[name]]
        elif name == "load":
            whole[name] = sum(part[name] for part in parts) / len(parts)
        elif name == "whole":
            whole[name] = sum(part[name] for part in parts)
        elif name == "note":
            whole[name] = "; ".join(sorted({part[name] for part in parts} - {""}))
    return whole


def stopped_of(found: Sequence[dict[str, Any]]) -> list[Stopped]:
    """How long roles took to end, of all laboratories."""
    return [
        Stopped(**joined(parts)) for parts in zip(*(each["stopped"] for each in found), strict=True)
    ]


def big_of(found: Sequence[dict[str, Any]]) -> list[BigDownload]:
    """The downloads of 1 GiB."""
    return [BigDownload(**each) for part in found for each in part["big"]]
