"""What a node answers, for people: tables on a terminal, plain columns elsewhere."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ztna.errors import NotDirectError

Line = dict[str, Any]

_MARKS = {"ok": "green", "degraded": "yellow", "broken": "red"}
_GAP = "  "


def status(console: Console, answer: Line) -> None:
    """A row for each service, and what is wrong below."""
    intermediate = answer["intermediate"]
    rtt = "" if not intermediate["rtt"] else f", round trip {_time(intermediate['rtt'])}"
    where = f"{intermediate['address']}: {intermediate['words']}{rtt}"
    if intermediate["state"] != "ok":
        where = f"{intermediate['address']}: {intermediate['state']}: {intermediate['found']}"
    _print(console, f"{answer['identity']}, tunnel address {answer['tunnel_address'] or 'none'}")
    _print(console, f"intermediate {where}")
    if answer["observed_address"]:
        _print(console, f"seen from there as {answer['observed_address']}")
    if answer["port_mapping"] is not None and answer["port_mapping"]["external"]:
        _nat(console, {**answer, "nat": None})
    services = answer["services"]
    heads = ("service", "state", "proof", "path", "rtt", "loss", "mtu", "backend")
    _table(console, heads, [_row(each) for each in services])
    said: dict[str, list[str]] = {}
    for each in services:
        for words in [*([] if each["ready"] else [each["words"]]), *each["notes"]]:
            said.setdefault(words, []).append(each["service"])
    for words, names in said.items():
        _print(console, f"{', '.join(names)}: {words} (ztna why {names[0]})")
    for here, there in sorted({(s["nat_here"], s["nat_there"]) for s in services if s["nat_here"]}):
        _print(console, f"NAT here: {here}; at the connector: {there or 'not known'}")


def connector(console: Console, answer: Line) -> None:
    """The registration, a row for each service, and the agents."""
    there = answer["intermediate"]
    _print(
        console, f"{answer['identity']}, certificate until {_moment(there['certificate_until'])}"
    )
    _print(console, f"intermediate {there['address']}: {there['state']}: {there['found']}")
    if there["todo"]:
        _print(console, f"To do: {there['todo']}")
    if answer["observed_address"]:
        _print(console, f"seen from there as {answer['observed_address']}")
    _nat(console, answer)
    heads = ("service", "state", "backend", "application", "tried")
    services = answer["services"]
    rows = [
        (
            each["service"],
            "ready" if each["ready"] else each["state"],
            each["backend"],
            each["health"],
            f"{_age(each['health_age'])} ago",
        )
        for each in services
    ]
    _table(console, heads, rows)
    for each in services:
        if not each["ready"]:
            words = each["words"] or each["health_words"]
            _print(console, f"{each['service']}: {each['state']}: {words}")
    if not answer["peers"]:
        _print(console, "no agent is here now")
    _peers(console, answer["peers"])


def intermediate(console: Console, answer: Line) -> None:
    """A row for each session, and for each service; channels and rates."""
    _print(console, f"{answer['identity']} at {answer['address']}, by {answer['policy']}")
    _print(console, f"certificate until {_moment(answer['certificate_until'])}")
    heads = ("client", "state", "address", "rtt", "certificate", "services")
    rows = [
        (
            each["client"],
            "ready" if each["rtt"] is not None else "silent",
            each["address"],
            "-" if each["rtt"] is None else _time(each["rtt"]),
            f"{each['certificate_days']} days",
            ", ".join(each["services"]) or "-",
        )
        for each in answer["sessions"]
    ]
    _table(console, heads, rows)
    for each in answer["services"]:
        names = ", ".join(each["connectors"]) or "no connector"
        agents = f"{each['agents']} agent{'s' * (each['agents'] != 1)}"
        _print(console, f"{each['service']}: {names}; {agents} may use it")
    relay = answer["relay"]
    rate = relay["rates"].get("relay_relayed_bytes", 0.0) * 8 / 1e6
    _print(
        console,
        f"relay: {relay['channels']} channels, {relay['peer_sessions']} peer sessions, "
        f"{rate:.3f} Mbit/s now, {relay.get('relayed_bytes', 0)} bytes so far",
    )


def _nat(console: Console, answer: Line) -> None:
    if answer["nat"]:
        _print(console, f"NAT here: {answer['nat']}")
    mapping = answer["port_mapping"]
    if mapping is None:
        return
    given = mapping["external"] or f"none: {mapping.get('problem') or 'not answered yet'}"
    by = f" (by {mapping['protocol']} of {mapping['gateway']})" if mapping["external"] else ""
    _print(console, f"mapped port: {given}{by}")


def _row(each: Line) -> Sequence[str]:
    age, proven = each["proof_age"], each["proof_age"] is not None
    path = each["path"]
    return (
        each["service"],
        each["state"],
        f"{_age(age)} ago" if proven else "never",
        path["kind"] if not path["address"] else f"{path['kind']} {path['address']}",
        _time(each["rtt"]) if proven else "-",
        f"{each['loss']:.0%} of {each['rounds']}" if each["rounds"] else "-",
        "-" if each["mtu"] is None else str(each["mtu"]),
        each["backend"] or "-",
    )


def ping(console: Console, answer: Line) -> None:
    """A line for each answer, and the sum."""
    if answer["kind"] == "echo":
        if answer["rtt"] is None:
            _print(console, f"{answer['number']}: {answer['words']}")
        else:
            _print(console, f"{answer['number']}: {_time(answer['rtt'])} by {answer['words']}")
        return
    words = f"{answer['sent']} sent, {answer['answered']} answered, {answer['loss']:.0%} lost"
    if answer["answered"]:
        times = "/".join(_time(answer[key]) for key in ("least", "mean", "most"))
        words += f"; round trip least/mean/most {times}"
    _print(console, f"{words}; the last one {'direct' if answer['direct'] else 'not direct'}")
    if answer["exit_code"] == NotDirectError.exit_code:
        service = answer["service"]
        _print(console, f"No answer was direct; ztna why {service} says why", "yellow")


def why(console: Console, answer: Line) -> None:
    """The cause and what to do about it; then every stage, and why the path is not direct."""
    path = answer["path"]
    if not answer["works"]:
        _print(console, f"Broken: {answer['broken']}: {answer['found']}", "red")
        _print(console, f"To do: {answer['todo']}")
    else:
        way = "" if path is None else f": {_way(path['way'])}"
        _print(console, f"{answer['service']} works{way}", "green")
    for stage in answer["stages"]:
        if stage["state"] == "degraded":
            _print(console, f"Weak: {stage['name']}: {stage['found']}", "yellow")
            _print(console, f"To do: {stage['todo']}")
    if answer["works"] and path is not None and not path["direct"]:
        for line in _not_direct(path):
            _print(console, line)
    _print(console, "")
    for stage in answer["stages"]:
        mark = stage["state"].upper() if stage["state"] == "broken" else stage["state"]
        line = f"{stage['name']:<13}{mark:<11}{stage['found']}"
        _print(console, line, _MARKS.get(stage["state"], "dim"))
    if path is not None:
        _print(console, "")
        for line in _tried(path):
            _print(console, line)


def paths(console: Console, answer: Line) -> None:
    """Each peer, its paths, and what was tried."""
    if not answer["peers"]:
        _print(console, "no peer is known now")
    _peers(console, answer["peers"])


def _peers(console: Console, peers: Sequence[Line]) -> None:
    for peer in peers:
        state = "up" if peer["up"] else f"down: {peer['failure'] or 'not reached yet'}"
        services = ", ".join(peer["services"]) or "no service"
        rtt = "" if not peer["rtt"] else f", round trip {_time(peer['rtt'])}"
        _print(console, f"{peer['peer']} ({services}): {state}{rtt}")
        for path in peer["paths"]:
            mark = "*" if path["selected"] else " "
            rtt = f" {_time(path['rtt'])}" if path.get("rtt") else ""
            mtu = f", MTU {path['mtu']}" if path.get("mtu") else ""
            reason = f": {path['reason']}" if path.get("reason") else ""
            line = f" {mark} {path['kind']} {path['address']}{rtt} {path['state']}{mtu}{reason}"
            _print(console, line)
        if not peer["direct"]:
            for line in _not_direct(peer):
                _print(console, f"   {line}")
        for line in _tried(peer, peer["peer"].partition("/")[0]):
            _print(console, f"   {line}")


def _way(way: Line) -> str:
    inside = f" ({way['inside']})" if way.get("inside") else ""
    return f"{way['kind']} {way['address']}".rstrip() + inside


def _not_direct(story: Line) -> Iterator[str]:
    yield f"Not direct: {story['why']}"
    if story["would_change"]:
        yield f"What would change it: {story['would_change']}"


def _tried(story: Line, peer: str = "connector") -> Iterator[str]:
    """Both NATs, and every pair with its reason. peer: the other end's role."""
    if story["nat_here"]:
        there = story["nat_there"] or "not known"
        yield f"NAT here: {story['nat_here']}; at the {peer}: {there}"
    for title, pairs in (("from here", story["pairs"]), ("from there", story["peer_pairs"])):
        for pair in pairs:
            reason = f": {pair['reason']}" if pair["reason"] else ""
            yield f"  {title} to {pair['kind']} {pair['remote']}: {pair['state']}{reason}"


def _table(console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if console.is_terminal:
        table = Table()
        for head in heads:
            table.add_column(head, no_wrap=head == "service")
        for row in rows:
            style = None if row[1] == "ready" else "red"
            table.add_row(*(escape(cell) for cell in row), style=style)
        console.print(table)
        return
    lines = [tuple(heads), *rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(heads))]
    for line in lines:
        cells = (f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        _print(console, _GAP.join(cells).rstrip())


def _print(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, soft_wrap=True)


def _moment(text: str) -> str:
    """ISO 8601, in UTC, to the minute."""
    return f"{text[:16].replace('T', ' ')} UTC"


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def _age(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
