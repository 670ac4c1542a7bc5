"""Direct paths against those who lie, by whole roles: strangers, a peer, and an intermediate.

What the core does of this is in `tests/core/ice/test_hostile_peer.py`. Here somebody good uses the
same connector all the while, and must notice nothing.
"""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, closing

import attrs
import pytest
import structlog
import trio
from trio.testing import MockClock
from trio_util import periodic

from tests.nat.liars import let_lie
from tests.nat.punchers import Punchers, only_ice
from tests.nat.test_direct import Lines, echoes
from tests.nat.test_roles import Deployment, deployed, echo
from tests.roles.memory import ECHO_IP, AgentHost
from tests.roles.user_host import UserHost
from ztna.config.model import AgentService
from ztna.core.ice.messages import CandidateEntry, CandidateOffer, StartPunching
from ztna.core.policy import PolicyRule
from ztna.core.ports import Address, UdpBatch
from ztna.core.stun.attributes import Username, XorMappedAddress
from ztna.core.stun.integrity import Algorithm, short_term_key
from ztna.core.stun.messages import (
    MessageClass,
    StunMessage,
    build_stun_message,
    parse_stun_untrusted,
)
from ztna.nat.link import WireBatch
from ztna.nat.spec import OPEN, PORT_RESTRICTED, NatSpec

THIEF, VICTIM = "203.0.113.66", "203.0.113.99"


@attrs.define(eq=False)
class Scene:
    """A user whose path to the connector is direct, and what crosses the public network."""

    it: Deployment
    user: UserHost
    lines: Lines
    punchers: Punchers
    wire: list[WireBatch] = attrs.Factory(list)

    @property
    def home(self) -> Address:
        """Where the connector is known."""
        gateway, host = self.it.connector_nat, self.it.world.hosts["home"]
        return (host.address if gateway.spec == OPEN else gateway.address), 4434

    def sent_to(self, host: str) -> Counter[str]:
        """Packets and bytes that went to an IP address, and the largest."""
        counts: Counter[str] = Counter()
        for batch in self.wire:
            if batch.destination[0] == host:
                for segment in batch.segments():
                    counts["packets"] += 1
                    counts["bytes"] += len(segment)
                    counts["largest"] = max(counts["largest"], len(segment))
        return counts

    def sent_by(self, host: str) -> int:
        """Bytes that came from an IP address."""
        return sum(len(batch.data) for batch in self.wire if batch.source[0] == host)

    async def nothing_happens(self, seconds: float = 5) -> None:
        """The user's packets take the direct path, and every one is answered."""
        (path,) = [peer.path for peer in self.punchers.of_agents[0]._peers]
        before = path.counters["sent_relay_bytes"]
        assert await echoes(self.user, seconds, b"undisturbed") < 0.5
        assert path.counters["sent_relay_bytes"] == before
        assert self.lines.of("agent/laptop") == ["RELAY", "DIRECT"]

    async def start_mallory(self, claims: list[Address]) -> AgentHost:
        """An agent that may use the service, too, and lies about its addresses."""
        self.it.world.hosts["mallory"] = self.it.lab.host(THIEF)
        host = await self.it.world.start_agent([AgentService("echo", ECHO_IP)], "mallory")
        let_lie(self.punchers.of_agents[-1], claims)
        return host


@asynccontextmanager
async def open_scene(
    monkeypatch: pytest.MonkeyPatch, connector_nat: NatSpec = OPEN
) -> AsyncIterator[Scene]:
    punchers = Punchers(monkeypatch)
    with structlog.testing.capture_logs() as entries:
        lines = Lines(entries)
        async with deployed(PORT_RESTRICTED, connector_nat) as it:
            it.world.direct = True
            it.world.policy[0] = PolicyRule("agent/*", services=("echo",))
            agent = await it.start()
            async with UserHost.open(agent) as user:
                with trio.fail_after(30):
                    await echo(user, b"at once")
                    await lines.until("DIRECT")
                scene = Scene(it, user, lines, punchers)
                it.lab.public.captures.append(lambda _, batch: scene.wire.append(batch))
                yield scene


def requests_to(wire: list[WireBatch], host: str) -> list[bytes]:
    """Checks that crossed the network."""
    return [
        bytes(data)
        for batch in wire
        if batch.destination[0] == host
        for data in batch.segments()
        if bytes(data[:2]) == b"\x00\x01"
    ]


async def test_forged_and_replayed_checks(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody on the way sees all checks: what he makes of them gets no answer, and no packet."""
    async with open_scene(monkeypatch) as scene:
        await trio.sleep(20)
        seen = requests_to(scene.wire, scene.home[0])
        assert len(seen) >= 3
        wrong_key = short_term_key("0123456789012345678901")
        thief = scene.it.lab.host(THIEF)
        with closing(thief.open_udp_port()) as port:
            for data in seen:
                asked = parse_stun_untrusted(data)
                signed_by_nobody = StunMessage(
                    MessageClass.REQUEST, asked.transaction_id, asked.attributes[:4]
                )
                assert asked.find(Username) is not None
                forged = build_stun_message(signed_by_nobody, wrong_key, (Algorithm.SHA256,))
                changed = data[:30] + bytes((data[30] ^ 1,)) + data[31:]
                for each in (data, forged, changed, build_stun_message(signed_by_nobody)):
                    port.send_nowait([UdpBatch(each, len(each), scene.home)])
            await scene.nothing_happens()
        assert scene.sent_to(THIEF) == Counter()
        counts = only_ice(scene.punchers.of_connectors[0]).statistics()
        assert counts["drop_replayed"] >= 3
        assert counts["drop_wrong_signature"] >= 6


async def test_forged_answers_keep_no_dead_path(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way is cut, and somebody answers the checks in the other's name, without its key."""
    async with open_scene(monkeypatch) as scene:
        agent, forged = scene.it.agent_nat.outside, 0

        def answer(_: float, batch: WireBatch) -> None:
            nonlocal forged
            if batch.source[0] != scene.home[0]:
                return
            for request in requests_to([batch], agent.address):
                number = parse_stun_untrusted(request).transaction_id
                mapped = (XorMappedAddress(batch.source),)
                message = StunMessage(MessageClass.SUCCESS, number, mapped)
                key = short_term_key("0123456789012345678901")
                for signs in ((), (key, (Algorithm.SHA256,))):
                    data = build_stun_message(message, *signs)
                    # From behind the router that blocks the way.
                    spoofed = UdpBatch(data, len(data), batch.destination)
                    scene.it.world.hosts["home"].ports[4434].put(spoofed)
                    scene.it.world.hosts["home"].wake()
                    forged += 1

        agent.block(scene.home[0])
        scene.it.lab.public.captures.append(answer)
        with trio.fail_after(30):
            await echoes(scene.user, 10, b"cut")
            await scene.lines.until("RELAY")
        assert forged > 4
        counts = only_ice(scene.punchers.of_connectors[0]).statistics()
        assert counts["drop_wrong_signature"] > 4


async def test_replayed_offers(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """All packets of the session that agreed upon the path, once more, from where they came and
    from elsewhere; then the peer itself says again what it has said."""
    async with open_scene(monkeypatch) as scene:
        it, home = scene.it, only_ice(scene.punchers.of_connectors[0])
        # A second attempt, all of which is seen.
        only_ice(scene.punchers.of_agents[0]).network_changed(trio.current_time())
        await echoes(scene.user, 20, b"anew")
        attempts = home.statistics()["attempts"]
        assert attempts >= 2
        there = (it.agent_nat.address, scene.home[0])
        theirs = [b for b in scene.wire if (b.source[0], b.destination[0]) == there]
        assert len(theirs) > 100
        scene.wire.clear()
        for batch in theirs:
            it.lab.public.send_down(batch)
            it.lab.public.send_down(attrs.evolve(batch, source=(THIEF, batch.source[1])))
        await scene.nothing_happens()
        assert scene.sent_to(THIEF) == Counter()
        (peer,) = scene.punchers.of_agents[0]._peers
        (found,) = [peer.ice._talks.found]
        assert found is not None
        old = CandidateOffer(1, "seen", "0123456789012345678901", (), found.nat.to_entry(), ())
        for message in (old, attrs.evolve(old, generation=2), StartPunching(1), StartPunching(2)):
            peer.link.send(message)
        ignored = home.statistics().get("messages_ignored", 0)
        await scene.nothing_happens()
        assert home.statistics()["messages_ignored"] == ignored + 4
        assert home.statistics()["attempts"] == attempts


async def test_a_victim_gets_less_than_its_enemy_sends(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer offers a victim's addresses, again and again, as fast as it can."""
    async with open_scene(monkeypatch) as scene:
        scene.it.lab.host(VICTIM)
        claims = [(VICTIM, 1000 + number) for number in range(16)]
        await scene.start_mallory(claims)
        with trio.fail_after(30):
            async with aclosing(periodic(0.1)) as times:
                async for _ in times:
                    if scene.punchers.of_agents[-1]._peers:
                        break
        (peer,) = scene.punchers.of_agents[-1]._peers
        scene.wire.clear()
        begun = trio.current_time()
        offer = None
        while trio.current_time() < begun + 60:
            await trio.sleep(0.5)
            offer = peer.ice._talks.found and CandidateOffer(
                peer.ice._talks.generation + 1,
                "mine",
                "0123456789012345678901",
                tuple(CandidateEntry("host", *address, 99, "1") for address in claims),
                peer.ice._talks.found.nat.to_entry(),
                ("predict", "birthday"),
            )
            if offer:
                peer.ice._talks.generation += 1
                peer.link.send(offer)
                peer.link.send(StartPunching(offer.generation))
        sent = scene.sent_to(VICTIM)
        assert offer
        assert 0 < sent["packets"] < 60 * 10
        ports = {each.destination[1] for each in scene.wire if each.destination[0] == VICTIM}
        assert len(ports) == 4
        home = {str(each.link.peer): each.ice for each in scene.punchers.of_connectors[0]._peers}
        assert home["agent/mallory"].statistics()["attempts"] <= 1 + 4 + 60 / 5
        assert sent["largest"] < 130
        assert sent["bytes"] < scene.sent_by(THIEF)
        await scene.nothing_happens()


async def test_private_networks_are_not_scanned(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer offers all that may be in the connector's own network."""
    async with open_scene(monkeypatch, PORT_RESTRICTED) as scene:
        inside = scene.it.connector_nat.inside
        neighbour = scene.it.lab.host(behind=scene.it.connector_nat)
        network = neighbour.address.rpartition(".")[0]
        scanned: list[WireBatch] = []
        inside.captures.append(lambda _, batch: scanned.append(batch))
        claims = [(f"{network}.{number}", 22) for number in range(1, 17)]
        assert (neighbour.address, 22) in claims
        await scene.start_mallory(claims)
        await scene.nothing_happens(40)
        assert [b for b in scanned if b.destination[0].startswith(network)] == []
        peers = {str(p.link.peer): p.ice for p in scene.punchers.of_connectors[0]._peers}
        punching = peers["agent/mallory"].punching
        assert punching is not None
        reasons = [pair.reason for pair in punching.pairs if pair.address[0].startswith(network)]
        assert len(reasons) == 16
        assert all(reason.startswith(("private address", "our own")) for reason in reasons)
