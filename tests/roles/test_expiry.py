"""A certificate's end, by two clocks: that of the wall, and trio's, which may stand still while a
machine is suspended."""

import datetime

import attrs
import trio
from trio.testing import MockClock

from tests.net.certificates import DAY
from tests.net.endpoints import clock, open_pair
from ztna.net.closing import CloseCode
from ztna.net.session import Session
from ztna.roles.expiry import LOOK_EVERY, close_when_expired

VALID = 30 * DAY


@attrs.define
class Wall:
    """A wall clock that goes with trio's, and ahead of it by what the machine was suspended for."""

    suspended: datetime.timedelta = datetime.timedelta()
    started: float = attrs.field(factory=trio.current_time)

    def __call__(self) -> datetime.datetime:
        running = datetime.timedelta(seconds=trio.current_time() - self.started)
        return clock() + running + self.suspended


async def expect_end(session: Session, seconds: float) -> None:
    with trio.fail_after(seconds):
        closed = await session.wait_closed()
    assert closed.code == CloseCode.EXPIRED


async def test_a_machine_that_was_suspended_sees_the_end(autojump_clock: MockClock) -> None:
    async with open_pair() as pair:
        client, server = await pair.connected()
        wall = Wall()
        pair.nursery.start_soon(close_when_expired, server, wall)
        await trio.sleep(100)
        wall.suspended = VALID / 2
        await trio.sleep(2 * LOOK_EVERY)
        assert not client.closed
        wall.suspended = VALID
        await expect_end(client, LOOK_EVERY + 1)


async def test_a_wall_clock_that_is_set_back_gives_no_more_time(
    autojump_clock: MockClock,
) -> None:
    async with open_pair() as pair:
        client, server = await pair.connected()
        wall = Wall(VALID - datetime.timedelta(seconds=500))
        pair.nursery.start_soon(close_when_expired, server, wall)
        await trio.sleep(100)
        wall.suspended = datetime.timedelta()
        await expect_end(client, 401)
