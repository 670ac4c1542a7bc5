"""What a connector keeps for one agent, and how long it believes that the agent may be here.

The intermediate's word for an agent ends with `ChannelClosed`, or is given anew by each control
session. While no control session is up, what was said last counts; while one is up and does not
name the agent, a direct session goes on for a while: the agent may be about to come back there.
"""

import ipaddress
import math
from collections.abc import Callable, Iterable

import attrs
import trio

from ztna.backend.terminator import Terminator
from ztna.core.addresses import source_and_destination
from ztna.core.identity import Identity
from ztna.core.limits import RateGate
from ztna.core.ports import IpPacket
from ztna.errors import RemoteProtocolError
from ztna.net.closing import CloseCode
from ztna.net.peer_path import PeerPath
from ztna.net.session import Session
from ztna.roles.control_client import ControlLink
from ztna.roles.handover import Retired
from ztna.roles.health import HealthDesk
from ztna.roles.peer_link import PeerLink

# Seconds, our choice: an agent whose UDP is blocked is at the intermediate over TLS within one of
# these minutes, and one whose intermediate was away within a backoff.
CONFIRMED_FOR = 600.0
# Seconds, our choice: how long flows of an agent that is gone are kept, some longer than TCP's and
# UDP's own patience of 120 s.
KEPT = 180.0
# Bytes taken from the flows at a time: a few super-packets, so that flows take turns often.
SEND_BATCH = 192 * 1024
# Seconds, our choice: how long the socket may hold up an end.
SEND_PATIENCE = 0.5
# Lines a second that one agent can cause in the log by its sessions and channels, and at once; our
# choice: one that roams causes four each time.
LINE_RATE, LINE_BURST = 0.2, 40.0


@attrs.define
class Stopwatch:
    """Adds up the seconds between `start` and `stop`."""

    total: float = 0.0
    since: float = math.inf

    def start(self, now: float) -> None:
        """No effect while it runs."""
        self.since = min(self.since, now)

    def stop(self, now: float) -> None:
        """Keep what it has counted."""
        self.total, self.since = self.elapsed(now), math.inf

    def reset(self) -> None:
        """Begin at nothing, and stand."""
        self.total, self.since = 0.0, math.inf

    def elapsed(self, now: float) -> float:
        """Seconds until now."""
        return self.total + max(0.0, now - self.since)


@attrs.define(eq=False)
class AgentSide:
    """What a connector keeps for one agent.

    granted: services by the intermediate's word. addresses: tunnel addresses that the agent's
    packets may come from, packed. link: its session, while there is one. retired: the one before.
    host: where the intermediate sees it. told_by: the control session that announced it last.
    left_at: when it was found to be neither here nor expected, s. lines: what it causes in the log.
    unnamed: for how long a control session was up that did not name it.
    """

    identity: Identity
    path: PeerPath
    terminator: Terminator
    session_id: str = ""
    granted: frozenset[str] = frozenset()
    addresses: frozenset[bytes] = frozenset()
    link: PeerLink | None = None
    retired: Retired = attrs.Factory(Retired)
    host: str = ""
    told_by: ControlLink | None = None
    scope: trio.CancelScope = attrs.Factory(trio.CancelScope)
    left_at: float = math.inf
    health: HealthDesk = attrs.Factory(HealthDesk)
    wrong_source: int = 0
    unnamed: Stopwatch = attrs.Factory(Stopwatch)
    lines: RateGate = attrs.Factory(lambda: RateGate(LINE_RATE, LINE_BURST))

    def may_log(self) -> bool:
        """Whether one more line about this agent is no flood."""
        return self.lines.allow(trio.current_time())

    def statistics(self) -> dict[str, object]:
        """Of its session, its path and its flows."""
        return {
            **(self.link.statistics() if self.link is not None else {}),
            **self.path.counters,
            **self.terminator.statistics(),
            "drop_wrong_source": self.wrong_source,
            "drop_health": self.health.refused,
            "session_lines_suppressed": self.lines.suppressed,
        }

    def has_left(self, now: float, control: ControlLink | None) -> bool:
        """Whether it has been neither here nor expected for long."""
        expected = self.path.channel is not None and self.told_by is control
        if self.link is not None or expected:
            self.left_at = math.inf
        elif self.left_at == math.inf:
            self.left_at = now
        return self.left_at + KEPT <= now

    def receive_packets(self, packets: Iterable[tuple[str, IpPacket]]) -> None:
        """Give its flows what comes from its own addresses."""
        own = []
        for service_id, packet in packets:
            addresses = source_and_destination(bytes(packet.data[:40]))
            if addresses is not None and addresses[0] in self.addresses:
                own.append((service_id, packet))
            else:
                self.wrong_source += 1
        if own:
            self.terminator.receive_packets(own)

    async def send_answers(self, link: PeerLink) -> None:
        """Take what its flows have to say to a session, no faster than it goes out."""
        while True:
            await link.session.wait_datagram_room()
            packets = await self.terminator.packets_to_send(SEND_BATCH)
            labels = link.labels
            # What was taken is sent, also where another session takes over in this moment.
            with trio.move_on_after(SEND_PATIENCE, shield=True):
                await link.send_packets(
                    [(labels[i], packet) for i, packet in packets if i in labels]
                )

    def drop_sessions(self, good: Callable[[Session], bool]) -> None:
        """Take from it the sessions that are not good any more."""
        if self.link is not None and not good(self.link.session):
            self.link = None
            self.terminator.set_services({}, {})  # its flows end; the next session has others
        if self.retired.link is not None and not good(self.retired.link.session):
            self.retired.link = None

    def close_sessions(self, reason: str) -> None:
        """End the one that it has, and the one before."""
        for link in (self.link, self.retired.link):
            if link is not None:
                link.session.close(CloseCode.EXPIRED, reason)


def packed_untrusted(address4: str | None, address6: str | None) -> frozenset[bytes]:
    """The tunnel addresses that an agent may send from."""
    try:
        packed = [
            *([] if address4 is None else [ipaddress.IPv4Address(address4).packed]),
            *([] if address6 is None else [ipaddress.IPv6Address(address6).packed]),
        ]
    except ValueError as error:
        raise RemoteProtocolError(f"malformed tunnel address: {error!s:.120}") from error
    return frozenset(packed)
