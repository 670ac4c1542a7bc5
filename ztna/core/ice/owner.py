"""Whose a STUN message is, where several share a port: found before anything is checked."""

from ztna.core.ports import Buffer
from ztna.core.stun.attributes import Username
from ztna.core.stun.messages import MessageClass, parse_stun_untrusted
from ztna.errors import RemoteProtocolError


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
