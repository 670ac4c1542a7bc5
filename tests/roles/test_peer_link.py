"""What a peer says on the control stream of a peer session is looked at no faster than honest ones
need it; what is over waits, and too much of that ends the session."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.roles.peers import frame
from tests.roles.test_peer_sessions import ask, deployment
from tests.roles.user_host import UserHost
from ztna.core.ice.messages import IceMessage, PunchingResult
from ztna.core.ports import Address
from ztna.net.closing import CloseCode
from ztna.net.session import Session
from ztna.roles import agent_peers, connector_peers
from ztna.roles.peer_link import (
    CONTROL_BURST,
    CONTROL_RATE,
    FRAME_BURST,
    FRAME_RATE,
    PeerLink,
    new_link,
)

RESULT = PunchingResult(1, "failed", "", ())
# Of an unknown type, and 64,000 bytes.
LARGE = frame({"type": "x", "a": "y" * 63_974})


@attrs.define(eq=False)
class Ends:
    """The two ends of the session that a user has had an answer by. heard: messages about direct
    paths that `victim` has looked at."""

    user: UserHost
    sender: PeerLink
    victim: PeerLink
    heard: int = 0

    def hear(self, _: IceMessage) -> None:
        self.heard += 1


@asynccontextmanager
async def session_of(side: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ends]:
    """side: who is to bear what the other one says."""
    links: dict[str, PeerLink] = {}
    for name, module in (("agent", agent_peers), ("connector", connector_peers)):

        def note(session: Session, relay: Address | None, name: str = name) -> PeerLink:
            links[name] = new_link(session, relay)
            return links[name]

        monkeypatch.setattr(module, "new_link", note)
    async with deployment() as (_, agent), UserHost.open(agent) as user:
        with trio.fail_after(30):
            assert await ask(user) == b"hello"
        victim = links.pop(side)
        (sender,) = links.values()
        ends = Ends(user, sender, victim)
        victim.receive_signal = ends.hear
        yield ends


SIDES = pytest.mark.parametrize("side", ["agent", "connector"])


@SIDES
async def test_messages_without_end(
    side: str, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with session_of(side, monkeypatch) as ends:
        count = int(FRAME_BURST) + 320
        for _ in range(count):
            ends.sender.send(RESULT)
        await trio.sleep(1)
        assert FRAME_BURST - 10 < ends.heard <= FRAME_BURST + 1.1 * FRAME_RATE
        assert await ask(ends.user) == b"hello"
        await trio.sleep(320 / FRAME_RATE)
        assert ends.heard == count, "what is over has waited"
        assert not ends.victim.session.closed


@SIDES
async def test_bytes_without_end(
    side: str, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with session_of(side, monkeypatch) as ends:
        for _ in range(12):
            ends.sender.session.send_control(LARGE)
        await trio.sleep(1)
        looked_at = ends.victim.reader.ignored * len(LARGE)
        assert looked_at <= CONTROL_BURST + 1.1 * CONTROL_RATE
        assert await ask(ends.user) == b"hello"
        await trio.sleep(5)
        assert ends.victim.reader.ignored == 12


@SIDES
async def test_who_goes_on_loses_the_session(
    side: str, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with session_of(side, monkeypatch) as ends:
        with trio.fail_after(10):
            while not ends.sender.session.closed:
                ends.sender.session.send_control(LARGE)
                await trio.sleep(0.05)
            closed = await ends.sender.session.wait_closed()
        assert (closed.code, closed.by_peer) == (CloseCode.LIMIT, True)
        with trio.fail_after(30):
            assert await ask(ends.user) == b"hello", "another one follows"


async def test_a_status_of_many_services_is_answered_at_once(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 services, eight at a time, which is as many as the connector tries at once."""
    async with session_of("connector", monkeypatch) as ends:
        at_once = trio.CapacityLimiter(8)

        async def ask_once() -> None:
            async with at_once:
                assert await ends.sender.health.ask("echo", ends.sender.send) is not None

        with trio.fail_after(3):
            async with trio.open_nursery() as nursery:
                for _ in range(256):
                    nursery.start_soon(ask_once)
