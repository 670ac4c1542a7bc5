"""What is in flight, and what of it is lost: SACK scoreboard (RFC 6675), RACK (RFC 8985).

One `Flight` is a run of positions that were sent together, up to a whole super-segment; SACK
blocks and retransmissions split it. An ACK takes flights from the front; RACK says by the send
times of what arrived which others are lost. `in_flight` is the pipe of RFC 6675 section 4, kept
up to date as counts instead of a walk.
"""

from bisect import bisect_right
from collections.abc import Iterator
from operator import attrgetter
from typing import Final

import attrs

# No flight is split beyond so many: a peer with a tiny MSS gains nothing but slower recovery. Our
# choice; 1 MiB at 1,121 bytes a segment has 936.
MAX_FLIGHTS: Final = 2048
# RFC 5681 section 3.2 and RFC 8985 section 6.2, step 4: DupThresh.
DUPLICATE_THRESHOLD: Final = 3
# RFC 8985 section 6.2, step 4: a reordering window never exceeds the smoothed RTT, and persists
# for 16 recoveries.
_REORDERING_PERSIST: Final = 16


@attrs.define(eq=False)
class Flight:
    """Positions start to end, sent last at `sent_at`.

    retransmitted: sent more than once. sacked: the peer has it. lost: taken for lost and not yet
    sent again.
    """

    start: int
    end: int
    sent_at: float
    retransmitted: bool = False
    sacked: bool = False
    lost: bool = False


@attrs.frozen(slots=True)
class Delivery:
    """What one ACK said. size: bytes newly acknowledged or sacked. rtt: seconds, of the newest
    flight that was sent once, None without one."""

    size: int
    rtt: float | None


_START = attrgetter("start")


@attrs.define(eq=False)
class Scoreboard:
    """flights: in order, disjoint, without gaps from the first unacknowledged position on."""

    flights: list[Flight] = attrs.field(factory=list)
    sacked: int = 0
    lost: int = 0
    highest_sacked: int = 0
    # RACK.xmit_ts, RACK.end_seq, RACK.rtt of RFC 8985 section 5.2.
    _newest_sent_at: float = -1.0
    _newest_end: int = 0
    _newest_rtt: float = 0.0
    _reordering_seen: bool = False
    _window_multiplier: int = 1
    _window_persist: int = 0
    # Bytes taken for lost, for statistics; when something was sent again last.
    losses: int = 0
    resent_at: float = float("-inf")

    @property
    def in_flight(self) -> int:
        """The pipe: sent, neither sacked nor lost."""
        flights = self.flights
        if not flights:
            return 0
        return flights[-1].end - flights[0].start - self.sacked - self.lost

    @property
    def outstanding(self) -> int:
        """Sent and not cumulatively acknowledged (FlightSize of RFC 5681)."""
        flights = self.flights
        return flights[-1].end - flights[0].start if flights else 0

    def sent(self, start: int, end: int, now: float) -> None:
        """New positions were sent; start is the end of the last flight."""
        self.flights.append(Flight(start, end, now))

    def split(self, index: int, position: int) -> None:
        """Cut flight `index` in two at position, which lies inside it."""
        flight = self.flights[index]
        rest = Flight(
            position,
            flight.end,
            flight.sent_at,
            flight.retransmitted,
            flight.sacked,
            flight.lost,
        )
        flight.end = position
        self.flights.insert(index + 1, rest)

    def resent(self, index: int, size: int, now: float) -> Flight:
        """The first size bytes of flight `index` were sent again; the rest becomes a flight of
        its own. Return the flight that was sent."""
        flight = self.flights[index]
        if size < flight.end - flight.start:
            self.split(index, flight.start + size)
        if flight.lost:
            self.lost -= flight.end - flight.start
            flight.lost = False
        flight.retransmitted = True
        flight.sent_at = self.resent_at = now
        return flight

    def acknowledge(self, position: int, now: float, floor: float) -> Delivery:
        """Take everything before position. floor: an ACK sooner than so many seconds after a
        retransmission was for the original (RFC 8985 section 6.2, step 2)."""
        size = 0
        rtt: float | None = None
        repaired = False
        done = 0
        for flight in self.flights:
            if flight.start >= position:
                break
            end = flight.end if flight.end <= position else position
            length = end - flight.start
            if flight.sacked:
                self.sacked -= length
            else:
                size += length
                if flight.lost:
                    self.lost -= length
                    repaired = True
                if end < self.highest_sacked and not flight.retransmitted:
                    self._reordering_seen = True
                rtt = self._deliver(flight, end, now, floor, rtt)
            repaired |= flight.retransmitted
            if end < flight.end:
                flight.start = end
                break
            done += 1
        del self.flights[:done]
        # What waited behind a hole tells how long the repair took, not the round trip.
        return Delivery(size, None if repaired else rtt)

    def sack(self, blocks: list[tuple[int, int]], now: float, floor: float, mss: int) -> Delivery:
        """Mark what the blocks (start, end), all within the flights, cover.

        Flights are split only where a segment of mss bytes begins: nothing else arrives alone.
        """
        size = 0
        rtt: float | None = None
        flights = self.flights
        for start, end in blocks:
            index = max(0, bisect_right(flights, start, key=_START) - 1)
            while index < len(flights) and flights[index].start < end:
                if not flights[index].sacked:
                    index = self._cut_out(index, start, end, mss)
                flight = flights[index]
                if not flight.sacked and flight.start >= start and flight.end <= end:
                    length = flight.end - flight.start
                    size += length
                    was_lost = flight.lost
                    if was_lost:
                        self.lost -= length
                        flight.lost = False
                    if flight.end < self.highest_sacked and not flight.retransmitted:
                        self._reordering_seen = True
                    flight.sacked = True
                    self.sacked += length
                    sample = self._deliver(flight, flight.end, now, floor, rtt)
                    # What was taken for lost long ago was told late: its ACK was lost.
                    rtt = rtt if was_lost else sample
                index += 1
            self.highest_sacked = max(self.highest_sacked, end)
        return Delivery(size, rtt)

    def _cut_out(self, index: int, start: int, end: int, mss: int) -> int:
        """Split flight `index` so that the whole segments of it between start and end are a
        flight of their own; return the index of that one, or of the last piece looked at."""
        flight = self.flights[index]
        at = flight.start
        left = at if start <= at else at - (at - start) // mss * mss
        right = flight.end if end >= flight.end else at + (end - at) // mss * mss
        if left >= right or len(self.flights) >= MAX_FLIGHTS:
            return index
        if right < flight.end:
            self.split(index, right)
        if left > at:
            self.split(index, left)
            index += 1
        return index

    def _deliver(
        self, flight: Flight, end: int, now: float, floor: float, rtt: float | None
    ) -> float | None:
        """RFC 8985 section 6.2, step 2: remember the newest delivery; return the RTT sample."""
        elapsed = now - flight.sent_at
        if flight.retransmitted and elapsed < floor:
            return rtt
        if (flight.sent_at, end) > (self._newest_sent_at, self._newest_end):
            self._newest_sent_at, self._newest_end = flight.sent_at, end
            self._newest_rtt = elapsed
        return rtt if flight.retransmitted else elapsed

    def detect(
        self, now: float, mss: int, recovering: bool, min_rtt: float, smoothed: float
    ) -> tuple[int, float | None]:
        """Mark what is lost by now, RFC 8985 section 6.2, step 5.

        Return (bytes newly lost, when to look again: None if nothing is suspected).
        """
        window = self._reordering_window(mss, recovering, min_rtt, smoothed)
        newest_at, newest_end = self._newest_sent_at, self._newest_end
        deadline: float | None = None
        lost = 0
        for flight in self.flights:
            if flight.sacked or flight.lost:
                continue
            if (flight.sent_at, flight.end) >= (newest_at, newest_end):
                if flight.retransmitted:
                    continue
                break  # sent once and after the newest: so are all behind it
            due = flight.sent_at + self._newest_rtt + window
            if due <= now:
                flight.lost = True
                lost += flight.end - flight.start
            elif deadline is None or due > deadline:
                deadline = due
        self.lost += lost
        self.losses += lost
        return lost, deadline

    def _reordering_window(
        self, mss: int, recovering: bool, min_rtt: float, smoothed: float
    ) -> float:
        """RFC 8985 section 6.2, step 4."""
        enough = self.sacked >= DUPLICATE_THRESHOLD * mss
        if not self._reordering_seen and (recovering or enough):
            return 0.0
        return min(self._window_multiplier * min_rtt / 4, smoothed)

    def duplicate_reported(self) -> None:
        """A DSACK: something was sent again without need, so wait longer before the next."""
        self._window_multiplier += 1
        self._window_persist = _REORDERING_PERSIST

    def recovery_ended(self) -> None:
        """After 16 recoveries without DSACK the reordering window is as at first."""
        self._window_persist -= 1
        if self._window_persist <= 0:
            self._window_multiplier = 1

    def lose_first(self, size: int) -> int:
        """Without SACK: take the first size bytes for lost (RFC 6582). Return bytes marked."""
        flight = self.flights[0]
        if flight.lost or flight.sacked:
            return 0
        if size < flight.end - flight.start:
            self.split(0, flight.start + size)
        flight.lost = True
        length = flight.end - flight.start
        self.lost += length
        self.losses += length
        return length

    def lose_all(self) -> None:
        """After a timeout: all that is not sacked is lost (RFC 8985 section 6.3; RFC 6675 section
        5.1 keeps the SACK information). If even the first flight is sacked, the peer has
        discarded it again, and nothing of it counts (RFC 2018 section 8)."""
        if self.flights and self.flights[0].sacked:
            for flight in self.flights:
                flight.sacked = False
            self.sacked = self.highest_sacked = 0
        for flight in self.flights:
            if not flight.sacked and not flight.lost:
                flight.lost = True
                self.lost += flight.end - flight.start
                self.losses += flight.end - flight.start

    def unlose(self) -> None:
        """The timeout was spurious: what was not sent again is still in flight."""
        for flight in self.flights:
            flight.lost = False
        self.lost = 0

    def next_lost(self) -> Iterator[int]:
        """Indices of lost flights from the front; the list may be split while it is walked."""
        index = 0
        while self.lost and index < len(self.flights):
            if self.flights[index].lost:
                yield index
            index += 1

    def clear(self) -> None:
        """Forget everything in flight."""
        self.flights.clear()
        self.sacked = self.lost = self.highest_sacked = 0
