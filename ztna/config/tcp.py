"""The `tcp` part of an intermediate's file: where clients come in whose network blocks UDP."""

import attrs

from ztna.config.structure import means
from ztna.config.values import Ip, Port

# What networks that block UDP let out: HTTPS (docs/protocol.md section 8).
DEFAULT_TCP_PORT = 443


@attrs.frozen
class TcpConfig:
    """TLS over TCP beside UDP."""

    port: Port = attrs.field(
        metadata=means("TCP port to listen on; clients try 443 unless told otherwise."),
        default=DEFAULT_TCP_PORT,
    )
    bind: Ip | None = attrs.field(
        metadata=means("Local address to listen on; that of UDP if absent."), default=None
    )
