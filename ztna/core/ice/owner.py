"""Whose a STUN message is, where several share a port: found before anything is checked.

Anybody can send STUN to that port, as fast as the kernel lets it in. So what is nobody's must cost
no more where there are a thousand peers: the exchanges of a port claim in one `OwnerBook` what they
are addressed by.
"""

from typing import Generic, TypeVar

import attrs

from ztna.core.ports import Buffer
from ztna.core.stun.attributes import Username
from ztna.core.stun.messages import MessageClass, parse_stun_untrusted
from ztna.errors import RemoteProtocolError

Owner = TypeVar("Owner")


@attrs.define(eq=False)
class OwnerBook(Generic[Owner]):
    """Who answers to a user name fragment, and who waits for a transaction id."""

    _owners: dict[str | bytes, Owner] = attrs.field(factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self._owners)

    def claim(self, key: str | bytes, owner: Owner) -> None:
        """From now on messages with this key are its own."""
        self._owners[key] = owner

    def release(self, key: str | bytes, owner: Owner) -> None:
        """It is so no more; no effect on what another one has claimed since."""
        if self._owners.get(key) is owner:
            del self._owners[key]

    def find(self, key: str | bytes | None) -> Owner | None:
        """Whose it is, as `stun_owner_untrusted` gives it; None if nobody's."""
        return None if key is None else self._owners.get(key)


def stun_owner_untrusted(data: Buffer) -> str | bytes | None:
    """The user name fragment that a request is for; the transaction id of a response; None for
    what is neither."""
    try:
        message = parse_stun_untrusted(data)
    except RemoteProtocolError:
        return None
    if message.message_class in {MessageClass.SUCCESS, MessageClass.ERROR}:
        return message.transaction_id
    username = message.find(Username)
    if message.message_class is not MessageClass.REQUEST or username is None:
        return None
    return username.text.partition(":")[0]
