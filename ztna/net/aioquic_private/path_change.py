"""What a connection must learn when its packets take another path, which aioquic does not do.

To aioquic a peer session has one address for ever, so a change of the path underneath looks to it
like loss: after seconds of black hole its window is full of packets that nobody will acknowledge,
its probes are seconds apart, and its round-trip time is another path's. RFC 9000 section 9.4: a new
path begins with the initial window and round-trip time; what is in flight says nothing of it.
"""

import math
from collections.abc import Hashable
from typing import Any

import attrs
from aioquic.quic.congestion.base import QuicCongestionControl, create_congestion_control
from aioquic.quic.connection import QuicConnection
from aioquic.quic.recovery import QuicPacketPacer

from ztna.net.aioquic_private.congestion import TunnelCongestionControl

MEMORY_TIME = 60.0
"""s for which what was learnt of a path is good (design)."""

LEAST_RTT = 0.02
"""s that a measured round-trip time counts as at least, until ACKs tell: our choice, as an ACK may
be held back by 5 ms and a busy peer."""

MAX_MEMORIES = 8
"""Paths that are remembered: our choice."""

_RTT_NAMES = (
    "_rtt_first_sample_time",
    "_rtt_initialized",
    "_rtt_latest",
    "_rtt_min",
    "_rtt_smoothed",
    "_rtt_variance",
)


@attrs.frozen
class PathMemory:
    """What a connection knew of a path when it left it, at `left_at` (s)."""

    left_at: float
    control: QuicCongestionControl = attrs.field(repr=False)
    rtt: dict[str, Any] = attrs.field(repr=False)

    def fresh(self, now: float) -> bool:
        """Whether it may still be believed."""
        return now - self.left_at < MEMORY_TIME


def change_path(
    connection: QuicConnection,
    now: float,
    *,
    max_datagram_size: int,
    rtt: float | None = None,
    memory: PathMemory | None = None,
) -> PathMemory:
    """Go on as on a new path; return what was known of the old one.

    max_datagram_size: bytes of the largest UDP payload of the new path. rtt: s, as a check of the
    path has measured it; memory: what is known from before, if that is fresh.

    What is in flight is given up without a congestion event, and streams send it again; the probe
    timeout is not backed off any more, a spare connection id of the peer is taken (RFC 9000 section
    9.5), and a PING asks at once for the first sample.
    """
    loss = connection._loss
    give_up(connection, now)
    left = PathMemory(
        now,
        loss._cc,
        {name: getattr(loss, name) for name in _RTT_NAMES},
    )
    if memory is not None and memory.fresh(now):
        loss._cc = memory.control
        known = memory.rtt
    else:
        loss._cc = create_congestion_control(
            connection._configuration.congestion_control_algorithm,
            max_datagram_size=max_datagram_size,
        )
        known = {
            "_rtt_first_sample_time": 0.0,
            "_rtt_initialized": False,
            "_rtt_latest": 0.0,
            "_rtt_min": math.inf,
            "_rtt_smoothed": 0.0,
            "_rtt_variance": 0.0,
        }
    for name, value in known.items():
        setattr(loss, name, value)
    # RFC 9002 section 6.2.2: the timer before the first sample; twice this.
    initial = connection._configuration.initial_rtt if rtt is None else max(rtt, LEAST_RTT)
    loss._rtt_initial = initial
    loss._pacer = QuicPacketPacer(max_datagram_size=max_datagram_size)
    resize(connection, max_datagram_size)
    connection._pacing_at = None
    connection.change_connection_id()
    return left


def give_up(connection: QuicConnection, now: float) -> None:
    """What is in flight says nothing: no congestion event, an empty window, streams send again,
    the probe timeout is not backed off any more, and a PING asks at once."""
    loss = connection._loss
    for space in loss.spaces:
        loss._on_packets_lost(
            congestion_event=False, now=now, packets=list(space.sent_packets.values()), space=space
        )
        space.loss_time = None
    loss._pto_count = 0
    connection.send_ping(0)


def resize(connection: QuicConnection, max_datagram_size: int) -> None:
    """Send UDP payloads of up to so many bytes from now on, on the same path."""
    connection._max_datagram_size = max_datagram_size
    loss = connection._loss
    loss._pacer._max_datagram_size = max_datagram_size
    if isinstance(loss._cc, TunnelCongestionControl):
        loss._cc.resize(max_datagram_size)


@attrs.define
class PathBook:
    """What a connection knows of its paths, by the caller's names for them."""

    _current: Hashable = None
    _memories: dict[Hashable, PathMemory] = attrs.field(factory=dict)

    def change(
        self,
        connection: QuicConnection,
        path: Hashable,
        now: float,
        *,
        max_datagram_size: int,
        rtt: float | None = None,
    ) -> None:
        """Go on by this path. What is old or too much is forgotten."""
        memory = self._memories.pop(path, None)
        left = change_path(
            connection, now, max_datagram_size=max_datagram_size, rtt=rtt, memory=memory
        )
        self._memories[self._current] = left
        self._current = path
        fresh = {each: kept for each, kept in self._memories.items() if kept.fresh(now)}
        self._memories = dict(list(fresh.items())[-MAX_MEMORIES:])
