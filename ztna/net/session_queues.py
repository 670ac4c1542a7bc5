"""The outside of a session: what roles call, and the bounded queues behind it.

`Session` adds the pump, which moves bytes between these queues and the QUIC connection. Methods
here change a queue or a flag and wake the pump; they never touch the connection.
"""

from collections import deque
from collections.abc import Callable, Hashable, Sequence

import attrs
import trio
from trio.lowlevel import ParkingLot

from ztna.core.addresses import format_address, is_virtual
from ztna.core.ice.paths import Use
from ztna.core.ports import Address
from ztna.errors import LocalProtocolError, SessionClosedError
from ztna.net.closing import CloseCode, CloseInfo
from ztna.net.session_settings import SessionSettings
from ztna.net.tls import VerifiedPeer

Receiver = Callable[[list[bytes]], None]
"""Takes DATAGRAMs, in order."""

Refit = Callable[[list[bytes], int], list[bytes]]
"""Takes messages, and bytes of the largest DATAGRAM; gives the same, cut where they do not fit."""

_COUNTERS = (
    "sent_packets",
    "sent_bytes",
    "received_bytes",
    "sent_datagrams",
    "received_datagrams",
    "drop_not_open",
    "drop_too_large",
    "drop_outgoing_full",
    "drop_incoming_full",
    "drop_inbox_full",
    "drop_handshake_bytes",
    "other_streams",
)


@attrs.frozen
class PathChange:
    """path: a name of the new one. max_udp_payload: bytes; 0 if nobody knows. rtt: s."""

    path: Hashable
    max_udp_payload: int
    rtt: float | None


@attrs.define(eq=False)
class SessionQueues:
    """What a role sees of a session.

    One task at a time reads datagrams, one the control stream; any may send.

    max_datagram_data: bytes of the largest DATAGRAM data that fits; 0 before the peer is verified.
    suspect: the peer has left data or a PING unanswered for longer than `settings.patience`.
    on_use: hears after each round of the pump what became of the packets; at a time (s).
    overhead: bytes of all headers that a packet gets on its way; to be set where a relay adds some.
    refit: cuts what waits when packets must be smaller; without it that is dropped.
    """

    settings: SessionSettings
    is_client: bool
    remote_address: Address
    max_datagram_data: int = attrs.field(default=0, init=False)
    suspect: bool = attrs.field(default=False, init=False)
    on_use: Callable[[Use, float], None] | None = attrs.field(default=None, init=False, repr=False)
    overhead: int = attrs.field(init=False)
    refit: Refit | None = attrs.field(default=None, init=False, repr=False)
    _peer: VerifiedPeer | None = attrs.field(default=None, init=False)
    _close_info: CloseInfo | None = attrs.field(default=None, init=False)
    _close_wanted: tuple[int, str] | None = attrs.field(default=None, init=False, repr=False)
    _path_wanted: PathChange | None = attrs.field(default=None, init=False, repr=False)
    _doubted: bool = attrs.field(default=False, init=False)
    _size_wanted: int | None = attrs.field(default=None, init=False, repr=False)
    _outgoing: deque[bytes] = attrs.field(factory=deque, init=False, repr=False)
    _incoming: list[bytes] = attrs.field(factory=list, init=False, repr=False)
    _receiver: Receiver | None = attrs.field(default=None, init=False, repr=False)
    _incoming_bytes: int = attrs.field(default=0, init=False, repr=False)
    _control_out: bytearray = attrs.field(factory=bytearray, init=False, repr=False)
    _control_unacknowledged: int = attrs.field(default=0, init=False, repr=False)
    _control_in: bytearray = attrs.field(factory=bytearray, init=False, repr=False)
    _control_ended: bool = attrs.field(default=False, init=False, repr=False)
    _wake: trio.Event = attrs.field(factory=trio.Event, init=False, repr=False)
    _changed: ParkingLot = attrs.field(factory=ParkingLot, init=False, repr=False)
    _datagrams_here: ParkingLot = attrs.field(factory=ParkingLot, init=False, repr=False)
    _control_here: ParkingLot = attrs.field(factory=ParkingLot, init=False, repr=False)
    _room_here: ParkingLot = attrs.field(factory=ParkingLot, init=False, repr=False)
    _asked: int = attrs.field(default=0, init=False, repr=False)
    _questions: dict[int, bool] = attrs.field(factory=dict, init=False, repr=False)
    _counters: dict[str, int] = attrs.field(
        factory=lambda: dict.fromkeys(_COUNTERS, 0), init=False, repr=False
    )

    @property
    def where(self) -> str:
        """The peer's address, for logs."""
        return format_address(self.remote_address)

    @property
    def name(self) -> str:
        """The peer, for people: a virtual address says nothing to them."""
        if self._peer is not None and is_virtual(self.remote_address):
            return str(self._peer.identity)
        return self.where

    @property
    def peer(self) -> VerifiedPeer:
        """Who the peer is. Raises LocalProtocolError before that is verified."""
        if self._peer is None:
            raise LocalProtocolError("the peer of this session is not verified yet")
        return self._peer

    @property
    def verified(self) -> bool:
        """Whether the handshake is complete and the peer's certificate was judged good."""
        return self._peer is not None

    @property
    def closed(self) -> bool:
        """Whether the session has ended; what was received may still be read."""
        return self._close_info is not None

    async def wait_verified(self) -> VerifiedPeer:
        """Wait for the handshake and the check of the peer's certificate.

        On the client the server may still refuse us afterwards. Raises SessionClosedError.
        """
        await trio.lowlevel.checkpoint()
        while self._peer is None:
            self._raise_if_closed()
            await self._changed.park()
        return self._peer

    async def wait_address_change(self, last: Address) -> Address:
        """Wait until the peer's address is another than last; return it.

        Raises SessionClosedError.
        """
        await trio.lowlevel.checkpoint()
        while self.remote_address == last:
            self._raise_if_closed()
            await self._changed.park()
        return self.remote_address

    async def wait_suspect(self, *, suspect: bool = True) -> None:
        """Wait until the peer is suspected to be dead, or not any more.

        Raises SessionClosedError.
        """
        await trio.lowlevel.checkpoint()
        while self.suspect is not suspect:
            self._raise_if_closed()
            await self._changed.park()

    async def wait_closed(self) -> CloseInfo:
        """Wait for the end of the session; say how it came."""
        await trio.lowlevel.checkpoint()
        while self._close_info is None:
            await self._changed.park()
        return self._close_info

    async def ask(self) -> float:
        """Have the peer acknowledge a PING of its own; return the seconds that took.

        Waits for as long as that takes. Raises SessionClosedError.
        """
        self._asked += 1
        number, begun = self._asked, trio.current_time()
        self._questions[number] = False
        self._wake.set()
        try:
            await trio.lowlevel.checkpoint()
            while number in self._questions:
                self._raise_if_closed()
                await self._changed.park()
        finally:
            self._questions.pop(number, None)
        return trio.current_time() - begun

    def _take_questions(self) -> list[int]:
        """PINGs to send that were not sent yet."""
        fresh = [number for number, sent in self._questions.items() if not sent]
        self._questions.update(dict.fromkeys(fresh, True))
        return fresh

    def _take_answer(self, number: int) -> None:
        """The peer has acknowledged a PING."""
        if self._questions.pop(number, None) is not None:
            self._changed.unpark_all()

    def deliver_datagrams(self, receiver: Receiver) -> None:
        """From now on hand DATAGRAMs to a function as they come, instead of `receive_datagrams`.

        It is called by the pump, must not wait, and raises nothing for what the peer sent.
        """
        self._receiver = receiver
        self._deliver()

    async def receive_datagrams(self) -> list[bytes]:
        """Wait for at least one DATAGRAM; return all that are there, in order.

        Raises SessionClosedError once the session is closed and everything has been read.
        """
        await trio.lowlevel.checkpoint()
        while not self._incoming:
            self._raise_if_closed()
            await self._datagrams_here.park()
        datagrams, self._incoming, self._incoming_bytes = self._incoming, [], 0
        return datagrams

    def send_datagrams(self, datagrams: Sequence[bytes]) -> int:
        """Queue DATAGRAMs; return how many. Never waits: too large ones and what is over the
        bound is dropped and counted."""
        limit = self.max_datagram_data
        if self._peer is None or self._close_info is not None:
            self._counters["drop_not_open"] += len(datagrams)
            return 0
        if datagrams and max(map(len, datagrams)) > limit:
            fitting = [data for data in datagrams if len(data) <= limit]
            self._counters["drop_too_large"] += len(datagrams) - len(fitting)
            datagrams = fitting
        room = self.datagram_room
        if len(datagrams) > room:
            self._counters["drop_outgoing_full"] += len(datagrams) - room
            datagrams = datagrams[:room]
        self._outgoing.extend(datagrams)
        self._kick()
        return len(datagrams)

    @property
    def datagram_room(self) -> int:
        """How many more DATAGRAMs the outgoing queue takes now."""
        return max(0, self.settings.outgoing_datagrams - len(self._outgoing))

    async def wait_datagram_room(self) -> None:
        """Wait until the outgoing queue is less than half full. Raises SessionClosedError."""
        await trio.lowlevel.checkpoint()
        self._raise_if_closed()
        while len(self._outgoing) > self.settings.outgoing_datagrams // 2:
            await self._room_here.park()
            self._raise_if_closed()

    def send_control(self, data: bytes) -> None:
        """Write to the control stream. A peer that leaves more than `control_backlog` bytes
        unread ends the session with code `limit`."""
        if self._close_info is not None:
            return
        backlog = self._control_unacknowledged + len(self._control_out)
        if backlog + len(data) > self.settings.control_backlog:
            self.close(CloseCode.LIMIT, "the peer does not read its control stream")
            return
        self._control_out += data
        self._kick()

    async def receive_control(self) -> bytes:
        """Wait for bytes of the control stream; b"" at its end. Raises SessionClosedError."""
        await trio.lowlevel.checkpoint()
        while not self._control_in:
            if self._control_ended:
                return b""
            self._raise_if_closed()
            await self._control_here.park()
        data = bytes(self._control_in)
        self._control_in.clear()
        return data

    def close(self, code: int, reason: str) -> None:
        """Close with an application code; the pump sends it. The first close counts."""
        if self._close_wanted is None:
            self._close_wanted = (code, reason)
            self._kick()

    def path_changed(
        self, path: Hashable, *, max_udp_payload: int = 0, rtt: float | None = None
    ) -> None:
        """What is sent from now on takes another path: what is in flight is given up, windows and
        times are the new path's, and a PING goes at once (`aioquic_private.path_change`).

        max_udp_payload: bytes, by somebody who watches the path's MTU; 0 if the session shall find
        it out by itself."""
        self._path_wanted, self._size_wanted = PathChange(path, max_udp_payload, rtt), None
        self._kick()

    def resize(self, max_udp_payload: int) -> None:
        """The path's MTU is another one, by the word of who watches it."""
        self._size_wanted = max_udp_payload
        self._kick()

    def path_doubted(self) -> None:
        """What is in flight may have met a black hole: it is given up, so that it fills no window
        while packets go another way besides, and a PING goes at once."""
        self._doubted = True
        self._kick()

    def _raise_if_closed(self) -> None:
        if self._close_info is not None:
            info = self._close_info
            raise SessionClosedError(info.reason, info.code, by_peer=info.by_peer)

    # --- for the pump -------------------------------------------------------------------------

    def _kick(self) -> None:
        """There is something for the pump to do."""
        self._wake.set()

    def _deliver(self) -> None:
        """Hand what came to the receiver, if there is one."""
        if self._receiver is not None and self._incoming:
            datagrams, self._incoming, self._incoming_bytes = self._incoming, [], 0
            self._receiver(datagrams)

    def _put_datagrams(self, datagrams: Sequence[bytes]) -> None:
        """Take what the peer sent; the newest is dropped when nobody reads."""
        self._counters["received_datagrams"] += len(datagrams)
        settings = self.settings
        room = settings.incoming_datagrams - len(self._incoming)
        if self._incoming_bytes > settings.incoming_bytes:
            room = 0
        if len(datagrams) > room:
            self._counters["drop_incoming_full"] += len(datagrams) - room
            datagrams = datagrams[:room]
        if datagrams:
            self._incoming.extend(datagrams)
            self._incoming_bytes += sum(map(len, datagrams))
            self._datagrams_here.unpark_all()

    def _put_control(self, data: bytes, *, ended: bool) -> None:
        self._control_in += data
        self._control_ended = self._control_ended or ended
        self._control_here.unpark_all()
        if len(self._control_in) > self.settings.control_backlog:
            self.close(CloseCode.LIMIT, "the control stream is not read fast enough")

    def _room_made(self) -> None:
        if len(self._outgoing) <= self.settings.outgoing_datagrams // 2:
            self._room_here.unpark_all()

    def _set_peer(self, peer: VerifiedPeer, max_datagram_data: int) -> None:
        self._peer = peer
        self.max_datagram_data = max_datagram_data
        self._changed.unpark_all()

    def _set_max_datagram(self, limit: int) -> None:
        """Another limit; what is queued and too large for it is cut, or dropped where it cannot."""
        self.max_datagram_data = limit
        waiting = list(self._outgoing)
        if max(map(len, waiting), default=0) <= limit:
            return
        if self.refit is not None:
            waiting = self.refit(waiting, limit)
        fitting = [data for data in waiting if len(data) <= limit]
        self._counters["drop_too_large"] += len(waiting) - len(fitting)
        self._outgoing.clear()
        self._outgoing.extend(fitting)

    def _set_suspect(self, *, suspect: bool) -> None:
        self.suspect = suspect
        self._changed.unpark_all()

    def _set_remote_address(self, address: Address) -> None:
        self.remote_address = address
        self._changed.unpark_all()

    def _set_closed(self, info: CloseInfo) -> None:
        """The session has ended: nothing more goes out, whoever waits is told."""
        if self._close_info is None:
            self._close_info = info
        self._outgoing.clear()
        self._control_out.clear()
        for lot in (self._changed, self._datagrams_here, self._control_here, self._room_here):
            lot.unpark_all()
