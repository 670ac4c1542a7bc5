"""The MTU of a path, by STUN requests of many sizes that no router may fragment (DF set).

`start` -> `requests_to_send` -> `receive_response_untrusted` until `get_timer` is None; then
`result`. RFC 5780 section 7.6 has the server fill its answer with PADDING up to the request's size,
so the way back is measured too, if the server sets DF. All sizes are asked at once, and again while
a larger one than the largest known has not been answered.
"""

import random
from collections.abc import Sequence

import attrs

from ztna.core.ports import Address, Buffer
from ztna.core.stun.attributes import Padding
from ztna.core.stun.messages import (
    TRANSACTION_ID_SIZE,
    MessageClass,
    StunMessage,
    build_stun_message,
    parse_stun_untrusted,
)
from ztna.errors import RemoteProtocolError

# Our choice: what links and tunnels leave of an Ethernet frame, in multiples of four, as STUN
# messages are: PPPoE 1492, 6in4 1480, GRE 1476, VXLAN 1450, WireGuard 1420, IPv6's least 1280, and
# steps between.
MTUS = (1500, 1492, 1480, 1476, 1460, 1448, 1440, 1420, 1400, 1380, 1360, 1320, 1280)
# Our choice: as `core.natprobe` begins, and one more attempt than a path with 10 % loss needs.
INTERVAL = 0.5
MAX_ROUNDS = 3

IPV4_OVERHEAD = 28
"""Bytes of the headers of IPv4 (no options) and UDP."""

IPV6_OVERHEAD = 48
"""Bytes of the headers of IPv6 and UDP."""


@attrs.frozen(slots=True)
class PathMtu:
    """The largest MTU that passed, in bytes; None: not even the smallest that was tried.

    forth: requests of this size were answered. back: so large were answers; less than `forth` where
    the server does not fill them. A filled answer that is too large for the way back does not
    come, so the narrower direction counts for both.
    """

    forth: int | None
    back: int | None


@attrs.define
class MtuProber:
    """Finds the MTU between a socket with DF set and a STUN server.

    now: seconds of a monotonic clock. random: for transaction ids, cryptographic.
    """

    server: Address
    random: random.Random
    _requests: dict[bytes, tuple[int, bytes]] = attrs.field(init=False, factory=dict)
    _outbox: list[bytes] = attrs.field(init=False, factory=list)
    _forth: int = attrs.field(init=False, default=0)
    _back: int = attrs.field(init=False, default=0)
    _rounds: int = attrs.field(init=False, default=0)
    _due: float | None = attrs.field(init=False, default=None)

    def start(self, now: float) -> None:
        """Begin; `requests_to_send` has all sizes then."""
        for mtu in MTUS:
            transaction_id = self.random.randbytes(TRANSACTION_ID_SIZE)
            self._requests[transaction_id] = (mtu, _build(transaction_id, mtu - self._overhead))
        self._send_round(now)

    @property
    def _overhead(self) -> int:
        return IPV6_OVERHEAD if ":" in self.server[0] else IPV4_OVERHEAD

    @property
    def result(self) -> PathMtu:
        """What is known so far."""
        return PathMtu(self._forth or None, self._back or None)

    def requests_to_send(self, now: float) -> Sequence[bytes]:  # noqa: ARG002 - one vocabulary
        """Payloads for the server; empties the queue."""
        requests, self._outbox = self._outbox, []
        return requests

    def get_timer(self) -> float | None:
        """When to call `handle_timer`. None: not begun, or over."""
        return self._due

    def handle_timer(self, now: float) -> None:
        """Ask once more, or be content with what came."""
        if self._due is None or now < self._due:
            return
        if self._rounds < MAX_ROUNDS:
            self._send_round(now)
        else:
            self._due = None

    def receive_response_untrusted(self, data: Buffer, source: Address) -> None:
        """A payload came from `source`. What does not belong to the probe is ignored.

        An error says as well as a success that the request has arrived.
        """
        try:
            message = parse_stun_untrusted(data)
        except RemoteProtocolError:
            return
        answers = {MessageClass.SUCCESS, MessageClass.ERROR}
        request = self._requests.get(message.transaction_id)
        if request is None or source != self.server or message.message_class not in answers:
            return
        mtu, _ = request
        self._forth = max(self._forth, mtu)
        if len(data) + self._overhead >= mtu:
            self._back = max(self._back, mtu)
        if self._back == max(MTUS):
            self._due = None

    def _send_round(self, now: float) -> None:
        self._rounds += 1
        self._due = now + INTERVAL
        known = min(self._forth, self._back)
        self._outbox += [data for mtu, data in self._requests.values() if mtu > known]


def _build(transaction_id: bytes, size: int) -> bytes:
    def build(padding: int) -> bytes:
        message = StunMessage(MessageClass.REQUEST, transaction_id, (Padding(padding),))
        return build_stun_message(message)

    return build(size - len(build(0)))
