"""A network that looks into UDP payloads: it drops raw relayed packets, and passes QUIC."""

import attrs

from ztna.nat.link import MemoryHost, MemoryNetwork, WireBatch

RAW = 0x80


@attrs.define(eq=False)
class Middlebox:
    """Between a host and all others. outward, inward: whether raw packets are dropped on the way
    from the host, and to it. dropped: how many were."""

    network: MemoryNetwork
    host: MemoryHost
    outward: bool = False
    inward: bool = False
    dropped: int = 0

    def __attrs_post_init__(self) -> None:
        self.network.captures.append(self._look)

    def _look(self, _: float, batch: WireBatch) -> None:
        """Called before the link takes a batch, so that its fate can be set here."""
        if self.host.address not in (batch.source[0], batch.destination[0]):
            return
        inward = batch.destination[0] == self.host.address
        source, destination = (self.network.host(a[0]) for a in (batch.source, batch.destination))
        drop = batch.data[0] == RAW and (self.inward if inward else self.outward)
        self.dropped += drop
        link = self.network.link(source, destination)
        link.spec = attrs.evolve(self.network.default, loss=1.0 if drop else 0.0)
