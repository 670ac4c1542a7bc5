"""What a link of the laboratory in the kernel does to packets, by `LinkSpec`.

Loss and size limit are rules in the router's forward hook, which every packet crosses; bandwidth is
a token bucket on both ends. Delay, jitter, reordering and duplication need netem, which takes the
bucket's place and does all of it but the size; not every kernel has it.
"""

import functools

from ztna.nat.kernel_lab import Host
from ztna.nat.link import LinkSpec
from ztna.nat.netns import Namespace
from ztna.nat.ruleset import NotExpressibleError

_PARTS = 1_000_000  # of which `loss` takes a share
_BURST = 4_096  # bytes; our choice: two full packets and some small ones


def shape(host: Host, spec: LinkSpec) -> None:
    """Let the link between a host and its router do this, and nothing from before."""
    table, end = f"link_{host.router_end}", host.router_end
    rules = []
    if spec.loss >= 1:
        rules.append("drop")
    elif spec.loss:
        rules.append(f"numgen random mod {_PARTS} < {round(spec.loss * _PARTS)} drop")
    if spec.mtu < LinkSpec().mtu:
        rules.append(f"meta length > {spec.mtu} drop")
    lines = "\n".join(f'  {way} "{end}" {rule}' for way in ("iifname", "oifname") for rule in rules)
    bucket = _bucket(spec, host.namespace)
    host.router.namespace.nft(
        f"add table inet {table}\ndelete table inet {table}\n"
        f"table inet {table} {{\n chain forward {{ type filter hook forward priority filter - 20;\n"
        f"{lines}\n }}\n}}\n"
    )
    for namespace, interface in ((host.router.namespace, end), (host.namespace, host.interface)):
        namespace.run("tc", "qdisc", "del", "dev", interface, "root", check=False)
        if bucket:
            namespace.run("tc", "qdisc", "add", "dev", interface, "root", *bucket)


def _bucket(spec: LinkSpec, namespace: Namespace) -> list[str]:
    if spec.delay or spec.jitter or spec.reorder or spec.duplicate:
        if not has_netem(namespace.name):
            raise NotExpressibleError(
                "delay, jitter, reordering and duplication need the kernel's netem "
                "(modprobe sch_netem), which is not there; the laboratory in memory has them"
            )
        words = ["netem", "delay", f"{spec.delay + spec.jitter / 2}s", f"{spec.jitter / 2}s"]
        if spec.reorder:
            words += ["reorder", f"{100 * (1 - spec.reorder)}%"]
        if spec.duplicate:
            words += ["duplicate", f"{100 * spec.duplicate}%"]
        if spec.bandwidth is not None:
            words += ["rate", f"{int(spec.bandwidth)}bit"]
        return words
    if spec.bandwidth is not None:
        latency = f"{max(1, round(spec.queue_delay * 1000))}ms"
        rate = f"{int(spec.bandwidth)}bit"
        return ["tbf", "rate", rate, "burst", str(_BURST), "latency", latency]
    return []


@functools.cache
def has_netem(name: str) -> bool:
    """Whether the kernel can delay packets; tried on the loopback of that namespace."""
    namespace = Namespace(name)
    if namespace.run("tc", "qdisc", "add", "dev", "lo", "root", "netem", check=False).returncode:
        return False
    namespace.run("tc", "qdisc", "del", "dev", "lo", "root")
    return True
