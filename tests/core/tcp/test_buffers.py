"""Buffers against a model that is one flat bytes object."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.tcp.buffers import MAX_RANGES, ChunkQueue, ReassemblyQueue, SendBuffer, own

sizes = st.integers(1, 9000)


def text(start: int, size: int) -> bytes:
    """Bytes that tell their position."""
    return bytes((start + index) * 131 % 251 for index in range(size))


def test_own_copies_only_what_keeps_too_much_alive() -> None:
    big = bytes(10_000)
    whole, part = memoryview(big)[10:9000], memoryview(big)[:4000]
    assert own(big) is big
    assert own(whole) is whole
    assert isinstance(own(part), bytes)


@given(st.lists(sizes, max_size=12), st.lists(st.integers(0, 20_000), max_size=12))
def test_chunk_queue(writes: list[int], reads: list[int]) -> None:
    queue = ChunkQueue()
    model = b""
    for size in writes:
        data = text(len(model), size)
        queue.append(memoryview(data))
        model += data
    for most in reads:
        data = bytes(queue.read(most))
        assert len(data) <= most
        assert bool(data) == bool(most and model)
        assert model.startswith(data)
        model = model[len(data) :]
        assert queue.size == len(model)
    assert b"".join(queue.drain()) == model
    assert queue.size == 0


def test_small_chunks_are_put_together() -> None:
    queue = ChunkQueue()
    buffer = SendBuffer()
    for _ in range(10_000):
        queue.append(b"x")
        buffer.append(b"x")
    assert len(queue._chunks) == len(buffer._chunks) == 3


@given(st.lists(sizes, min_size=1, max_size=12), st.data())
def test_send_buffer(writes: list[int], data: st.DataObject) -> None:
    buffer = SendBuffer()
    model = b"\0"  # position 0 is the SYN
    for size in writes:
        piece = text(len(model), size)
        buffer.append(piece)
        model += piece
    for _ in range(5):
        assert buffer.size == buffer.end - buffer.start
        if buffer.start == buffer.end:
            break
        start = data.draw(st.integers(buffer.start, buffer.end - 1))
        end = data.draw(st.integers(start + 1, buffer.end))
        assert bytes(buffer.slice(start, end)) == model[start:end]
        buffer.release(data.draw(st.integers(buffer.start, buffer.end)))
    buffer.clear()
    assert (buffer.size, buffer._chunks) == (0, [])
    buffer.append(b"more")
    assert bytes(buffer.slice(buffer.end - 4, buffer.end)) == b"more"


def test_whole_chunks_are_not_copied() -> None:
    buffer = SendBuffer()
    chunk = bytes(10_000)
    buffer.append(chunk)
    assert buffer.slice(1, 10_001) is chunk


def first_run(positions: list[int]) -> tuple[int, int] | None:
    """The first positions without a gap (start, end)."""
    run = [at for index, at in enumerate(positions) if at == positions[0] + index]
    return (run[0], run[-1] + 1) if run else None


@given(
    st.lists(st.tuples(st.integers(10, 400), st.integers(1, 120)), max_size=25),
    st.integers(0, 60),
    st.integers(1, 500),
)
def test_reassembly(pieces: list[tuple[int, int]], early: int, position: int) -> None:
    queue = ReassemblyQueue()
    model: dict[int, int] = {}
    for start, size in pieces:
        data = text(start, size)
        assert queue.insert(start, data) == first_run(
            sorted(set(model) & {*range(start, start + size)})
        )
        model.update(zip(range(start, start + size), data, strict=True))
        assert queue.size == len(model)
        ranges = sorted(queue.recent())
        assert {at for left, right in ranges for at in range(left, right)} == set(model)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges))
        newest = queue.recent()[0]
        assert newest[0] <= start < newest[1]
    end, chunks = queue.take(position)
    taken = b"".join(chunks)
    assert taken == bytes(model[at] for at in range(position, end))
    assert end not in model
    rest = {at for at in model if at > end}
    assert queue.size == len(rest)
    if rest:
        first = min(rest)
        again, chunks = queue.take(first)
        assert b"".join(chunks) == bytes(model[at] for at in range(first, again))
    queue.clear()
    assert (len(queue), queue.size) == (0, 0)


def test_ranges_are_bounded_but_grow() -> None:
    queue = ReassemblyQueue()
    for index in range(MAX_RANGES + 1):
        queue.insert(2 * index, b"x")
    assert (len(queue), queue.end) == (MAX_RANGES, 2 * MAX_RANGES - 1)
    queue.insert(1, b"y")
    queue.insert(2 * MAX_RANGES, b"x")
    assert (len(queue), queue.end) == (MAX_RANGES, 2 * MAX_RANGES + 1)


def test_take_skips_whole_chunks() -> None:
    queue = ReassemblyQueue()
    data = text(10, 12_000)
    for start in (0, 5000, 10_000):
        queue.insert(10 + start, data[start : start + 5000])
    assert queue.end == 12_010
    end, chunks = queue.take(10 + 5000)
    assert (end, b"".join(chunks)) == (12_010, data[5000:])
    queue.insert(20_000, b"x")
    assert queue.take(20_001) == (20_001, [])
    assert queue.end == queue.size == 0


def test_recent_since() -> None:
    queue = ReassemblyQueue()
    queue.insert(10, b"abc")
    clock = queue.clock
    queue.insert(20, b"abc")
    assert queue.recent(clock) == [(20, 23)]
    assert queue.recent() == [(20, 23), (10, 13)]
    with pytest.raises(AttributeError):
        queue.clock = 3  # type: ignore[misc] # that it fails is the test
