"""The `direct` part of an agent's or connector's file: how direct paths are looked for."""

import attrs

from ztna.config.structure import means
from ztna.config.values import Flag, Ipv4Range


@attrs.frozen
class DirectConfig:
    """Hole punching. Both sides' files count: what one switches off is not done."""

    enabled: Flag = attrs.field(
        metadata=means("Whether direct paths are looked for; else all goes through the relay."),
        default=True,
    )
    predict: Flag = attrs.field(
        metadata=means("Whether the next port of a NAT that counts is guessed."), default=True
    )
    birthday: Flag = attrs.field(
        metadata=means(
            "Whether many ports are tried where one side's NAT uses another port for each "
            "destination: 256 sockets there, up to 2,048 small packets here, in four seconds."
        ),
        default=True,
    )
    port_mapping: Flag = attrs.field(
        metadata=means(
            "Whether the network's gateway is asked to open the UDP port, by PCP, NAT-PMP or "
            "UPnP, so that peers behind any NAT come in."
        ),
        default=True,
    )
    private_prefixes: tuple[Ipv4Range, ...] = attrs.field(
        metadata=means(
            "Private networks that are the same network for both sides, such as a company's, "
            "although both are seen at different public addresses."
        ),
        default=(),
    )
