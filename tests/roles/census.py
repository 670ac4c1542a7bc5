"""What is alive, counted again and again, and what of it grows: for tests that run for long."""

import gc
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence

import attrs
import trio

from ztna.core.wire import FEATURES

SLACK = len(FEATURES)  # of one session
# As long as what happened to be sent in the recent past.
WINDOWS = "in ztna.core.bbr.Bbr."
SIZES = (dict, list, set, frozenset, deque, bytearray)
OURS = ("ztna.", "aioquic.", "trio.")


@attrs.frozen
class Census:
    """What is alive. objects: by class; contents: what the containers of all objects of a class
    hold together, by attribute."""

    tasks: int
    descriptors: int
    blocks: int
    objects: Mapping[str, int]
    contents: Mapping[str, int]

    @classmethod
    def take(cls) -> "Census":
        gc.collect()
        objects: Counter[str] = Counter()
        contents: Counter[str] = Counter()
        for thing in gc.get_objects():
            kind = type(thing)
            module: object = kind.__module__
            if not isinstance(module, str) or not module.startswith(OURS):
                continue  # some classes of C have a descriptor there
            name = sys.intern(f"{module}.{kind.__qualname__}")
            objects[name] += 1
            for attribute, value in _attributes(thing):
                if isinstance(value, SIZES):
                    contents[sys.intern(f"{name}.{attribute}")] += len(value)
        return cls(
            trio.lowlevel.current_statistics().tasks_living,
            len(os.listdir("/proc/self/fd")),
            sys.getallocatedblocks(),
            objects,
            contents,
        )

    def numbers(self) -> dict[str, int]:
        """Everything that must not grow, by name."""
        return {
            "tasks": self.tasks,
            "descriptors": self.descriptors,
            **{f"objects of {name}": count for name, count in self.objects.items()},
            **{f"in {name}": count for name, count in self.contents.items()},
        }


def _attributes(thing: object) -> Iterator[tuple[str, object]]:
    for base in type(thing).__mro__:
        for name in base.__dict__.get("__slots__", ()):
            yield name, getattr(thing, name, None)
    yield from getattr(thing, "__dict__", {}).items()


def growing(censuses: Sequence[Census]) -> dict[str, list[int]]:
    """What was more in every hour of the last quarter than in any of the first: names, counts.

    Tolerates what one more session that is about to close makes; a leak of one thing an hour is
    more than that.
    """
    quarter = len(censuses) // 4
    names = {name for census in censuses for name in census.numbers()}
    counts = {name: [census.numbers().get(name, 0) for census in censuses] for name in names}
    return {
        name: series
        for name, series in sorted(counts.items())
        if min(series[-quarter:]) > max(series[:quarter]) + SLACK and not name.startswith(WINDOWS)
    }


def blocks_an_hour(censuses: Sequence[Census]) -> float:
    """Slope of the least-squares line through the allocator's blocks."""
    middle = (len(censuses) - 1) / 2
    rise = sum((hour - middle) * census.blocks for hour, census in enumerate(censuses))
    return rise / sum((hour - middle) ** 2 for hour in range(len(censuses)))
