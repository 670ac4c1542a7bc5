"""Batches of UDP payloads: cut to what one send takes, and joined to what one send can carry.

`batches_of` makes them of aioquic's single packets, `join_batches` of what the kernel has not
joined on receipt, `split_batch` cuts them for `sendmsg` with UDP_SEGMENT.
"""

from collections.abc import Iterator, Sequence

from ztna.core.ports import Address, Buffer, UdpBatch

# UDP_MAX_SEGMENTS of kernels before 6.9, later ones take 128.
MAX_SEGMENTS = 64
# 65,535 less IPv4's and UDP's header. IPv6 would take 20 more.
MAX_SEND_SIZE = 65_507


def split_batch(batch: UdpBatch) -> Iterator[Buffer]:
    """Cut into pieces that one send with UDP_SEGMENT takes: whole segments, at most
    `MAX_SEGMENTS` and `MAX_SEND_SIZE` bytes of them."""
    size, segment = len(batch.data), batch.segment_size
    step = segment * max(1, min(MAX_SEGMENTS, MAX_SEND_SIZE // segment))
    if size <= step:
        yield batch.data
        return
    view = memoryview(batch.data)
    for start in range(0, size, step):
        yield view[start : start + step]


def join_batches(batches: Sequence[UdpBatch]) -> list[UdpBatch]:
    """Join neighbours of one address and size: the kernel joins only what came in one GSO send.

    A joined batch is at most `MAX_SEND_SIZE` bytes, so it can be passed on as it is.
    """
    joined: list[UdpBatch] = []
    run: list[UdpBatch] = []
    total = 0
    for batch in batches:
        if run:
            first, last, size = run[0], run[-1], len(batch.data)
            if (
                batch.address == first.address
                and len(last.data) % first.segment_size == 0
                and total + size <= MAX_SEND_SIZE
                and (
                    batch.segment_size == first.segment_size
                    or size == batch.segment_size < first.segment_size
                )
            ):
                run.append(batch)
                total += size
                continue
            joined.append(_join_run(run))
        run, total = [batch], len(batch.data)
    if run:
        joined.append(_join_run(run))
    return joined


def _join_run(run: Sequence[UdpBatch]) -> UdpBatch:
    first = run[0]
    if len(run) == 1:
        return first
    data = b"".join(batch.data for batch in run)
    return UdpBatch(data, first.segment_size, first.address)


def batches_of(packets: Sequence[tuple[bytes, Address]]) -> list[UdpBatch]:
    """Join packets to batches for GSO: one address, equal size, the last may be shorter."""
    batches: list[UdpBatch] = []
    start = 0
    while start < len(packets):
        first, address = packets[start]
        size, end = len(first), start + 1
        while end < len(packets) and packets[end][1] == address and len(packets[end][0]) <= size:
            end += 1
            if len(packets[end - 1][0]) < size:
                break
        data = first if end == start + 1 else b"".join(data for data, _ in packets[start:end])
        batches.append(UdpBatch(data, size, address))
        start = end
    return batches
