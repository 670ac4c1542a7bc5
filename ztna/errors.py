"""Errors that a person or a caller may meet, and the exit code that each kind gives.

Every message says what was wrong, where, and what to do about it. A parser of network bytes
raises only `RemoteProtocolError`; a caller that breaks an interface of ours gets
`LocalProtocolError`.
"""


class ZtnaError(Exception):
    """Root of the tree. `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(ZtnaError):
    """The command line is wrong. Code 2 is click's own for this."""

    exit_code = 2


class ConfigError(ZtnaError):
    """A configuration file is missing, unreadable or wrong; the message names path and line."""

    exit_code = 3


class IdentityError(ZtnaError):
    """A certificate, key or CA is missing, unreadable, expired, or not what it must be."""

    exit_code = 4


class RefusedError(ZtnaError):
    """The other side or the policy refused: no right, wrong role, wrong trust domain."""

    exit_code = 5


class UnreachableError(ZtnaError):
    """The other side does not answer, or its name does not resolve."""

    exit_code = 6


class UnresolvedError(UnreachableError):
    """A name does not resolve."""


class ProxyError(UnreachableError):
    """An HTTP proxy does not let us through.

    found, todo: what it does, and what a person can do. lasting: it will say the same again, and
    may lock out who asks too often.
    """

    def __init__(self, found: str, todo: str, *, lasting: bool = False) -> None:
        super().__init__(f"{found}; {todo}")
        self.found = found
        self.todo = todo
        self.lasting = lasting


class LimitError(ZtnaError):
    """A bound of ours was reached; the message says which."""

    exit_code = 9


class SystemSetupError(ZtnaError):
    """The machine lacks something: a privilege, a device, a free port, a kernel feature."""

    exit_code = 7


class SessionClosedError(ZtnaError):
    """The session is gone; the message carries who closed it and why.

    code: what it was closed with (`ztna.net.closing`), where that is known; by_peer: whether the
    other side did.
    """

    exit_code = 6

    def __init__(self, words: str, code: int | None = None, *, by_peer: bool = False) -> None:
        super().__init__(words)
        self.code = code
        self.by_peer = by_peer


class NotDirectError(ZtnaError):
    """A direct path was asked for, and there was none in time; the relay answers. Codes 10 to 12
    are those of `ztna nat-probe`."""

    exit_code = 13


class RemoteProtocolError(ZtnaError):
    """Bytes from the network break the protocol. The only error that a parser of them raises."""

    exit_code = 8


class LocalProtocolError(ZtnaError):
    """Our own code broke an interface: a bug of ours, never the peer's doing."""

    exit_code = 70


CONTAINED: tuple[type[Exception], ...] = (
    ZtnaError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
)
"""What a bug of ours may raise on a peer's input. Caught, logged with its trace and answered with
the end of that one session or flow, only at the few places where many peers meet."""
