"""Pairs of NATs measured in several laboratories at once, each a process of its own.

    parent: pairs -> laboratory, laboratory, ... -> one outcome at a time -> parent

A laboratory takes the next pair when it is done with one. What it costs is mostly waiting, for the
links' delay and for what takes seconds until it is given up; so there may be more laboratories than
cores.
"""

import contextlib
import itertools
import os
import signal
from collections.abc import Generator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from ztna.cli.lab_forked import forking, start_forked
from ztna.errors import SystemSetupError, ZtnaError
from ztna.nat.site import Files, prepare, reason_against
from ztna.roles.lab_matrix import Conditions, Pair, PairOutcome, measure_in_kernel

_ENDING = 5.0  # s; our choice: removing a network takes half of one


def measure_in_laboratories(
    pairs: Sequence[Pair], folder: Path, conditions: Conditions, laboratories: int
) -> Generator[PairOutcome, None, None]:
    """As they come, in no order. folder: empty; for what the nodes need.

    Raises SystemSetupError where there can be no such laboratory, and what one of them has raised.
    """
    if reason := reason_against():
        raise SystemSetupError(reason)
    (folder / "first").mkdir()
    files = prepare(folder / "first")
    waiting = iter(pairs)
    busy: dict[Connection, Pair] = {}
    processes: list[BaseProcess] = []
    try:
        for number, pair in enumerate(itertools.islice(waiting, laboratories)):
            own = folder / f"laboratory{number}"
            ours, theirs = forking().Pipe()
            process = forking().Process(target=_serve, args=(theirs, files, own, conditions))
            process.start()
            processes.append(process)
            theirs.close()
            ours.send(pair)
            busy[ours] = pair
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                yield _received(connection, busy.pop(connection))
                following = next(waiting, None)
                connection.send(following)
                if following is not None:
                    busy[connection] = following
    except BaseException:
        for each in processes:
            if each.pid is not None and each.is_alive():
                os.kill(each.pid, signal.SIGINT)
        raise
    finally:
        for each in processes:
            # It ends by itself when it has been told that nothing follows, or to end, and then
            # leaves nothing behind.
            each.join(_ENDING)
            each.kill()
            each.join()


def _received(connection: Connection, pair: Pair) -> PairOutcome:
    try:
        found = connection.recv()
    except EOFError:
        words = " and ".join(nat.words for nat in pair)
        raise SystemSetupError(f"the laboratory for {words} ended without a word") from None
    if isinstance(found, ZtnaError):
        raise found
    assert isinstance(found, PairOutcome)
    return found


def _serve(connection: Connection, files: Files, folder: Path, conditions: Conditions) -> None:
    """One laboratory: a pair in, its outcome out."""
    own = files.copied(folder)
    own.deployment.launch = start_forked
    # Ctrl-C reaches us as it reaches the parent, which tells of it.
    with contextlib.suppress(KeyboardInterrupt):
        while (pair := connection.recv()) is not None:
            try:
                connection.send(measure_in_kernel(pair, own, conditions))
            except ZtnaError as error:
                connection.send(error)
                return
