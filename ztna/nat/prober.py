"""Run a NAT probe on UDP ports: sockets of the kernel, or ports of the laboratory in memory.

A request's way: `NatProber.requests_to_send` -> the port of that `ProbeSocket` -> the server; an
answer's: the port's own task -> `NatProber` -> what that makes due is sent at once. One more task
keeps the timer. `measure_mtu` does the same for `core.mtuprobe` with a single port.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import attrs
import trio

from ztna.core.mtuprobe import MtuProber, PathMtu
from ztna.core.natclass import NatBehaviour
from ztna.core.natplan import ProbeSocket
from ztna.core.natprobe import NatProber, ProbeDone, ProbeStep
from ztna.core.ports import UdpBatch, UdpPort

Progress = Callable[[str], None]
"""Told in words what has been done, and what is waited for."""

# Our choice: a pause that a person wants an explanation for, in s. Retransmissions are shorter.
LONG_WAIT = 5.0


def say_nothing(_words: str) -> None:
    """No progress."""


def _wait_for_all(_behaviour: NatBehaviour) -> None:
    """Nothing is done with half of an answer."""


async def run_probe(
    prober: NatProber,
    ports: Mapping[ProbeSocket, UdpPort],
    progress: Progress = say_nothing,
    mapping_seen: Callable[[NatBehaviour], None] = _wait_for_all,
) -> NatBehaviour:
    """Probe to the end; a port for every key of `prober.local`, bound to that address.
    mapping_seen: gets `NatProber.mapping_so_far`, once."""
    run = _Run(prober, ports, progress, mapping_seen)
    async with trio.open_nursery() as nursery:
        for socket in ports:
            nursery.start_soon(run.receive, socket)
        behaviour = await run.to_the_end()
        nursery.cancel_scope.cancel()
    return behaviour


@attrs.define(eq=False)
class _Run:
    prober: NatProber
    ports: Mapping[ProbeSocket, UdpPort]
    progress: Progress
    mapping_seen: Callable[[NatBehaviour], None]
    wake: trio.Event = attrs.field(factory=trio.Event)

    async def to_the_end(self) -> NatBehaviour:
        prober, told = self.prober, False
        prober.start(trio.current_time())
        while True:
            self.wake = trio.Event()
            so_far = None if told else prober.mapping_so_far()
            if so_far is not None:
                told = True
                self.mapping_seen(so_far)
            while (event := prober.next_event()) is not None:
                if isinstance(event, ProbeDone):
                    return event.behaviour
                self.progress(_words(event))
            now = trio.current_time()
            for request in prober.requests_to_send(now):
                batch = UdpBatch(request.data, len(request.data), request.destination)
                await self.ports[request.socket].send([batch])
            timer = prober.get_timer() or math.inf
            if timer - now >= LONG_WAIT:
                self.progress(f"waiting {timer - now:.0f} s with an idle mapping")
            with trio.move_on_at(timer):
                await self.wake.wait()
            prober.handle_timer(trio.current_time())

    async def receive(self, socket: ProbeSocket) -> None:
        while True:
            for batch in await self.ports[socket].receive():
                for data in _payloads(batch):
                    self.prober.receive_response_untrusted(
                        data, batch.address, socket, trio.current_time()
                    )
            self.wake.set()


def _words(step: ProbeStep) -> str:
    return f"{step.what}: {'answered' if step.answered else 'silence'}"


def _payloads(batch: UdpBatch) -> Iterator[bytes]:
    step = batch.segment_size
    return (bytes(batch.data[i : i + step]) for i in range(0, len(batch.data), step))


async def measure_mtu(prober: MtuProber, port: UdpPort) -> PathMtu:
    """Measure to the end, with a port that forbids fragmentation."""
    wake = trio.Event()

    async def receive() -> None:
        while True:
            for batch in await port.receive():
                for data in _payloads(batch):
                    prober.receive_response_untrusted(data, batch.address)
            wake.set()

    prober.start(trio.current_time())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        while (timer := prober.get_timer()) is not None:
            wake = trio.Event()
            requests = prober.requests_to_send(trio.current_time())
            await port.send([UdpBatch(data, len(data), prober.server) for data in requests])
            with trio.move_on_at(timer):
                await wake.wait()
            prober.handle_timer(trio.current_time())
        nursery.cancel_scope.cancel()
    return prober.result
