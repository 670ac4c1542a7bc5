"""Byte streams as chunks: what waits to be sent or read, and what came out of order.

`SendBuffer` holds what the application wrote until it is acknowledged; `ChunkQueue` what is in
order and waits to be read; `ReassemblyQueue` the rest of what the window allows. Chunks are kept,
not copied; only small ones are put together, so that the number of objects is bounded by the
number of bytes.
"""

from bisect import bisect_left, bisect_right
from collections import deque
from operator import attrgetter

import attrs

from ztna.core.tcp.segment import Payload

# Chunks below this are put together with their neighbour: one byte at a time would otherwise cost
# a hundred bytes of object each. Our choice: a copy of 4 KB takes 0.1 us.
_SMALL = 4096

# More holes than this are not kept: what would open another one is dropped and sent again by the
# peer. Our choice: 1 MiB of window at 1,121 bytes a segment has at most 467.
MAX_RANGES = 512


def own(payload: Payload) -> Payload:
    """Return payload, copied if it would keep a much larger buffer alive."""
    if isinstance(payload, memoryview) and 2 * len(payload) < memoryview(payload.obj).nbytes:
        return bytes(payload)
    return payload


@attrs.define(eq=False)
class ChunkQueue:
    """First in, first out. `size` is in bytes."""

    size: int = 0
    _chunks: deque[Payload] = attrs.field(factory=deque)

    def append(self, payload: Payload) -> None:
        """Put payload, at least one byte, at the end."""
        self.size += len(payload)
        chunks = self._chunks
        if len(payload) < _SMALL and chunks and len(chunks[-1]) < _SMALL:
            chunks[-1] = b"".join((chunks[-1], payload))
        else:
            chunks.append(own(payload))

    def read(self, most: int) -> Payload:
        """Take at most so many bytes from the front: one chunk or a part of it, b"" if empty."""
        if not self._chunks or most <= 0:
            return b""
        chunk = self._chunks.popleft()
        if len(chunk) > most:
            view = memoryview(chunk)
            self._chunks.appendleft(view[most:])
            chunk = view[:most]
        self.size -= len(chunk)
        return chunk

    def drain(self) -> list[Payload]:
        """Take everything, as chunks in order."""
        chunks = list(self._chunks)
        self._chunks.clear()
        self.size = 0
        return chunks


@attrs.define(eq=False)
class SendBuffer:
    """Bytes by position in the stream, from `start` (not acknowledged) to `end` (last written)."""

    start: int = 1
    end: int = 1
    # Where each chunk begins, beside the chunks: looked up by bisection.
    _starts: list[int] = attrs.field(factory=list)
    _chunks: list[Payload] = attrs.field(factory=list)

    @property
    def size(self) -> int:
        """Bytes held."""
        return self.end - self.start

    def append(self, data: bytes | memoryview) -> None:
        """Put data, at least one byte that never changes again, at the end."""
        chunks = self._chunks
        if len(data) < _SMALL and chunks and len(chunks[-1]) < _SMALL:
            chunks[-1] = b"".join((chunks[-1], data))
        else:
            self._starts.append(self.end)
            chunks.append(own(data))
        self.end += len(data)

    def slice(self, start: int, end: int) -> Payload:
        """Return the bytes from position start to end, both within the buffer, start < end."""
        index = bisect_right(self._starts, start) - 1
        begin = self._starts[index]
        chunk = self._chunks[index]
        if end <= begin + len(chunk):
            if start == begin and end == begin + len(chunk):
                return chunk
            return memoryview(chunk)[start - begin : end - begin]
        parts: list[Payload] = [memoryview(chunk)[start - begin :]]
        position = begin + len(chunk)
        while position < end:
            index += 1
            chunk = self._chunks[index]
            if end < position + len(chunk):
                chunk = memoryview(chunk)[: end - position]
            parts.append(chunk)
            position += len(chunk)
        return b"".join(parts)

    def release(self, position: int) -> None:
        """Forget what is before position, which is within the buffer or at its end."""
        self.start = position
        if position == self.end:
            self._starts.clear()
            self._chunks.clear()
            return
        index = bisect_right(self._starts, position) - 1
        if index > 0:
            del self._starts[:index], self._chunks[:index]

    def clear(self) -> None:
        """Forget everything."""
        self.release(self.end)


@attrs.define(eq=False)
class Range:
    """A run of bytes behind a hole. touched: counts up with each change, for the order of SACK."""

    start: int
    end: int
    touched: int
    chunks: ChunkQueue


_START = attrgetter("start")
_END = attrgetter("end")
_TOUCHED = attrgetter("touched")


@attrs.define(eq=False)
class ReassemblyQueue:
    """What came behind a hole: disjoint ranges, none touching another, in order."""

    size: int = 0
    _ranges: list[Range] = attrs.field(factory=list)
    _clock: int = 0

    def __len__(self) -> int:
        return len(self._ranges)

    @property
    def end(self) -> int:
        """Behind the last byte; 0 if there is none."""
        return self._ranges[-1].end if self._ranges else 0

    def insert(self, start: int, payload: Payload) -> tuple[int, int] | None:
        """Keep payload, at least one byte, at position start; drop it where it would make one
        range too many. Of bytes that are there already the old ones stay: return where the first of
        them are (start, end)."""
        self._clock += 1
        ranges = self._ranges
        end = start + len(payload)
        first = bisect_left(ranges, start, key=_END)
        last = bisect_right(ranges, end, lo=first, key=_START)
        if first == last:
            if len(ranges) >= MAX_RANGES:
                return None
            queue = ChunkQueue()
            queue.append(payload)
            ranges.insert(first, Range(start, end, self._clock, queue))
            self.size += len(payload)
            return None
        # ranges[first:last] touch or overlap the payload: grow the first by what lies between.
        into = ranges[first]
        known = into if into.end > start or last - first == 1 else ranges[first + 1]
        duplicate = max(start, known.start), min(end, known.end)
        self.size -= sum(item.end - item.start for item in ranges[first:last])
        if start < into.start:
            queue = ChunkQueue()
            queue.append(payload[: into.start - start])
            for chunk in into.chunks.drain():
                queue.append(chunk)
            into.start, into.chunks = start, queue
        for other in ranges[first + 1 : last]:
            into.chunks.append(payload[into.end - start : other.start - start])
            for chunk in other.chunks.drain():
                into.chunks.append(chunk)
            into.end = other.end
        if into.end < end:
            into.chunks.append(payload[into.end - start :])
            into.end = end
        into.touched = self._clock
        self.size += into.end - into.start
        del ranges[first + 1 : last]
        return duplicate if duplicate[0] < duplicate[1] else None

    def take(self, position: int) -> tuple[int, list[Payload]]:
        """Take what is in order once everything before position is there: the new position and
        the chunks up to it. What lies before position is discarded."""
        chunks: list[Payload] = []
        ranges = self._ranges
        while ranges and ranges[0].start <= position:
            item = ranges.pop(0)
            self.size -= item.end - item.start
            if item.end <= position:
                continue
            skip = position - item.start
            for chunk in item.chunks.drain():
                if skip < len(chunk):
                    chunks.append(chunk[skip:] if skip else chunk)
                skip = max(0, skip - len(chunk))
            position = item.end
        return position, chunks

    def recent(self, since: int = 0) -> list[tuple[int, int]]:
        """Return the ranges (start, end) changed after clock `since`, the latest change first
        (RFC 2018 section 4)."""
        changed = [item for item in self._ranges if item.touched > since]
        changed.sort(key=_TOUCHED, reverse=True)
        return [(item.start, item.end) for item in changed]

    @property
    def clock(self) -> int:
        """Counts the changes."""
        return self._clock

    def clear(self) -> None:
        """Forget everything."""
        self._ranges.clear()
        self.size = 0
