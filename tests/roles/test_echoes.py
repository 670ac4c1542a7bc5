"""Echoes through the tunnel: told from users' packets, and bounded."""

import functools

import trio
import trio.testing
from trio.testing import MockClock

from ztna.core.encapsulation import ServiceLabel
from ztna.core.packet.icmp import echo_reply
from ztna.core.ports import IpPacket
from ztna.roles.echoes import MAX_WAITING, EchoBook

OURS, SERVICE = bytes((10, 100, 64, 1)), bytes((10, 100, 0, 2))
ENDS = (OURS, SERVICE)


async def drop(_: IpPacket) -> None:
    await trio.lowlevel.checkpoint()


def reply(packet: IpPacket) -> IpPacket:
    data = echo_reply(packet.data)
    assert data is not None
    return IpPacket(data)


async def test_answers_are_taken_out_and_nothing_else(autojump_clock: MockClock) -> None:
    book, sent = EchoBook(), list[IpPacket]()

    async def send(packet: IpPacket) -> None:
        sent.append(packet)
        await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(functools.partial(book.ask, "web", ENDS, send, 5.0, 500))
        await trio.testing.wait_all_tasks_blocked()
        assert len(sent[0].data) == 500
        answer = reply(sent[0])
        other = IpPacket(bytes(len(answer.data)))
        # What is a user's, another service's, the request itself, or cut off, passes.
        passing = [("web", other), ("db", answer), ("web", IpPacket(answer.data[:-1]))]
        assert list(book.take(passing)) == passing
        assert list(book.take([("web", answer), ("web", other)])) == [("web", other)]
        assert list(book.take([("web", answer)])) == []  # a duplicate, in the same round
    # Nobody waits any more: all of it passes untouched, as the very same list.
    late = [("web", answer)]
    assert book.take(late) is late


async def test_services_that_packets_name_by_number(autojump_clock: MockClock) -> None:
    book, sent, times = EchoBook(), list[IpPacket](), list[float | None]()

    async def send(packet: IpPacket) -> None:
        sent.append(packet)
        await trio.sleep(0.25)

    async def ask() -> None:
        times.append(await book.ask("web", ENDS, send, 5.0))

    labels = {"web": ServiceLabel("web", 3), "db": ServiceLabel("db", 4)}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(0.5)
        answer = reply(sent[0])
        assert len(book.take([(4, answer)], labels)) == 1
        assert len(book.take([(3, answer)], labels)) == 0
    assert times == [0.5]


async def test_no_answer(autojump_clock: MockClock) -> None:
    assert await EchoBook().ask("web", ENDS, drop, 2.0) is None
    assert trio.current_time() == 2.0


async def test_echoes_on_their_way_are_bounded(autojump_clock: MockClock) -> None:
    book = EchoBook()
    async with trio.open_nursery() as nursery:
        for _ in range(MAX_WAITING + 5):
            nursery.start_soon(book.ask, "web", ENDS, drop, 2.0)
    assert book.refused == 5


def test_what_is_known_of_a_service() -> None:
    book = EchoBook()
    record = book.record("web")
    assert (record.loss, record.proven_at) == (0.0, None)
    record.outcomes += [True, False, False, True]
    assert book.record("web").loss == 0.5
    record.outcomes += [True] * 200
    assert record.loss == 0.0
    book.keep_only(["db"])
    assert book.records == {}
