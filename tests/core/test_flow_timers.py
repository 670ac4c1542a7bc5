"""Timers of flows: one valid entry a flow, and void ones do not pile up."""

import random

from ztna.core.flow import FlowKey, UdpFlow
from ztna.core.flow_timers import FlowTimers


def flow(number: int = 0) -> UdpFlow:
    return UdpFlow(FlowKey("web", 17, b"", number, b"", 0), 0.0)


def test_earliest_first_and_each_once() -> None:
    timers = FlowTimers()
    flows = [flow(n) for n in range(3)]
    for at, each in zip((3.0, 1.0, 2.0), flows, strict=True):
        timers.arm(each, at)
    assert timers.get_timer() == 1.0
    assert timers.due(0.9) == []
    assert timers.due(2.0) == [flows[1], flows[2]]
    assert timers.due(2.0) == []
    assert timers.get_timer() == 3.0
    timers.arm(flows[1], 2.5)
    assert timers.due(9.0) == [flows[1], flows[0]]
    assert timers.get_timer() is None


def test_the_same_time_goes_by_order_of_arming() -> None:
    timers = FlowTimers()
    flows = [flow(n) for n in range(5)]
    for each in flows:
        timers.arm(each, 1.0)
    assert timers.due(1.0) == flows


def test_an_earlier_look_is_enough_a_later_one_is_not() -> None:
    timers, one = FlowTimers(), flow()
    timers.arm(one, 5.0)
    timers.arm(one, 6.0)
    timers.arm(one, 5.0)
    assert len(timers) == 1
    timers.arm(one, 4.0)
    assert timers.get_timer() == 4.0
    assert timers.due(10.0) == [one], "the void entry does not come up"


def test_a_flow_that_is_gone() -> None:
    timers, one, two = FlowTimers(), flow(1), flow(2)
    timers.arm(one, 1.0)
    timers.arm(two, 2.0)
    timers.forget(one)
    timers.forget(one)
    assert timers.get_timer() == 2.0
    assert timers.due(3.0) == [two]


def test_void_entries_are_swept() -> None:
    timers = FlowTimers()
    for number in range(10_000):
        one = flow(number)
        timers.arm(one, 120.0 + number)
        timers.forget(one)
        assert len(timers) <= 66
    one = flow()
    for number in range(10_000, 0, -1):
        timers.arm(one, float(number))
        assert len(timers) <= 66
    assert timers.get_timer() == 1.0


def test_sweeping_loses_nothing() -> None:
    rng = random.Random(1)
    timers = FlowTimers()
    expected: dict[UdpFlow, float] = {}
    flows = [flow(n) for n in range(50)]
    for _ in range(5000):
        one = rng.choice(flows)
        if rng.random() < 0.3:
            timers.forget(one)
            expected.pop(one, None)
        else:
            at = rng.uniform(0, 100)
            timers.arm(one, at)
            expected[one] = min(at, expected.get(one, at))
    assert len(timers) <= 2 * 50 + 64
    assert timers.due(100.0) == sorted(expected, key=lambda each: expected[each])
