"""Our TCP against the kernel's: the oracle. One namespace and one TUN a test."""

import functools
import hashlib
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

import attrs
import pytest

from tests.lab.tcp_applications import Echo, Sink, Source
from tests.lab.tcp_kernel import (
    KERNEL_ADDRESS,
    OUR_ADDRESS,
    OUR_ADDRESS6,
    Impairment,
    KernelLab,
    TcpHost,
    open_kernel_lab,
)
from ztna.core.tcp.state import Reset, TcpConfig, TcpState

pytestmark = pytest.mark.kernel

MIB = 1 << 20


@attrs.define
class Kernel:
    """A thread with the kernel's side of a test; its result or error."""

    thread: threading.Thread
    result: list[object]

    def done(self) -> bool:
        """Whether it ended."""
        return not self.thread.is_alive()

    def value(self) -> object:
        """Its result; raises its error."""
        self.thread.join(10)
        (result,) = self.result
        if isinstance(result, BaseException):
            raise result
        return result


def start(work: Callable[[], object]) -> Kernel:
    result: list[object] = []

    def run() -> None:
        try:
            result.append(work())
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return Kernel(thread, result)


def receive_all(sock: socket.socket) -> tuple[int, str]:
    digest = hashlib.sha256()
    size = 0
    while data := sock.recv(1 << 18):
        digest.update(data)
        size += len(data)
    return size, digest.hexdigest()


def pattern(size: int, seed: int = 3) -> bytes:
    block = random.Random(seed).randbytes(MIB + 7)
    return (block * (size // len(block) + 1))[:size]


CASES = [
    # size in MiB, loss, reorder, duplicate, offload, seconds
    pytest.param(64, 0.0, 0.0, 0.0, True, 30, id="clean"),
    pytest.param(8, 0.0, 0.0, 0.0, False, 30, id="clean-plain"),
    pytest.param(64, 0.01, 0.0, 0.0, True, 40, id="loss1", marks=pytest.mark.slow),
    pytest.param(8, 0.05, 0.0, 0.0, True, 40, id="loss5", marks=pytest.mark.slow),
    # The kernel waits out its doubling timeouts: of 16 runs with 1 MiB the slowest took 28 s.
    pytest.param(0.25, 0.1, 0.0, 0.0, True, 60, id="loss10", marks=pytest.mark.slow),
    pytest.param(16, 0.002, 0.1, 0.05, True, 40, id="reorder", marks=pytest.mark.slow),
    pytest.param(2, 0.01, 0.05, 0.02, False, 40, id="mixed-plain", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("mib", "loss", "reorder", "duplicate", "offload", "seconds"), CASES)
def test_bulk_both_ways(
    mib: float, loss: float, reorder: float, duplicate: float, offload: bool, seconds: float
) -> None:
    """The kernel connects; first it sends, then we do; sequence numbers wrap on the way."""
    data = pattern(int(mib * MIB))
    expected = (len(data), hashlib.sha256(data).hexdigest())
    with open_kernel_lab(offload=offload) as lab:
        impairment = Impairment(loss, reorder, duplicate)
        sinks: list[Sink] = []

        def make_sink() -> Sink:
            sinks.append(Sink())
            return sinks[-1]

        host = TcpHost(lab, impairment=impairment, isn=(1 << 32) - 70_000)
        host.listen = {80: make_sink, 81: lambda: Source(memoryview(data))}
        upload, download = lab.socket(), lab.socket()

        def send() -> object:
            upload.connect((OUR_ADDRESS, 80))
            upload.sendall(data)
            upload.shutdown(socket.SHUT_WR)
            return upload.recv(1)

        def receive() -> object:
            download.connect((OUR_ADDRESS, 81))
            result = receive_all(download)
            download.close()
            return result

        started = time.monotonic()
        kernel = start(send)
        host.run_until(kernel.done, seconds)
        assert kernel.value() == b""
        assert (sinks[0].size, sinks[0].digest.hexdigest()) == expected
        middle = time.monotonic()
        kernel = start(receive)
        host.run_until(kernel.done, seconds)
        assert kernel.value() == expected
        finished = time.monotonic()
        rates = [mib / (middle - started), mib / (finished - middle)]
        sys.stdout.write(f"{lab.congestion}: in {rates[0]:.2f}, out {rates[1]:.2f} MiB/s\n")
        assert lab.counters()["InCsumErrors"] == 0


def host_in(
    lab: KernelLab,
    *,
    config: TcpConfig | None = None,
    accept_delay: float = 0.0,
    impairment: Impairment | None = None,
) -> TcpHost:
    """Our side, with a short TIME-WAIT."""
    return TcpHost(
        lab,
        config=config or TcpConfig(time_wait=0.2),
        accept_delay=accept_delay,
        impairment=impairment or Impairment(),
    )


def test_requests_and_half_close() -> None:
    """Small requests get their answers at once; after shutdown the answer still comes."""
    with open_kernel_lab() as lab:
        host = host_in(lab)
        host.listen[7] = Echo
        sock = lab.socket()

        def client() -> object:
            sock.connect((OUR_ADDRESS, 7))
            started = time.monotonic()
            for number in range(200):
                message = b"%d" % number * 20
                sock.sendall(message)
                assert sock.recv(100) == message
            elapsed = time.monotonic() - started
            sock.sendall(b"last words")
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            while data := sock.recv(100):
                answer += data
            return answer, elapsed

        kernel = start(client)
        host.run_until(kernel.done, 20)
        value = kernel.value()
        assert isinstance(value, tuple)
        assert value[0] == b"last words"
        # 200 round trips without one delayed ACK in the way: that would be 8 s.
        assert value[1] < 4
        host.run_until(lambda: not host.connections, 5)
        assert host.ended[0].statistics()["retransmissions"] == 0


@pytest.mark.parametrize("offload", [True, False])
def test_zero_window_of_the_kernel(offload: bool) -> None:
    """A kernel receiver that does not read: we probe, and go on when it reads."""
    data = pattern(3 * MIB)
    with open_kernel_lab(offload=offload) as lab:
        host = host_in(lab)
        host.listen[80] = lambda: Source(memoryview(data))
        sock = lab.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        go = threading.Event()

        def client() -> object:
            sock.connect((OUR_ADDRESS, 80))
            assert go.wait(20)
            return receive_all(sock)

        kernel = start(client)
        until = time.monotonic() + 2.0
        host.run_until(lambda: time.monotonic() > until, 5)
        ((connection, _),) = host.connections.values()
        assert connection.state is TcpState.ESTABLISHED
        assert lab.counters()["TCPToZeroWindowAdv"] >= 1
        go.set()
        host.run_until(kernel.done, 20)
        assert kernel.value() == (len(data), hashlib.sha256(data).hexdigest())


def test_our_zero_window() -> None:
    """An application of ours that does not read: the kernel probes, and goes on when it reads."""
    data = pattern(3 * MIB)
    sink = Sink(paused=True)
    with open_kernel_lab() as lab:
        host = host_in(lab)
        host.listen[80] = lambda: sink
        sock = lab.socket()

        def client() -> object:
            sock.connect((OUR_ADDRESS, 80))
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            return sock.recv(1)

        kernel = start(client)
        until = time.monotonic() + 2.0
        host.run_until(lambda: time.monotonic() > until, 5)
        ((connection, _),) = host.connections.values()
        assert MIB - 65_536 <= connection.readable <= MIB
        assert lab.counters()["TCPWinProbe"] >= 1
        sink.paused = False
        host.run_until(kernel.done, 20)
        assert kernel.value() == b""
        assert sink.digest.hexdigest() == hashlib.sha256(data).hexdigest()


def test_reset_refused_and_closed_port() -> None:
    """RST by SO_LINGER 0 reaches us; ours reach the kernel, on refusal and on abort."""
    with open_kernel_lab() as lab:
        host = host_in(lab)
        host.listen = {80: Sink, 81: None}
        sock = lab.socket()

        def linger() -> object:
            sock.connect((OUR_ADDRESS, 80))
            sock.sendall(b"x" * 1000)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
            return True

        kernel = start(linger)
        host.run_until(lambda: bool(host.ended), 10)
        assert kernel.value() is True
        assert host.ended[0].closed

        for port in (81, 82):
            other = lab.socket()
            kernel = start(functools.partial(other.connect, (OUR_ADDRESS, port)))
            host.run_until(kernel.done, 5)
            with pytest.raises(ConnectionRefusedError):
                kernel.value()

        aborted = lab.socket()

        def wait_for_reset() -> object:
            aborted.connect((OUR_ADDRESS, 80))
            return aborted.recv(1)

        kernel = start(wait_for_reset)
        host.run_until(lambda: bool(host.connections), 5)
        until = time.monotonic() + 0.1
        host.run_until(lambda: time.monotonic() > until, 5)
        ((connection, _),) = host.connections.values()
        connection.abort(time.monotonic())
        host.run_until(kernel.done, 5)
        with pytest.raises(ConnectionResetError):
            kernel.value()


@pytest.mark.parametrize("address", [OUR_ADDRESS, OUR_ADDRESS6])
def test_many_connections(address: str) -> None:
    """150 connections, eight at a time, through a listener that answers late."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with open_kernel_lab() as lab:
        host = host_in(lab, accept_delay=0.005)
        host.listen[7] = Echo
        sockets = [[lab.socket(family) for _ in range(19)] for _ in range(8)]

        def client(mine: list[socket.socket]) -> object:
            total = 0
            for number, sock in enumerate(mine):
                sock.connect((address, 7))
                message = bytes([number]) * 3000
                sock.sendall(message)
                sock.shutdown(socket.SHUT_WR)
                answer = b""
                while data := sock.recv(4096):
                    answer += data
                total += answer == message
                sock.close()
            return total

        clients = [start(functools.partial(client, mine)) for mine in sockets]
        host.run_until(lambda: all(kernel.done() for kernel in clients), 30)
        assert [kernel.value() for kernel in clients] == [19] * 8
        host.run_until(lambda: not host.connections, 5)


def test_late_answer_joins_retransmitted_syns() -> None:
    """The backend takes 1.5 s: the kernel sends its SYN again, and gets one connection."""
    with open_kernel_lab() as lab:
        host = host_in(lab, accept_delay=1.5)
        host.listen[7] = Echo
        sock = lab.socket()

        def client() -> object:
            sock.connect((OUR_ADDRESS, 7))
            sock.sendall(b"hello")
            sock.shutdown(socket.SHUT_WR)
            return sock.recv(100)

        kernel = start(client)
        host.run_until(kernel.done, 10)
        assert kernel.value() == b"hello"
        host.run_until(lambda: not host.connections, 5)
        assert host.ended[0].statistics()["joined_syns"] >= 1
        assert len(host.ended) == 1


def test_active_open_and_simultaneous_close() -> None:
    """We connect to a kernel listener and send; then both FINs cross on the way."""
    data = pattern(MIB)
    with open_kernel_lab() as lab:
        host = host_in(lab, impairment=Impairment(delay=0.05))
        listener = lab.socket()
        listener.bind((KERNEL_ADDRESS, 90))
        listener.listen()
        close_now = threading.Event()

        def serve() -> object:
            sock, _ = listener.accept()
            received = b""
            while len(received) < len(data):
                received += sock.recv(1 << 18)
            assert close_now.wait(10)
            sock.shutdown(socket.SHUT_WR)
            end = sock.recv(1)
            sock.close()
            return received == data and end == b""

        kernel = start(serve)
        source = Source(memoryview(data), finish=False)
        connection = host.connect(90, 4444, source)
        acknowledged = connection.statistics
        host.run_until(lambda: source.sent == len(data) and not acknowledged()["in_flight"], 10)
        close_now.set()
        source.finish = True
        host.run_until(lambda: connection.state is TcpState.CLOSING, 5)
        host.run_until(lambda: connection.closed, 5)
        assert kernel.value() is True


def test_closed_kernel_port_refuses_us() -> None:
    """An active open to a port where nobody listens ends with Reset."""
    with open_kernel_lab() as lab:
        host = host_in(lab)
        connection = host.connect(91, 4445, Sink())
        host.run_until(lambda: connection.closed, 5)
        assert connection.next_event() == Reset()


def test_keepalive_is_answered_by_the_kernel() -> None:
    """An idle connection outlives keepalive periods, and ends when the kernel is gone.

    The kernel answers such segments once in 500 ms (tcp_invalid_ratelimit).
    """
    config = TcpConfig(keepalive_idle=0.6, keepalive_interval=0.2, time_wait=0.2)
    with open_kernel_lab() as lab:
        host = host_in(lab, config=config)
        host.listen[7] = Sink
        sock = lab.socket()
        kernel = start(lambda: sock.connect((OUR_ADDRESS, 7)))
        host.run_until(kernel.done, 5)
        until = time.monotonic() + 2
        host.run_until(lambda: time.monotonic() > until, 5)
        ((connection, _),) = host.connections.values()
        assert connection.state is TcpState.ESTABLISHED
        host.impairment = Impairment(loss=1.0)
        host.run_until(lambda: connection.closed, 5)
