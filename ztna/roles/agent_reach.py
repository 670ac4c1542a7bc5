"""Whether an agent or connector reaches its intermediate now, and in words why not.

A session is asked for a round trip. Without an answer, or without a session, the intermediate's
UDP port is knocked at by small and by large datagrams, and its TCP port: what answers there, and
what is refused by whom, tells a blocked network from a machine that is away.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress

import attrs
import trio

from ztna.core.addresses import format_address, is_virtual
from ztna.core.diagnosis import Stage, StageName, broken, degraded, ok
from ztna.core.ports import Address
from ztna.errors import ProxyError, SessionClosedError, UnreachableError
from ztna.net.knock import HANDSHAKE_SIZE, Knock, Knocked, KnockResult
from ztna.roles.control_client import ControlLink
from ztna.roles.control_keeper import ControlKeeper
from ztna.roles.resolve import family_of, resolve
from ztna.roles.trouble import Trouble, TroubleKind

# s, our choices: for a round trip of the session; for TCP, which sends a SYN again after one
# second; for a proxy, which does the same towards the server; for what will be another in a moment,
# such as a first attempt, which takes five; and how often that is looked at.
ROUND_TRIP_TIME = 2.0
TCP_TIME = 1.5
PROXY_TIME = 3.0
PASSING_TIME = 6.0
LOOK_AGAIN = 0.1

_STAGE = StageName.INTERMEDIATE
SMALL_MTU = "find the link with the small MTU: a VPN, PPPoE or a firewall that drops ICMP"
_TODO = {
    TroubleKind.NO_NAME: "check `intermediate.host` and this machine's DNS",
    TroubleKind.NO_ANSWER: "wait some seconds: it is tried again; else see the intermediate's log",
    TroubleKind.ITS_CERTIFICATE: "set `server_name` to a name that its certificate holds, or have "
    "the certificate issued with this one (ztna pki show)",
    TroubleKind.OUR_CERTIFICATE: "compare `ztna pki show` of this node's certificate with the "
    "intermediate's CA",
    TroubleKind.REFUSED: "see what the words name",
    TroubleKind.PROTOCOL: "bring agent and intermediate to the same version",
    TroubleKind.REPLACED: "give each machine its own certificate (ztna pki request)",
    TroubleKind.ENDED: "wait some seconds: it is tried again; else see the intermediate's log",
}


@attrs.frozen
class Towards:
    """A client's way to its intermediate. link: its session now, if there is one."""

    keeper: ControlKeeper
    link: ControlLink | None
    knock: Knock

    @property
    def name(self) -> str:
        """The intermediate's name and port, as configured."""
        there = self.keeper.intermediate
        return format_address((there.host, there.port))


@attrs.frozen
class Found:
    """What came of knocking. large: None if small ones get no answer. tcp: what the machine did
    about a connection: "takes", "refuses", "" for nothing; None if TCP was not tried.
    """

    small: Knocked
    large: Knocked | None = None
    tcp: str | None = None


Look = Callable[[], Stage] | Callable[[], Awaitable[Stage]]


async def settled(look: Look) -> Stage:
    """A look, and again while what it finds is about to pass."""
    stage, end = await _once(look), trio.current_time() + PASSING_TIME
    while stage.passing and trio.current_time() < end:
        await trio.sleep(LOOK_AGAIN)
        stage = await _once(look)
    return stage


async def _once(look: Look) -> Stage:
    stage = look()
    return stage if isinstance(stage, Stage) else await stage


async def look_intermediate(seen: Towards) -> Stage:
    """One look: a round trip, or why there is none."""
    await trio.lowlevel.checkpoint()
    link = seen.link
    if link is not None:
        return await _look_session(seen, link)
    trouble = seen.keeper.trouble
    if trouble is None:
        return _first_attempt(seen)
    if (proxy := await _find_proxy(seen, trouble)) is not None:
        return proxy
    if trouble.kind in {TroubleKind.NO_ANSWER, TroubleKind.ENDED}:
        dialer = seen.keeper.dialer
        there = await _find(seen, takes=dialer is not None and dialer.proxy is not None)
        if there is not None:
            return broken(_STAGE, *_no_answer(seen, there, trouble))
    words = f"{seen.name}: {trouble.kind.value}: {trouble.words}"
    return broken(_STAGE, words, _TODO[trouble.kind])


def _first_attempt(seen: Towards) -> Stage:
    found = f"no session with {seen.name} yet: the first attempt goes on"
    dialer = seen.keeper.dialer
    if dialer is None or dialer.proxy is None or dialer.waiting < PROXY_TIME:
        return broken(_STAGE, found, "ask again in 5 s", passing=True)
    found += f", and the {dialer.proxy} has left it without an answer for {dialer.waiting:.0f} s"
    todo = f"is it up, and is {dialer.proxy.source} right? Else wait: it may be slow"
    return broken(_STAGE, found, todo, passing=True)


async def _look_session(seen: Towards, link: ControlLink) -> Stage:
    where, rtt = seen.name, None
    with trio.move_on_after(ROUND_TRIP_TIME), suppress(SessionClosedError):
        rtt = await link.session.ask()
    if rtt is None:
        there = await _find(seen)
        if there is None:
            return broken(_STAGE, f"{where} does not answer", _TODO[TroubleKind.NO_ANSWER])
        return broken(_STAGE, *_no_answer(seen, there, None))
    trip = f"round trip {rtt * 1000:.1f} ms"
    if not is_virtual(link.session.remote_address):
        return ok(_STAGE, f"session over UDP with {where}, {trip}")
    there = await _find(seen, takes=True)
    found, todo = ("UDP is blocked", "") if there is None else _udp(seen, there)
    dialer = seen.keeper.dialer
    by = "" if dialer is None or dialer.proxy is None else f" through the {dialer.proxy}"
    words = f"{found}; the session runs over TLS{by}, {trip}, which is slower"
    return degraded(_STAGE, words, todo)


async def _find_proxy(seen: Towards, trouble: Trouble) -> Stage | None:
    """What is wrong with the proxy, where that is the only way out; None if it lets through, or if
    there is none."""
    dialer, there = seen.keeper.dialer, seen.keeper.intermediate
    kinds = {TroubleKind.NO_NAME, TroubleKind.NO_ANSWER, TroubleKind.ENDED}
    if dialer is None or dialer.proxy is None or there.tcp_port is None:
        return None
    if trouble.kind not in kinds:
        return None
    with trio.move_on_after(PROXY_TIME):
        try:
            stream = await dialer.open((there.host, there.tcp_port))
        except ProxyError as error:
            found = f"UDP finds no way to {seen.name}, and {error.found}"
            return broken(_STAGE, found, error.todo)
        await trio.aclose_forcefully(stream)
        return None
    late = max(dialer.waiting, PROXY_TIME)
    found = f"UDP finds no way to {seen.name}, and the {dialer.proxy} does not answer for "
    found += f"{late:.0f} s"
    todo = f"is it up, and is {dialer.proxy.source} right?"
    return broken(_STAGE, found, todo)


async def _find(seen: Towards, *, takes: bool = False) -> Found | None:
    """Knock; None where its name does not resolve any more. takes: its machine is known to take
    connections."""
    there = seen.keeper.intermediate
    try:
        address = await resolve(there.host, there.port, family_of(seen.keeper.endpoint.port))
    except UnreachableError:
        return None
    answers: list[str | None] = []

    async def try_tcp() -> None:
        dialer, port = seen.keeper.dialer, there.tcp_port or there.port
        proxied = dialer is not None and dialer.proxy is not None
        answers.append(await _answers_tcp(seen, (there.host if proxied else address[0], port)))

    async with trio.open_nursery() as nursery:
        if takes:
            answers.append("takes")
        else:
            nursery.start_soon(try_tcp)
        small, large = await seen.knock(address, 0), None
        if small.result is KnockResult.ANSWERS:
            large = await seen.knock(address, HANDSHAKE_SIZE)
    if small.result is KnockResult.SILENT and answers[0] == "refuses":
        # A machine that refuses TCP says the same of UDP, seldom enough to be missed.
        small = await seen.knock(address, 0)
    return Found(small, large, answers[0])


async def _answers_tcp(seen: Towards, address: Address) -> str | None:
    """What its machine does about a connection, as in `Found`."""
    dialer = seen.keeper.dialer
    if dialer is None:
        await trio.lowlevel.checkpoint()
        return None
    with trio.move_on_after(TCP_TIME if dialer.proxy is None else PROXY_TIME):
        try:
            stream = await dialer.open(address)
        except UnreachableError as error:
            return "refuses" if "refused" in str(error) else ""
        await trio.aclose_forcefully(stream)
        return "takes"
    return ""


def _no_answer(seen: Towards, there: Found, trouble: Trouble | None) -> tuple[str, str]:
    """Why no session comes about, or one has fallen silent: what is found, and what to do."""
    host, port = seen.keeper.intermediate.host, seen.keeper.intermediate.port
    tcp_port = seen.keeper.intermediate.tcp_port
    match there.small.result:
        case KnockResult.ANSWERS if _passes(there):
            found = f"{seen.name} answers small questions, but no session comes about"
            if trouble is not None:
                found = f"{seen.name}: {trouble.kind.value}: {trouble.words}"
            return found, _TODO[TroubleKind.NO_ANSWER]
        case KnockResult.CLOSED:
            found = (
                f"intermediate unreachable: nothing listens on UDP port {port} of {host}, whose "
                "machine says so: the intermediate does not run"
            )
            return found, "start it there (ztna run intermediate), or correct `intermediate.port`"
        case KnockResult.NO_WAY:
            by = f", says {there.small.by}" if there.small.by else ""
            found = f"intermediate unreachable: no way to {host}{by}: {there.small.words}"
            return found, "check this machine's network and routes, and `intermediate.host`"
        case KnockResult.SILENT if not there.tcp:
            also = "" if there.tcp is None else f", nor on TCP port {tcp_port or port}"
            found = f"intermediate unreachable: {host} answers neither on UDP port {port}{also}"
            if there.tcp is None:
                found = f"intermediate unreachable: {host} does not answer on UDP port {port}"
            return found, (
                f"is its machine up, `intermediate.host` right, and does this network let "
                f"anything out to {host}?"
            )
    found, todo = _udp(seen, there)
    if trouble is not None and "tls" in trouble.ways:
        found = f"{found}; and over TLS: {trouble.ways['tls']}"
    return found, todo


def _passes(there: Found) -> bool:
    return there.large is not None and there.large.result is KnockResult.ANSWERS


def _udp(seen: Towards, there: Found) -> tuple[str, str]:
    """What is wrong with UDP towards an intermediate whose machine is there."""
    host, port = seen.keeper.intermediate.host, seen.keeper.intermediate.port
    where = seen.name
    let = f"let UDP out to {where}, and let it in there"
    match there.small.result:
        case KnockResult.ANSWERS if _passes(there):
            return f"UDP passes to {where} again", "wait: it is tried every few minutes"
        case KnockResult.ANSWERS if there.large is not None and (
            there.large.result is KnockResult.TOO_LARGE
        ):
            found = f"MTU too small: this machine's interface to {where} takes no 1,200 bytes"
            return found, "raise its MTU to 1,280 or more"
        case KnockResult.ANSWERS:
            found = (
                f"MTU black hole: {where} answers small packets over UDP, and none of the 1,200 "
                "bytes that a QUIC handshake begins with"
            )
            return found, SMALL_MTU
        case KnockResult.FORBIDDEN:
            by = there.small.by or "this machine's own firewall"
            return f"UDP is blocked: {by} refuses it to {where} ({there.small.words})", let
        case KnockResult.CLOSED:
            found = f"nothing listens on UDP port {port} of {host}, says its machine"
            return found, "correct `intermediate.port`, or see the intermediate's file and log"
        case KnockResult.NO_WAY:
            return (
                f"UDP finds no way to {where}: {there.small.words}",
                "check this machine's routes",
            )
        case _:
            tcp = seen.keeper.intermediate.tcp_port or port
            found = (
                f"UDP is blocked: {host} {there.tcp} connections to TCP port {tcp}, so it is up, "
                f"and is silent on UDP port {port}: a firewall here, on the way or there drops it"
            )
            if there.tcp == "refuses":
                let = f"{let}; or is the intermediate not running there (ss -ulnp)?"
            return found, let
