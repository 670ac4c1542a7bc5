"""How large the packets of one session may be: its own search, or another's word.

On the way to an intermediate, and through a relay, the session probes by itself, with QUIC packets
of PING and PADDING (RFC 9000 section 14.4): they go end to end, whatever carries them, and only the
peer can acknowledge them. Of a direct path the checks of hole punching find out before the session
is there (`core.ice`), which then says the size.
"""

import functools

import attrs
from aioquic.quic.connection import QuicConnection

from ztna.core.addresses import is_virtual
from ztna.core.channels import PREFIX_SIZE
from ztna.core.mtuprobe import IPV4_OVERHEAD, IPV6_OVERHEAD
from ztna.core.mtusearch import MtuSearch
from ztna.core.ports import Address
from ztna.net.aioquic_private.mtu_probe import build_probe, may_probe


def headers_to(address: Address) -> int:
    """Bytes of the headers of IP and UDP on packets to an address; a virtual one takes the least of
    them, and what a relay adds."""
    if is_virtual(address):
        return IPV4_OVERHEAD + PREFIX_SIZE
    return IPV6_OVERHEAD if ":" in address[0] else IPV4_OVERHEAD


def headers_through(relay: Address | None) -> int:
    """Bytes of all headers on peer packets that go by a relay."""
    return PREFIX_SIZE + (
        IPV4_OVERHEAD if relay is None or is_virtual(relay) else headers_to(relay)
    )


@attrs.define(eq=False)
class SessionMtu:
    """size: bytes of the largest UDP payload now.

    search: of this session's own; None before it may begin, and while another says the size.
    """

    connection: QuicConnection = attrs.field(repr=False)
    size: int
    search: MtuSearch | None = attrs.field(default=None, init=False)
    probes: int = attrs.field(default=0, init=False)
    _told: bool = attrs.field(default=False, init=False)
    _answers: list[tuple[MtuSearch, int, float]] = attrs.field(factory=list, init=False, repr=False)

    def be_told(self, size: int) -> None:
        """Another knows the path: this is the size."""
        self.size, self.search, self._told = size, None, True

    def begin_anew(self, size: int) -> None:
        """Another path, of which nothing is known but that it carries `size` bytes."""
        self.size, self.search, self._told = size, None, False

    def suspect(self, now: float) -> None:
        """Large packets seem to vanish, or all do."""
        if self.search is not None:
            self.search.suspect(now)

    def answers_again(self, now: float) -> None:
        """The peer was silent, and is not any more: perhaps on another path."""
        if self.search is not None:
            self.search.confirmed = True
            self.search.start(now)

    def probes_to_send(self, overhead: int, now: float) -> list[tuple[bytes, Address]]:
        """What is due; `size` is right afterwards. overhead: bytes of all headers around what the
        session sends."""
        if self._told or not may_probe(self.connection):
            return []
        if self.search is None or self.search.overhead != overhead:
            self.search = MtuSearch(overhead, confirmed=True)
            self.search.start(now)
        search = self.search
        for of, size, sent_at in self._answers:
            if of is search:
                search.receive_answer(size, sent_at, now)
        self._answers.clear()
        search.handle_timer(now)
        self.size = search.size
        sizes = search.probes_to_send(now)
        self.probes += len(sizes)
        return [self._build(search, size, now) for size in sizes]

    def get_timer(self) -> float | None:
        """When to ask for probes again."""
        return None if self.search is None else self.search.get_timer()

    def _build(self, search: MtuSearch, size: int, now: float) -> tuple[bytes, Address]:
        acknowledged = functools.partial(self._answers.append, (search, size, now))
        return build_probe(self.connection, size, now, acknowledged)
