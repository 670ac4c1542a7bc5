"""The relay inside the control session: when a client needs it, and what it then carries.

Peer packets go to the relay raw. Where the network drops them while the control session lives, they
go in its DATAGRAMs, each way by itself: `core.raw_hop` decides. Out: `PeerPath.route` -> `_send` ->
the control session. In: the control session -> `_receive` -> `Endpoint.take_inside`.
"""

import math
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import attrs
import structlog
import trio

from ztna.core import wire
from ztna.core.addresses import format_address, is_virtual
from ztna.core.ice.paths import Use
from ztna.core.inner_relay import (
    TOKEN_SIZE,
    encode_doubt,
    encode_probe,
    encode_relayed,
    parse_doubt_untrusted,
    parse_probe_untrusted,
    parse_relayed_untrusted,
    raw_probe,
)
from ztna.core.messages import RelayForm, encode_message
from ztna.core.ports import Address, UdpBatch
from ztna.core.raw_hop import RawHop
from ztna.core.wire import Feature
from ztna.errors import RemoteProtocolError
from ztna.net.batches import join_batches
from ztna.net.endpoint import Endpoint
from ztna.net.peer_path import PeerPath
from ztna.net.session import Session
from ztna.roles.control_client import ControlLink

log = structlog.get_logger(__name__)

# docs/protocol.md section 10. Seconds: what a peer session may leave unanswered on the relay before
# that is doubted; and how often it is doubted then.
PATIENCE = 0.3
DOUBT_EVERY = 0.5
# Our choice: 0x32 of one look; peers that are silent together have one cause.
MAX_DOUBTS = 16


def _new_hop() -> RawHop:
    return RawHop(lambda: secrets.token_bytes(TOKEN_SIZE))


@attrs.define(eq=False)
class InnerRelay:
    """Of one endpoint. `run` must run while it is used.

    peers: every peer path with its newest session.
    """

    endpoint: Endpoint
    peers: Callable[[], Iterable[tuple[PeerPath, Session]]]
    hop: RawHop = attrs.Factory(_new_hop)
    _link: ControlLink | None = None
    _wake: trio.Event = attrs.Factory(trio.Event)
    _look_at: float = math.inf
    _acknowledged: int = -1
    _counters: Counter[str] = attrs.Factory(Counter)

    def __attrs_post_init__(self) -> None:
        way = self.endpoint.paths.way
        way.on_used, way.on_answer = self._used, self._answered_raw

    async def run(self) -> None:
        """Ask when there is doubt, until cancelled."""
        while True:
            self._wake = trio.Event()
            now = trio.current_time()
            if now >= self._look_at:
                self._look(now)
            if self.hop.handle_timer(now, self._rtt):
                self._follow()
            self._ask()
            timer = self.hop.get_timer()
            with trio.move_on_at(min(self._look_at, math.inf if timer is None else timer)):
                await self._wake.wait()

    def control_up(self, link: ControlLink) -> None:
        """A control session is up, perhaps another one than before."""
        self._link, hop = link, self.hop
        hop.switch_off()
        accepted = link.accepted
        over_tls = is_virtual(link.session.remote_address)
        if over_tls or accepted is None or Feature.RELAYED not in accepted.features:
            hop.pass_all()
        else:
            link.decapsulator.relayed = []
            link.on_relayed = self._receive
            link.session.on_use = self._session_used
            if not hop.down:
                link.session.send_control(encode_message(RelayForm(inner=True)))
        self._set_way()

    def control_down(self, link: ControlLink) -> None:
        """It is gone."""
        if self._link is link:
            self._link = None
            self.hop.switch_off()

    def channel_given(self) -> None:
        """There is a channel by which to ask."""
        link = self._link
        if link is not None and link.on_relayed is not None and not self.hop.on:
            self.hop.switch_on(trio.current_time(), self._rtt)
            self._wake.set()

    @property
    def words(self) -> str:
        """Which ways run inside the control session; empty if none does."""
        match self.hop.up, self.hop.down:
            case True, True:
                return ""
            case False, False:
                return "both ways"
            case False, True:
                return "to the intermediate"
        return "from the intermediate"

    def statistics(self) -> Mapping[str, object]:
        """Which ways run inside, rounds of questions, what was dropped by reason."""
        return {"inside": self.words or "no way", "rounds": self.hop.rounds, **self._counters}

    # --- what goes by the relay ---------------------------------------------------------------

    def _send(self, channel: bytes, batch: UdpBatch) -> None:
        link = self._link
        if link is None:
            self._counters["drop_no_control_session"] += 1
            return
        messages = encode_relayed(batch, channel)
        link.session.send_datagrams(link.encapsulator.fit(messages))

    def _receive(self, link: ControlLink, messages: list[bytes]) -> None:
        batches: list[UdpBatch] = []
        relay, now = link.session.remote_address, trio.current_time()
        for message in messages:
            try:
                batches += self._receive_untrusted(relay, message, now)
            except RemoteProtocolError:
                self._counters["drop_malformed"] += 1
        self.endpoint.take_inside(join_batches(batches))

    def _receive_untrusted(self, relay: Address, message: bytes, now: float) -> list[UdpBatch]:
        paths = self.endpoint.paths
        match message[0]:
            case wire.RELAYED:
                batch = paths.take_inside(*parse_relayed_untrusted(message), relay)
                return [] if batch is None else [batch]
            case wire.RAW_PROBE:
                if self.hop.receive_answer(parse_probe_untrusted(message), now, up=True):
                    self._follow()
            case _:
                if paths.knows(parse_doubt_untrusted(message), relay):
                    self.hop.doubt(now, self._rtt)
                    self._wake.set()
        return []

    # --- whether raw packets pass -------------------------------------------------------------

    def _used(self) -> None:
        """Something goes by the relay: is it answered?"""
        if self._look_at == math.inf:
            self._look_at = trio.current_time() + PATIENCE
            self._wake.set()

    def _look(self, now: float) -> None:
        """Doubt the relay where peer sessions that use it wait for answers."""
        waiting = [
            (session.unanswered_since + PATIENCE, path.channel)
            for path, session in self.peers()
            if path.channel is not None and (path.direct is None or path.relay_too)
        ]
        silent = [channel for due, channel in waiting if due <= now][:MAX_DOUBTS]
        self._look_at = min((due for due, _ in waiting), default=math.inf)
        if silent:
            self._look_at = now + DOUBT_EVERY
            self.hop.doubt(now, self._rtt)
            if self.hop.on and self._link is not None:
                self._link.session.send_datagrams([encode_doubt(each) for each in silent])

    def _ask(self) -> None:
        token, link = self.hop.token_to_send(), self._link
        if token is None or link is None:
            return
        relay = link.session.remote_address
        link.session.send_datagrams([encode_probe(token)])
        channel = self.endpoint.paths.any_channel(relay)
        if channel is not None:
            self.endpoint.port.send_nowait([raw_probe(channel, token, relay)])

    def _answered_raw(self, token: bytes) -> None:
        if self.hop.receive_answer(token, trio.current_time(), up=False):
            self._follow()

    def _session_used(self, use: Use, _: float) -> None:
        if use.acknowledged != self._acknowledged:
            self._acknowledged = use.acknowledged
            self.hop.session_acknowledged()

    @property
    def _rtt(self) -> float:
        return 0.0 if self._link is None else self._link.session.rtt

    def _set_way(self) -> None:
        way = self.endpoint.paths.way
        way.inside, way.words = None if self.hop.up else self._send, self.words

    def _follow(self) -> None:
        """A direction has changed."""
        self._set_way()
        self._wake.set()
        link = self._link
        if link is None:
            return
        link.session.send_control(encode_message(RelayForm(inner=not self.hop.down)))
        where = format_address(link.session.remote_address)
        if self.words:
            log.warning("the relay runs inside the control session", ways=self.words, relay=where)
        else:
            log.info("the relay takes raw packets again", relay=where)
        for path, session in self.peers():
            if path.direct is None:
                session.path_changed(("relay", self.words))
