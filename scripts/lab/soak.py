"""scripts/soak: real processes for an hour, with restarts and NAT rebindings; what became of it.

    agent, visitor (10.1.0.0/24) -- NAT -- internet -- NAT -- connector, applications (10.2.0.0/24)
                                              |
                                     relay 198.51.100.10

The probes of `soak_probes` use the tunnel all the time; the schedule of `Soak` disturbs it; every
half minute each role is looked at (`soak_memory`); `soak_report` writes it up.
"""

import argparse
import contextlib
import functools
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import attrs

from scripts.lab.deployment import PYTHON, READY, Deployment, LoggedProcess, NotReadyError, start
from scripts.lab.soak_memory import Watched
from scripts.lab.soak_probes import LongConnection, Probe, fetch, fetch_checked, read_ping, udp_echo
from scripts.lab.soak_report import PING_INTERVAL, Event, Run, write_report
from scripts.lab.soak_servers import ECHO_PORT, HTTP_PORT
from ztna.errors import SystemSetupError
from ztna.nat.kernel_lab import Gateway, Host, KernelLab, supported

RELAY, HOME, OFFICE = "198.51.100.10", "198.51.100.20", "198.51.100.30"
WEB, ECHO, APPS = "10.100.0.2", "10.100.0.1", "10.2.0.3"
PAGE = os.urandom(700)
FILE_BYTES = 5_000_000


_SAMPLES, _VISITOR, _RESTART, _REBINDING = 30.0, 60.0, 600.0, 420.0  # s between two, in an hour
_POLL = 0.1


def random_ports(wan_address: str) -> str:
    """A gateway that picks a port anew whenever it has forgotten a flow: conntrack -F rebinds."""
    return f"""
table ip natlab {{
 chain post {{ type nat hook postrouting priority srcnat;
  oifname "wan" meta l4proto udp snat ip to {wan_address} : 20000-60000 random
  oifname "wan" snat ip to {wan_address}
 }}
 chain input {{ type filter hook input priority filter;
  iifname "wan" ct state new meta l4proto {{ udp, tcp }} drop
 }}
 chain forward {{ type filter hook forward priority filter;
  iifname "wan" ct state new ct status ! dnat drop
 }}
}}
"""


@attrs.define(eq=False)
class Site:
    """The picture above, and the files of its roles."""

    deployment: Deployment
    home: Gateway
    office: Gateway
    relay: Host
    connector: Host
    apps: Host
    agent: Host
    visitor: Host
    files: dict[str, Path] = attrs.field(factory=dict)


def build(lab: KernelLab, folder: Path) -> Site:
    """Make the network, the certificates and the files."""
    home = lab.gateway("home", HOME, "10.1.0.0/24", random_ports)
    office = lab.gateway("office", OFFICE, "10.2.0.0/24", random_ports)
    site = Site(
        Deployment(folder, RELAY),
        home,
        office,
        relay=lab.public_host("relay", RELAY),
        connector=lab.host("connector", "10.2.0.2", behind=office),
        apps=lab.host("apps", APPS, behind=office),
        agent=lab.host("agent", "10.1.0.2", behind=home),
        visitor=lab.host("visitor", "10.1.0.3", behind=home),
    )
    made = site.deployment
    made.create_authority()
    names = ["web", "echo"]
    policy: list[dict[str, object]] = [
        {"who": "agent/agent", "services": names},
        {"who": "agent/visitor", "services": names},
        {"who": "connector/office", "provides": names},
    ]
    provided: list[dict[str, object]] = [
        {"id": "web", "backend": f"{APPS}:{HTTP_PORT}", "protocol": "tcp"},
        {"id": "echo", "backend": f"{APPS}:{ECHO_PORT}"},
    ]
    wanted: list[dict[str, object]] = [
        {"id": "web", "virtual_ip": WEB, "port": 80, "protocol": "tcp"},
        {"id": "echo", "virtual_ip": ECHO, "port": ECHO_PORT, "protocol": ["tcp", "udp"]},
    ]
    for role, name, config in (
        ("intermediate", "relay", made.intermediate([*policy])),
        ("connector", "office", made.client("connector", "office", [*provided])),
        ("agent", "agent", made.client("agent", "agent", [*wanted])),
        ("agent", "visitor", made.client("agent", "visitor", [*wanted])),
    ):
        site.files[name] = made.write(role, name, config)
    return site


@attrs.define(eq=False)
class Soak:
    """The run: what is going on, what is due when, and what has been seen."""

    site: Site
    folder: Path
    minutes: float
    began: float = attrs.field(factory=time.monotonic)
    roles: dict[str, Watched] = attrs.field(factory=dict)
    run: Run = attrs.field(factory=Run)
    probes: list[Probe] = attrs.field(factory=list)
    _turns: dict[str, int] = attrs.field(factory=dict)

    def play(self) -> None:
        """Start everything, wait for the end of the time, stop the probes."""
        self._start_applications()
        for name in ("relay", "office", "agent"):
            self._start(name)
        connection = LongConnection(self.site.agent, ECHO)
        self._start_probes(connection)
        ping_log = self.folder / "ping.log"
        words = ("ping", "-D", "-i", str(PING_INTERVAL), WEB)
        ping = start(self.site.agent, "ping", ping_log, *words)
        self.began = time.monotonic()
        try:
            self._keep_schedule()
        finally:
            for probe in self.probes:
                probe.stop()
            connection.close()
            for watched in self.roles.values():
                watched.sample()
            ping.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                ping.wait(5)
            self.run.ping = read_ping(ping_log)
            self.run.ping_summary = ping.tail().strip().splitlines()[-2:]
            self.run.connections_opened = connection.opened
            self.run.seconds = time.monotonic() - self.began
            self.run.began = self.began

    def _start_applications(self) -> None:
        pages = self.folder / "pages"
        pages.mkdir()
        (pages / "page").write_bytes(PAGE)
        (pages / "file").write_bytes(os.urandom(FILE_BYTES))
        command = (PYTHON, "-m", "scripts.lab.soak_servers", APPS, pages)
        start(self.site.apps, "applications", self.folder / "apps.log", *command).wait_for(READY)

    def _start_probes(self, connection: LongConnection) -> None:
        agent = self.site.agent
        file_digest = hashlib.sha256((self.folder / "pages/file").read_bytes()).hexdigest()
        page_digest = hashlib.sha256(PAGE).hexdigest()
        get = functools.partial(fetch_checked, agent, WEB)
        self.probes += [
            Probe("HTTP request, 700 bytes", 1, functools.partial(get, "page", page_digest)),
            Probe("UDP echo, 200 bytes", 1, functools.partial(udp_echo, agent, ECHO)),
            Probe("download, 5 MB, SHA-256", 20, functools.partial(get, "file", file_digest)),
            Probe("one TCP connection, 64 bytes and back", 2, connection.once),
        ]
        for probe in self.probes:
            probe.start()
        self.run.probes = self.probes

    def _keep_schedule(self) -> None:
        scale = min(1.0, self.minutes / 30)  # a short try has all kinds of events too
        restart, rebinding = max(20.0, _RESTART * scale), max(20.0, _REBINDING * scale)
        short = scale < 0.5
        # Offsets in seconds, so that no two of them meet.
        schedule: list[tuple[float, float, Callable[[], None]]] = [
            (0.0, 5.0 if short else _SAMPLES, self._sample),
            (3.0, _VISITOR / 2, self._visit),
            (restart + (7.0 if short else 15.0), restart, self._restart),
            (rebinding + (17.0 if short else 50.0), rebinding, self._rebind),
        ]
        end = self.began + self.minutes * 60
        while (now := time.monotonic()) < end:
            for number, (due, interval, action) in enumerate(schedule):
                if self.began + due <= now:
                    schedule[number] = (due + interval, interval, action)
                    try:
                        action()
                    except (NotReadyError, SystemSetupError, subprocess.SubprocessError) as error:
                        self.run.deaths.append(str(error))
            self._look_for_deaths()
            time.sleep(_POLL)

    def _start(self, name: str) -> LoggedProcess:
        site = self.site
        role, host, services = {
            "relay": ("intermediate", site.relay, 0),
            "office": ("connector", site.connector, 2),
            "agent": ("agent", site.agent, 2),
            "visitor": ("agent", site.visitor, 2),
        }[name]
        process = site.deployment.run_until_ready(host, role, site.files[name], services)
        number = self._turn(f"start {name}") + 1
        self.roles[name] = Watched(process, number)
        self.run.watched.append(self.roles[name])
        self.roles[name].sample()
        return process

    def _turn(self, what: str) -> int:
        self._turns[what] = self._turns.get(what, -1) + 1
        return self._turns[what]

    def _sample(self) -> None:
        self.run.loads.append(os.getloadavg()[0])
        for watched in self.roles.values():
            watched.sample()

    def _stop(self, name: str, *, kill: bool) -> None:
        watched = self.roles.pop(name, None)
        if watched is None:  # it died before
            return
        watched.sample()
        if kill:
            watched.process.kill()
        else:
            watched.process.stop()

    def _restart(self) -> None:
        kill = self._turn("restart") % 2 == 1
        at = time.monotonic()
        self._stop("relay", kill=kill)
        stopped = time.monotonic()
        self._start("relay")
        words = "intermediate killed (SIGKILL)" if kill else "intermediate stopped (SIGTERM)"
        down = time.monotonic() - stopped
        self.run.events.append(Event(at, f"{words}, started again", down))

    def _rebind(self) -> None:
        office = self._turn("rebinding") % 2 == 1
        gateway = self.site.office if office else self.site.home
        self.run.events.append(
            Event(time.monotonic(), f"NAT rebinding of the {'connector' if office else 'agent'}")
        )
        gateway.outside.run("conntrack", "-F")

    def _visit(self) -> None:
        if "visitor" in self.roles:
            self._stop("visitor", kill=self._turn("visitor leaves") % 2 == 1)
            return
        try:
            self._start("visitor")
            if fetch(self.site.visitor, WEB, "page") != PAGE:
                raise NotReadyError("the visitor got another page")
        except (NotReadyError, OSError) as error:
            words = str(error).splitlines()
            self.run.visits_failed.append(" ... ".join(dict.fromkeys((words[0], words[-1]))))
        self.run.visits += 1

    def _look_for_deaths(self) -> None:
        for name, watched in list(self.roles.items()):
            if (code := watched.process.process.poll()) is not None:
                words = f"{watched.name}: exit code {code}\n{watched.process.tail()}"
                self.run.deaths.append(words)
                del self.roles[name]


def main() -> int:
    """Run, and write the report; 0 when no role died and every failure lies within an event."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="length (default 60)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="where the report goes")
    options = parser.parse_args()
    if reason := supported():
        print(f"scripts/soak: {reason}", file=sys.stderr)
        return SystemSetupError.exit_code
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="ztna-soak-") as folder, KernelLab() as lab:
        try:
            soak = Soak(build(lab, Path(folder)), Path(folder), options.minutes)
            with contextlib.suppress(KeyboardInterrupt, SystemExit):
                soak.play()
        except (NotReadyError, SystemSetupError) as error:
            print(f"scripts/soak: {error}", file=sys.stderr)
            return 1
        text = write_report(soak.run)
    if options.report is None:
        print(text)
    else:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(text)
    return 1 if soak.run.deaths else 0


if __name__ == "__main__":
    sys.exit(main())
