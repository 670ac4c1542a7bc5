"""What a link of the laboratory in the kernel does to packets, by `LinkSpec`.

Loss and size are rules in the router's forward hook, which every packet crosses; delay, jitter and
reordering are queues around it (`nat.kernel_delay`, as not every kernel has netem); bandwidth is a
token bucket on both ends, and duplication a rule where a packet leaves an end of the link, so that
the copy crosses it like any packet: it may be lost or delayed by itself.
"""

import json
import os
import shutil
import subprocess
import time

import attrs

from ztna.errors import SystemSetupError
from ztna.nat.kernel_delay import DelayQueues
from ztna.nat.kernel_lab import Host
from ztna.nat.link import LinkSpec
from ztna.nat.netns import Namespace
from ztna.nat.ruleset import NotExpressibleError

_PARTS = 1_000_000  # of which `loss` takes a share
_BURST = 4_096  # bytes; our choice: two full packets and some small ones
_BUCKET_POLL = 0.001  # s
_COPIED = 0x4000_0000  # our choice of a bit of a packet's mark; what has it is not copied again


@attrs.define(eq=False)
class LinkShaper:
    """The links of one laboratory. To be closed before its namespaces are."""

    _queues: dict[str, DelayQueues] = attrs.field(factory=dict)
    _copying: set[tuple[str, str]] = attrs.field(factory=set)
    _buckets: dict[tuple[str, str], Namespace] = attrs.field(factory=dict)

    def shape(self, host: Host, spec: LinkSpec) -> None:
        """Let the link between a host and its router do this, and nothing from before.

        Raises NotExpressibleError.
        """
        router, end = host.router.namespace, host.router_end
        rules = []
        if spec.loss >= 1:
            rules.append("drop")
        elif spec.loss:
            rules.append(f"{_share(spec.loss)} drop")
        if spec.mtu < LinkSpec().mtu:
            rules.append(f"meta length > {spec.mtu} drop")
        lines = "".join(
            f'  {way} "{end}" {rule}\n' for way in ("iifname", "oifname") for rule in rules
        )
        router.nft(
            f"add table inet {end}\ndelete table inet {end}\ntable inet {end} {{\n"
            f" chain forward {{ type filter hook forward priority filter - 20;\n{lines} }}\n}}\n"
        )
        self._delay(host, spec)
        for namespace, interface in ((router, end), (host.namespace, host.interface)):
            self._copy(namespace, interface, spec.duplicate)
            namespace.run("tc", "qdisc", "del", "dev", interface, "root", check=False)
            self._buckets.pop((namespace.name, interface), None)
            if spec.bandwidth is not None:
                latency = f"{max(1, round(spec.queue_delay * 1000))}ms"
                rate = f"{int(spec.bandwidth)}bit"
                bucket = ("tbf", "rate", rate, "burst", str(_BURST), "latency", latency)
                namespace.run("tc", "qdisc", "add", "dev", interface, "root", *bucket)
                self._buckets[namespace.name, interface] = namespace

    def drain(self) -> list[int]:
        """Wait until no packet waits on any link; return how many each queue has let go by now."""
        passed = [queues.drain() for queues in self._queues.values()]
        for (_, interface), namespace in self._buckets.items():
            words = ("tc", "-json", "-statistics", "qdisc", "show", "dev", interface, "root")
            while (bucket := json.loads(namespace.run(*words).stdout)[0])["qlen"]:
                # The kernel tells nobody when a bucket runs empty.
                time.sleep(_BUCKET_POLL)
            passed.append(bucket["packets"])
        return passed

    def forget(self, host: Host) -> None:
        """The link is gone, since the host has moved."""
        for end in (
            (host.router.namespace.name, host.router_end),
            (host.namespace.name, host.interface),
        ):
            self._buckets.pop(end, None)
            self._copying.discard(end)

    def close(self) -> None:
        """End all delays; what still waits is lost."""
        for queues in self._queues.values():
            queues.close()
        self._queues.clear()

    def _copy(self, namespace: Namespace, interface: str, share: float) -> None:
        """Send this share of what leaves an interface twice."""
        if not share and (namespace.name, interface) not in self._copying:
            return
        table = f"netdev copies_{interface}"
        text = f"add table {table}\ndelete table {table}\n"
        if share:
            text += (
                f"table {table} {{\n"
                f" chain out {{ type filter hook egress device {interface} priority 0;\n"
                f"  meta mark and {_COPIED} == {_COPIED} return\n"
                f"  meta protocol {{ ip, ip6 }} {_share(share) if share < 1 else ''} "
                f"meta mark set mark or {_COPIED} dup to {interface}\n }}\n}}\n"
            )
            self._copying.add((namespace.name, interface))
        try:
            namespace.nft(text)
        except SystemSetupError as error:
            raise NotExpressibleError(
                f"duplication needs the hook for what leaves an interface (Linux 5.16 with "
                f"CONFIG_NETFILTER_EGRESS, nftables 1.0.1): {error}"
            ) from error

    def _delay(self, host: Host, spec: LinkSpec) -> None:
        router, end = host.router.namespace, host.router_end
        wanted = bool(spec.delay or spec.jitter or spec.reorder)
        if not wanted and router.name not in self._queues:
            return
        if router.name not in self._queues:
            self._queues[router.name] = DelayQueues(router)
        program = "ip6tables" if ":" in host.address else "iptables"
        if shutil.which(program, path=f"{os.defpath}:/usr/sbin:/sbin") is None:
            raise NotExpressibleError(
                f"delay, jitter and reordering need {program} (scripts/setup iptables installs it)"
            )
        # Not every kernel that has NFQUEUE has it for nftables. Two hooks, as a packet that comes
        # back from a queue goes on with the next hook: so it may wait on both of its links.
        for number, (chain, way) in enumerate((("PREROUTING", "-i"), ("POSTROUTING", "-o"))):
            queue = 2 * int(end.removeprefix("link")) + number
            rule = (chain, way, end, "-j", "NFQUEUE", "--queue-num", str(queue))
            router.run(program, "-w", "-t", "mangle", "-D", *rule, check=False)
            if wanted:
                self._queues[router.name].set(queue, spec)
                try:
                    router.run(program, "-w", "-t", "mangle", "-A", *rule)
                except subprocess.CalledProcessError as error:
                    raise NotExpressibleError(
                        f"delay, jitter and reordering need the kernel's NFQUEUE: {error.stderr}"
                    ) from error


def _share(share: float) -> str:
    """What is true of this share of packets, less than 1, at random."""
    parts = min(max(1, round(share * _PARTS)), _PARTS - 1)
    return f"numgen random mod {_PARTS} < {parts}"
