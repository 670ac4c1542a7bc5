"""What a link of the laboratory in the kernel does to packets, by `LinkSpec`.

Loss and size are rules in the router's forward hook, which every packet crosses; delay, jitter and
reordering are queues around it (`nat.kernel_delay`, as not every kernel has netem); bandwidth is a
token bucket on both ends. Duplication is what none of these can do.
"""

import os
import shutil
import subprocess

import attrs

from ztna.nat.kernel_delay import DelayQueues
from ztna.nat.kernel_lab import Host
from ztna.nat.link import LinkSpec
from ztna.nat.ruleset import NotExpressibleError

_PARTS = 1_000_000  # of which `loss` takes a share
_BURST = 4_096  # bytes; our choice: two full packets and some small ones


@attrs.define(eq=False)
class LinkShaper:
    """The links of one laboratory. To be closed before its namespaces are."""

    _queues: dict[str, DelayQueues] = attrs.field(factory=dict)

    def shape(self, host: Host, spec: LinkSpec) -> None:
        """Let the link between a host and its router do this, and nothing from before.

        Raises NotExpressibleError.
        """
        if spec.duplicate:
            raise NotExpressibleError("the kernel duplicates no packets; the lab in memory does")
        router, end = host.router.namespace, host.router_end
        rules = []
        if spec.loss >= 1:
            rules.append("drop")
        elif spec.loss:
            rules.append(f"numgen random mod {_PARTS} < {round(spec.loss * _PARTS)} drop")
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
            namespace.run("tc", "qdisc", "del", "dev", interface, "root", check=False)
            if spec.bandwidth is not None:
                latency = f"{max(1, round(spec.queue_delay * 1000))}ms"
                rate = f"{int(spec.bandwidth)}bit"
                bucket = ("tbf", "rate", rate, "burst", str(_BURST), "latency", latency)
                namespace.run("tc", "qdisc", "add", "dev", interface, "root", *bucket)

    def close(self) -> None:
        """End all delays; what still waits is lost."""
        for queues in self._queues.values():
            queues.close()
        self._queues.clear()

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
