"""The bounds of an endpoint."""

import attrs


@attrs.frozen
class EndpointSettings:
    """Bounds of an endpoint; all are our choice.

    half_open: clients whose handshake is not complete. retry_from: so many of these, and new
    ones must first prove their address (RFC 9000 section 8.1.2). sessions: all together.
    accept_queue: verified sessions that nobody has taken from `listen` yet. resets: stateless
    resets a second. goodbye: seconds for the last words.
    """

    half_open: int = 1024
    retry_from: int = 64
    resets: float = 200.0
    sessions: int = 16_384
    accept_queue: int = 256
    goodbye: float = 1.0
