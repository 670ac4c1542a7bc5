"""A direct path that flaps for thousands of minutes: it is used, and nothing that is kept grows.

Every fifty minutes of the virtual clock see the same causes in another order and at other times:
the way between both NATs cut both ways, or one way, once or again and again within seconds; each
NAT rebound, to other ports or to another address; the agent moved to another uplink, its cable
pulled. A user asks meanwhile and now and then. Then nothing happens for longer than any timeout, in
which no path may change, and what is alive is counted.

A virtual hour takes about fifteen seconds of CPU, four of them for an idle path that is kept and
proven alive: by default only a part is run, `--virtual-minutes 10000` is the long run.
"""

import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import attrs
import pytest
import structlog
import trio
from trio.testing import MockClock

from tests.nat.test_roles import Deployment, deployed, echo
from tests.roles.census import Census, blocks_an_hour, growing
from tests.roles.user_host import UserHost
from ztna.nat.link import LinkSpec
from ztna.nat.memory_lab import MemoryGateway
from ztna.nat.spec import FULL_CONE, PORT_RESTRICTED

ROUND = 50 * 60.0
# Caches, arenas and interned objects have settled by then.
SETTLED = 2
# s after the last cause in which the path is direct again, and from which on it stays: a path that
# broke again and again is held back for 30 s, and a search begins every 30 s.
BACK_WITHIN = 120.0
# s in which nothing happens at the end of a round: longer than every timeout of flows.
REST = 700.0
# s that an answer takes at most: the relay is there all the time, behind what a NAT forgets.
ANSWER_WITHIN = 5.0
# To the relay and back on either side; and once more where a path came up that did not last.
CHANGES_OF_A_CAUSE = 4


@attrs.define(eq=False)
class Paths:
    """Which kind of path each side has selected, and how often. A processor of structlog."""

    changes: Counter[str] = attrs.Factory(Counter)
    now: dict[str, str] = attrs.Factory(dict)

    def __call__(self, _: Any, __: str, event: structlog.typing.EventDict) -> Any:
        words = str(event["event"])
        if words.startswith("Path selected:"):
            peer = str(event["peer"])
            self.changes[peer] += 1
            self.now[peer] = words.split()[2]
        raise structlog.DropEvent

    @property
    def direct(self) -> bool:
        return list(self.now.values()) == ["DIRECT"] * 2


@pytest.fixture
def paths() -> Iterator[Paths]:
    """What is logged of paths, and nothing else of what is logged."""
    kept, found = structlog.get_config(), Paths()
    structlog.configure(
        processors=[found],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
    yield found
    structlog.configure(**kept)


@attrs.define(eq=False)
class Flapping:
    """failures: what a user or an operator would have noticed. uplinks: the agent's, the present
    one first."""

    it: Deployment
    user: UserHost
    paths: Paths
    uplinks: list[MemoryGateway]
    random: random.Random
    answers: int = 0
    causes: int = 0
    failures: list[str] = attrs.Factory(list)

    async def round(self) -> None:
        """All causes once, in any order; then nothing happens."""
        end = trio.current_time() + ROUND
        kinds: list[Callable[[], Awaitable[None]]] = [
            self.cut,
            self.cut_one_way,
            self.cut_again_and_again,
            self.cut_again_and_again,
            self.agent_rebound,
            self.connector_rebound,
            self.ports_rebound,
            self.uplink,
            self.cable,
        ]
        self.random.shuffle(kinds)
        before, causes = Counter(self.paths.changes), self.causes
        for kind in kinds:
            await self.ask("before " + kind.__name__)
            await kind()
            for _ in range(3):
                await self.ask("after " + kind.__name__)
                await trio.sleep(self.random.uniform(0.1, 2))
            # Sooner than it is direct again, or later.
            await trio.sleep(self.random.choice((1, 8, 60)) * self.random.uniform(0.5, 2))
        most = max((self.paths.changes - before).values(), default=0)
        if most > CHANGES_OF_A_CAUSE * (self.causes - causes):
            self.failures.append(f"{most} changes for {self.causes - causes} causes")
        await self.ask("flapping is over")
        await trio.sleep(BACK_WITHIN)
        await self.ask("direct")
        quiet = Counter(self.paths.changes)
        assert trio.current_time() < end - REST
        await trio.sleep_until(end)
        if self.paths.changes != quiet or not self.paths.direct:
            self.failures.append(f"without a cause {self.paths.changes - quiet} {self.paths.now}")

    async def ask(self, when: str) -> None:
        """A user asks until an answer comes, and throws away what comes later."""
        with trio.move_on_after(ANSWER_WITHIN) as patience:
            await echo(self.user, b"%d" % self.answers)
            self.answers += 1
        if patience.cancelled_caught:
            self.failures.append(f"{when}: no answer within {ANSWER_WITHIN} s")
        self.user.packets.clear()

    # The causes.

    async def cut(self) -> None:
        await self._cut(self._ways(), self.random.uniform(0.3, 60))

    async def cut_one_way(self) -> None:
        await self._cut({self.random.choice(sorted(self._ways()))}, self.random.uniform(0.3, 60))

    async def cut_again_and_again(self) -> None:
        for _ in range(self.random.randrange(3, 8)):
            await self._cut(self._ways(), self.random.uniform(0.3, 8))
            await self.ask("between cuts")
            await trio.sleep(self.random.uniform(0.3, 40))

    async def _cut(self, ways: set[tuple[str, str]], seconds: float) -> None:
        """Asking all the time."""
        self.causes += 1
        self.it.lab.public.blocks |= ways
        end = trio.current_time() + seconds
        while trio.current_time() < end:
            await self.ask("cut")
            await trio.sleep(min(1.0, max(0.0, end - trio.current_time())))
        self.it.lab.public.blocks -= ways

    def _ways(self) -> set[tuple[str, str]]:
        one, other = self.uplinks[0].address, self.it.connector_nat.address
        return {(one, other), (other, one)}

    async def agent_rebound(self) -> None:
        self._rebind(self.uplinks[0])

    async def connector_rebound(self) -> None:
        self._rebind(self.it.connector_nat)

    def _rebind(self, gateway: MemoryGateway) -> None:
        """Give it another address: its own and one more, in turn."""
        self.causes += 1
        network, _, number = gateway.address.rpartition(".")
        gateway.rebind(f"{network}.{int(number) ^ 128}")

    async def ports_rebound(self) -> None:
        self.causes += 1
        self.random.choice((self.uplinks[0], self.it.connector_nat)).rebind()

    async def uplink(self) -> None:
        self.causes += 1
        self.uplinks.reverse()
        self.it.lab.change_uplink(self.it.laptop, behind=self.uplinks[0])

    async def cable(self) -> None:
        self.causes += 1
        self.it.laptop.pull_cable()
        await trio.sleep(self.random.uniform(0.5, 20))
        self.it.laptop.plug_cable()
        await trio.sleep(ANSWER_WITHIN)


@pytest.fixture
def low_caps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fills up to a cap reaches it in the first rounds."""
    monkeypatch.setattr("ztna.core.ice.exchange.MAX_REMEMBERED", 64)
    # What is remembered of paths until the next change, however old.
    monkeypatch.setattr("ztna.net.aioquic_private.path_change.MAX_MEMORIES", 1)
    # Addresses that a control session has come from.
    monkeypatch.setattr("aioquic.quic.connection.MAX_NETWORK_PATHS", 3)
    monkeypatch.setattr("trio._core._run.DEADLINE_HEAP_MIN_PRUNE_THRESHOLD", 10)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)  # of the long run
@pytest.mark.usefixtures("low_caps")
async def test_nothing_grows_on_a_path_that_flaps(
    paths: Paths, request: pytest.FixtureRequest, autojump_clock: MockClock
) -> None:
    minutes = int(request.config.getoption("--virtual-minutes"))
    rounds = minutes * 60 // int(ROUND)
    censuses: list[Census] = []
    async with deployed(PORT_RESTRICTED, PORT_RESTRICTED) as it:
        it.world.direct = True
        uplinks = [it.agent_nat, it.lab.gateway(FULL_CONE)]
        for gateway in (*uplinks, it.connector_nat):
            gateway.inside.default = LinkSpec()  # a LAN without delay takes a third of the time
        agent = await it.start()
        async with UserHost.open(agent) as user:
            flapping = Flapping(it, user, paths, uplinks, random.Random(10_000))
            for number in range(rounds):
                await flapping.round()
                if number >= SETTLED:
                    censuses.append(Census.take())
    assert flapping.failures == []
    assert growing(censuses) == {}
    assert abs(blocks_an_hour(censuses)) < 200
    # Each round breaks the path a few times, and each time it is seen by both and comes back.
    assert min(paths.changes.values()) > 10 * rounds
    assert flapping.answers > 50 * rounds
