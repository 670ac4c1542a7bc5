"""scripts/demo: a deployment of ztna in network namespaces, with what happens told in words."""

import argparse
import concurrent.futures
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from scripts.lab.deployment import (
    PYTHON,
    Deployment,
    LoggedProcess,
    NotReadyError,
    start,
)
from ztna.errors import SystemSetupError
from ztna.nat.kernel_lab import Host, KernelLab, supported

RELAY, HOME, OFFICE = "198.51.100.10", "198.51.100.20", "198.51.100.30"
APP, APP_PORT, VIRTUAL_IP = "10.2.0.3", 8000, "10.100.0.1"
PAGE = "Hello from a web server that no one outside can connect to."

PICTURE = f"""
  agent 10.1.0.2 -- NAT {HOME} --.                   .-- NAT {OFFICE} -- connector 10.2.0.2
                                         internet                               |
                                            |                                   |
                               intermediate {RELAY}             web server {APP}:{APP_PORT}
"""

# Some of the usual ports, ours, and the web server's.
SCANNED = (22, 80, 443, 4433, 4434, 5201, 8000, 8080, 8443)
_SCAN_PATIENCE = 0.5  # s; an answer within the lab takes less than a millisecond


@attrs.frozen
class Site:
    """The hosts of the picture, and a stranger on the internet."""

    agent: Host
    connector: Host
    app: Host
    intermediate: Host
    stranger: Host


def main() -> int:
    """Run the demo; 0 when everything worked."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave it running until Ctrl-C")
    options = parser.parse_args()
    reason = supported()
    if reason is None and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        reason = "the demo needs /dev/net/tun, readable and writable for this user"
    if reason:
        print(f"scripts/demo: {reason}", file=sys.stderr)
        return SystemSetupError.exit_code
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # A shell starts what it puts in the background with Ctrl-C ignored, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="ztna-demo-") as folder,
            KernelLab() as lab,
            contextlib.ExitStack() as stack,
        ):
            # Once it goes down, a second Ctrl-C must not leave half of it.
            stack.callback(signal.signal, signal.SIGINT, signal.SIG_IGN)
            _play(lab, Path(folder), keep=options.keep)
    except (NotReadyError, SystemSetupError) as error:
        print(f"\nscripts/demo: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"\nscripts/demo: {error}\n{error.stdout}{error.stderr}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; everything is removed.")
        return 130
    print("\nEverything is removed again: namespaces, interfaces, keys.")
    return 0


def _play(lab: KernelLab, folder: Path, *, keep: bool) -> None:
    _say("A network: two homes behind NAT routers, and an intermediate on the internet.")
    print(PICTURE)
    site = _build(lab)
    _say("A private CA, then a key and certificate for each node. The CA stays out of the network.")
    deployment = Deployment(folder, RELAY)
    deployment.create_authority()
    print("  as ztna pki init, request, issue do: spiffe://.../{intermediate,connector,agent}/...")
    capture = folder / "relay.pcap"
    with site.intermediate.capture(capture):
        web = _start(site, deployment, folder)
        _say(f"The agent's user opens http://{VIRTUAL_IP}/, an address that exists nowhere:")
        try:
            _show(site.agent, "curl", "-sS", "--fail", "--max-time", "5", f"http://{VIRTUAL_IP}/")
            _show(site.agent, "ping", "-c", "3", "-i", "0.2", VIRTUAL_IP)
        except subprocess.CalledProcessError:
            for process in deployment.processes:
                print(f"\n-- last words of {process.name}:\n{process.tail()}", file=sys.stderr)
            raise
    _explain(capture, web)
    _say("A stranger on the internet tries the office's address, and the web server's own:")
    _scan(site)
    if keep:
        _wait(site)


def _build(lab: KernelLab) -> Site:
    home = lab.gateway("home", HOME, "10.1.0.0/24")
    office = lab.gateway("office", OFFICE, "10.2.0.0/24")
    return Site(
        agent=lab.host("agent", "10.1.0.2", behind=home),
        connector=lab.host("connector", "10.2.0.2", behind=office),
        app=lab.host("app", APP, behind=office),
        intermediate=lab.public_host("intermediate", RELAY),
        stranger=lab.public_host("stranger", "198.51.100.66"),
    )


def _start(site: Site, deployment: Deployment, folder: Path) -> LoggedProcess:
    pages = folder / "pages"
    pages.mkdir()
    (pages / "index.html").write_text(PAGE + "\n")
    server = (PYTHON, "-u", "-m", "http.server", str(APP_PORT), "--bind", APP, "-d", pages)
    web = start(site.app, "web server", folder / "web.log", *server)
    web.wait_for("Serving HTTP")
    _say("The intermediate starts: its policy says who may reach what, and refuses all else.")
    rules: list[dict[str, object]] = [
        {"who": "agent/laptop", "services": ["web"]},
        {"who": "connector/office", "provides": ["web"]},
    ]
    service: dict[str, object] = {"id": "web", "virtual_ip": VIRTUAL_IP, "protocol": "tcp"}
    wanted = {**service, "port": 80}
    provided = {**wanted, "backend": f"{APP}:{APP_PORT}"}
    steps = (
        ("intermediate", "relay", site.intermediate, deployment.intermediate([*rules])),
        (
            *("connector", "office", site.connector),
            deployment.client("connector", "office", [provided]),
        ),
        ("agent", "laptop", site.agent, deployment.client("agent", "laptop", [wanted])),
    )
    for role, name, host, config in steps:
        deployment.run_until_ready(host, role, deployment.write(role, name, config))
        print(f"  ztna run {role} --config {role}.json    on {host.address}: ready")
    return web


def _show(host: Host, *words: str) -> None:
    print(f"  $ {' '.join(words)}")
    for line in host.run(*words).stdout.strip().splitlines():
        print(f"    {line}")


def _explain(capture: Path, web: LoggedProcess) -> None:
    seen = capture.read_bytes()
    in_clear = "YES" if PAGE.encode() in seen or b"GET / HTTP" in seen else "no"
    served = [line.split(" ")[0] for line in web.output().splitlines() if "GET /" in line]
    _say("What happened, hop by hop:")
    print(f"""\
  agent         took curl's packets from its tunnel interface, as {VIRTUAL_IP} is routed into it,
                and sent them in its QUIC session to {RELAY}, out through its NAT.
  intermediate  asked the policy, and moved them on into the connector's session, which the
                connector had opened from inside: so no port of the office had to be open.
                Its cable carried {len(seen):,} bytes; the page in clear among them: {in_clear}.
  connector     ended the TCP connection itself and opened one to {APP}:{APP_PORT}.
  web server    saw only its neighbour: {served[0] if served else "nobody"}.
                ping was answered by the connector.""")


def _scan(site: Site) -> None:
    for target, ports in ((OFFICE, SCANNED), (APP, (APP_PORT,))):
        results = _scan_host(site.stranger, target, ports)
        print(f"  {target}: " + ", ".join(f"{port} {answer}" for port, answer in results))
    answer = site.stranger.run(
        *("curl", "-sS", "--max-time", "1", f"http://{OFFICE}:{APP_PORT}/"), check=False
    )
    print(f"  $ curl http://{OFFICE}:{APP_PORT}/\n    {answer.stderr.strip()}")


def _scan_host(host: Host, target: str, ports: Sequence[int]) -> Iterator[tuple[int, str]]:
    with concurrent.futures.ThreadPoolExecutor(len(ports)) as pool:
        answers = pool.map(lambda port: _try_port(host, target, port), ports)
        yield from zip(ports, answers, strict=True)


def _try_port(host: Host, target: str, port: int) -> str:
    with host.namespace.open_socket(socket.AF_INET, socket.SOCK_STREAM) as tcp:
        tcp.settimeout(_SCAN_PATIENCE)
        try:
            tcp.connect((target, port))
        except TimeoutError:
            return "silent"
        except ConnectionRefusedError:
            return "refused"
        except OSError as error:
            return error.strerror or "unreachable"
        return "OPEN"


def _wait(site: Site) -> None:
    prefix = ""
    if Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]:
        # An ordinary user's demo lives in a user namespace; others must come in first.
        prefix = f"nsenter --preserve-credentials --user --mount --target {os.getpid()} "
    _say("It keeps running. Try, in another terminal:")
    for host, words in (
        (site.agent, f"curl http://{VIRTUAL_IP}/"),
        (site.agent, f"ping {VIRTUAL_IP}"),
        (site.agent, "ip address"),
        (site.stranger, f"curl --max-time 2 http://{OFFICE}:{APP_PORT}/"),
    ):
        print(f"  {prefix}{' '.join(host.namespace.command(words))}")
    print("Ctrl-C ends it.", flush=True)
    signal.pause()


def _say(words: str) -> None:
    print(f"\n== {words}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
