"""Who a node is: the SPIFFE ID in its certificate, and what role that gives it.

SPIFFE-ID standard, section 2: `spiffe://<trust-domain>/<path>`; our path is `<role>/<name>`.
"""

import enum
import re
from typing import Self

import attrs

from ztna.errors import RemoteProtocolError

# SPIFFE-ID section 2.1: lower-case letters, digits, dots, dashes and underscores; at most 255.
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}")
# Section 2.2 allows these characters in a path segment; the length is our choice, one DNS label.
_NAME = re.compile(r"[A-Za-z0-9._-]{1,63}")


class Role(enum.StrEnum):
    """What a node is in the system; the first segment of its SPIFFE path."""

    INTERMEDIATE = "intermediate"
    CONNECTOR = "connector"
    AGENT = "agent"


@attrs.frozen
class Identity:
    """A verified or configured SPIFFE identity."""

    trust_domain: str
    role: Role
    name: str

    @classmethod
    def parse_untrusted(cls, uri: str) -> Self:
        """Read a SPIFFE ID. Raises RemoteProtocolError on anything that is not one of ours."""
        scheme, separator, rest = uri.partition("://")
        if scheme != "spiffe" or not separator:
            raise RemoteProtocolError(f"not a SPIFFE ID (spiffe://domain/role/name): {uri!r:.120}")
        trust_domain, *path = rest.split("/")
        if not _TRUST_DOMAIN.fullmatch(trust_domain):
            raise RemoteProtocolError(f"SPIFFE ID has a malformed trust domain: {uri!r:.120}")
        if len(path) != 2 or path[0] not in set(Role) or not valid_name(path[1]):
            raise RemoteProtocolError(
                f"SPIFFE ID must end in /intermediate/NAME, /connector/NAME or /agent/NAME: "
                f"{uri!r:.120}"
            )
        return cls(trust_domain, Role(path[0]), path[1])

    @property
    def uri(self) -> str:
        """The SPIFFE ID, as it stands in the certificate."""
        return f"spiffe://{self.trust_domain}/{self}"

    def __str__(self) -> str:
        return f"{self.role}/{self.name}"


def valid_trust_domain(text: str) -> bool:
    """Whether text may be a trust domain."""
    return _TRUST_DOMAIN.fullmatch(text) is not None


def valid_name(text: str) -> bool:
    """Whether text may be the name of a node."""
    return _NAME.fullmatch(text) is not None and text not in {".", ".."}
