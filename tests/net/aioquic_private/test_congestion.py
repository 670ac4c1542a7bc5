"""The tunnel's congestion control inside aioquic, beside the fast path."""

import pytest

from tests.net.fast_link import Link, connect, in_flight, payloads, window
from ztna.net.aioquic_private.congestion import TUNNEL, TunnelCongestionControl


def model_of(link: Link) -> TunnelCongestionControl:
    control = link.client.connection._loss._cc
    assert isinstance(control, TunnelCongestionControl)
    return control


def seconds_to_send(congestion: str, loss: float, count: int) -> float:
    link = connect(congestion=congestion, loss=loss, latency=0.01, seed=3)
    link.client.queue.extend(payloads(count, 1000))
    start = link.now
    while link.client.queue and link.now < start + 3:
        link.run(0.02)
    return link.now - start


@pytest.mark.parametrize("loss", [0.0, 0.005])
def test_random_loss_does_not_stop_it(loss: float) -> None:
    assert seconds_to_send(TUNNEL, loss, 5000) < 0.5


def test_reno_is_stopped_by_the_same_loss() -> None:
    assert seconds_to_send("reno", 0.005, 5000) > 2


@pytest.mark.parametrize("fast", [True, False])
def test_nothing_stays_in_flight(fast: bool) -> None:
    link = connect(
        congestion=TUNNEL, client_fast=fast, server_fast=fast, loss=0.02, jitter=0.002, seed=9
    )
    link.client.queue.extend(payloads(1000, 500))
    link.run(4)
    link.loss = 0.0
    link.run(2)
    assert not link.client.queue
    assert len(link.server.received) > 900
    assert in_flight(link.client.connection) == 0
    assert model_of(link).model.bandwidth > 0


def test_black_hole_shrinks_the_window_and_ends() -> None:
    link = connect(congestion=TUNNEL)
    link.client.queue.extend(payloads(500))
    link.run(0.5)
    wide = window(link.client.connection)
    link.loss = 1.0
    link.client.queue.extend(payloads(2000))
    link.run(3)
    link.loss = 0.0
    link.run(20)
    assert not link.client.queue
    assert link.client.closed is None
    assert in_flight(link.client.connection) == 0
    assert wide > 100_000


def test_persistent_congestion_reaches_the_model() -> None:
    link = connect(congestion=TUNNEL)
    control = model_of(link)
    control.on_persistent_congestion()
    assert control.congestion_window == control.model.minimum
    assert control.get_log_data()["cwnd"] == control.model.minimum
