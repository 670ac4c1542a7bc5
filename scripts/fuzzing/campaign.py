"""Runs the campaigns: so many inputs a parser, what was found, and how fast it went."""

import argparse
import json
import logging
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import attrs
import structlog
import trio

from scripts.fuzzing.mutation import Mutator
from scripts.fuzzing.parsers import TARGETS
from ztna.errors import RemoteProtocolError

SAMPLES = 3


@attrs.define
class Outcome:
    """inputs: how many were tried. refused: of these, by the parser's one error. findings: other
    errors, by the place that raised them, with how often; samples: inputs that did, by place."""

    parser: str
    seed: int
    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: Counter[str] = attrs.Factory(Counter)
    samples: dict[str, list[str]] = attrs.Factory(dict)

    def record(self, error: Exception, data: bytes) -> None:
        """Note what should not have happened."""
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
        self.findings[place] += 1
        samples = self.samples.setdefault(place, [])
        if len(samples) < SAMPLES:
            samples.append(data.hex())


async def run(name: str, inputs: int, seed: int) -> Outcome:
    """Fuzz one parser."""
    await trio.lowlevel.checkpoint()
    target = TARGETS[name]
    # Also where a parser draws numbers itself.
    random.seed(seed)
    mutator = Mutator(target.examples, seed, target.ip_at)
    outcome = Outcome(name, seed)
    parse = target.make()
    start = time.perf_counter()
    for number in range(inputs):
        if number % target.renew_after == 0:
            parse = target.make()
        data = mutator.next_input()
        try:
            parse(data)
        except RemoteProtocolError:
            outcome.refused += 1
        except Exception as error:  # noqa: BLE001 # whatever it is, it is what we look for
            outcome.record(error, data)
            parse = target.make()
    outcome.inputs, outcome.seconds = inputs, time.perf_counter() - start
    return outcome


def main() -> int:
    """The command line; returns the exit code."""
    options = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    options.add_argument("--inputs", type=int, default=100_000, help="a parser (100,000)")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--parser", action="append", choices=sorted(TARGETS), help="all if absent")
    options.add_argument("--json", type=Path, help="append a line for each parser to this file")
    options.add_argument("--list", action="store_true", help="name the parsers and end")
    given = options.parse_args()
    if given.list:
        print("\n".join(TARGETS))
        return 0
    found = False
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    for name in given.parser or TARGETS:
        # Some look at trio's clock.
        outcome = trio.run(run, name, given.inputs, given.seed)
        rate = outcome.inputs / max(outcome.seconds, 1e-9)
        print(
            f"{name:22} {outcome.inputs:>12,} inputs {rate:>10,.0f}/s  "
            f"{outcome.refused / outcome.inputs:>4.0%} refused  {len(outcome.findings)} findings",
            flush=True,
        )
        for place, count in outcome.findings.most_common():
            found = True
            print(f"    {place}, {count} times; for example {outcome.samples[place][0][:200]}")
        if given.json:
            with given.json.open("a") as file:
                file.write(json.dumps(attrs.asdict(outcome)) + "\n")
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
