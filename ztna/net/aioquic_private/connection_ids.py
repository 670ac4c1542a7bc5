"""Connection ids that the kernel can sort by (`net.keyed_ids`), of an aioquic connection.

A client tells its first id to the server alone; a server tells its own to anybody who asks. So a
server's first id is of the other kind, and the client is told to retire it as soon as there are
others, which is behind the check of its certificate: from then on no stranger has an id of a kind
that peers use. Part of `aioquic_private`; `mutual_tls` checks at import that the names are there.
"""

import os
from collections.abc import Callable

from aioquic._buffer import Buffer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import (
    NEW_CONNECTION_ID_FRAME_CAPACITY,
    QuicConnectionId,
    QuicReceiveContext,
)
from aioquic.quic.events import ConnectionIdIssued, ConnectionIdRetired
from aioquic.quic.packet import QuicFrameType
from aioquic.quic.packet_builder import QuicPacketBuilder

from ztna.core.ports import Address
from ztna.net.aioquic_private.frame_limits import BoundedConnection
from ztna.net.keyed_ids import OUR_IDS, Given

CONNECTION_ID_NAMES = (
    "_events",
    "_handle_new_connection_id_frame",
    "_handle_retire_connection_id_frame",
    "_host_cids",
    "_is_client",
    "_local_initial_source_connection_id",
    "_network_paths",
    "_on_new_connection_id_delivery",
    "_peer_cid",
    "_peer_cid_available",
    "_peer_cid_sequence_numbers",
    "_peer_retire_prior_to",
    "_replenish_connection_ids",
    "_write_new_connection_id_frame",
    "change_connection_id",
    "host_cid",
    "receive_datagram",
)

# Our choice: a path that flaps retires one each time, and what is under way is on the last ones.
_RETIRED_KEPT = 2

ResetToken = Callable[[bytes], bytes]


def random_token(connection_id: bytes) -> bytes:
    """A reset token that no one will ever use, of nodes that cannot reset."""
    del connection_id
    return os.urandom(16)


class KeyedConnection(BoundedConnection):
    """A connection whose ids are ours. reset_token: gives the token of a server's id."""

    def __init__(
        self,
        *,
        configuration: QuicConfiguration,
        original_destination_connection_id: bytes | None,
        retry_source_connection_id: bytes | None,
        reset_token: ResetToken,
    ) -> None:
        super().__init__(
            configuration=configuration,
            original_destination_connection_id=original_destination_connection_id,
            retry_source_connection_id=retry_source_connection_id,
        )
        self._reset_token = reset_token
        self._receiving = False
        self._retired: list[QuicConnectionId] = []
        first = self._host_cids[0]
        first.cid = OUR_IDS.make(Given.TO_PEERS if self._is_client else Given.TO_ANYBODY)
        self.host_cid = self._local_initial_source_connection_id = first.cid
        if not self._is_client:
            first.stateless_reset_token = reset_token(first.cid)

    def receive_datagram(self, data: bytes, addr: Address, now: float) -> None:
        """As aioquic's."""
        self._receiving = True
        try:
            super().receive_datagram(data, addr, now)
        finally:
            self._receiving = False

    def change_connection_id(self) -> None:
        """As aioquic's, which also calls it where the peer uses another id, to do the same. Not
        here: on one path that hides nothing, and what is under way with the old id would be lost.
        """
        if not self._receiving:
            super().change_connection_id()

    def _replenish_connection_ids(self) -> None:
        kept = [each for each in self._retired if each in self._host_cids]
        for retired in kept:  # of no use to the peer
            self._host_cids.remove(retired)
        known = len(self._host_cids)
        super()._replenish_connection_ids()
        for connection_id in self._host_cids[known:]:
            connection_id.cid = OUR_IDS.make(Given.TO_PEERS)
            connection_id.stateless_reset_token = self._reset_token(connection_id.cid)
        self._host_cids += kept

    def _write_new_connection_id_frame(
        self, builder: QuicPacketBuilder, connection_id: QuicConnectionId
    ) -> None:
        """As aioquic's, but a server has its first id retired (RFC 9000 section 5.1.2)."""
        buffer = builder.start_frame(
            QuicFrameType.NEW_CONNECTION_ID,
            capacity=NEW_CONNECTION_ID_FRAME_CAPACITY,
            handler=self._on_new_connection_id_delivery,
            handler_args=(connection_id,),
        )
        buffer.push_uint_var(connection_id.sequence_number)
        buffer.push_uint_var(0 if self._is_client else 1)
        buffer.push_uint8(len(connection_id.cid))
        buffer.push_bytes(connection_id.cid)
        buffer.push_bytes(connection_id.stateless_reset_token)
        connection_id.was_sent = True
        self._events.append(ConnectionIdIssued(connection_id=connection_id.cid))

    def _handle_new_connection_id_frame(
        self, context: QuicReceiveContext, frame_type: int, buf: Buffer
    ) -> None:
        """As aioquic's, which remembers the number of every id that it was ever given, to know one
        that comes twice: one more for each change of the path. All up to the first number that is
        in use, or has not come yet, are as good as retired at the peer's word.
        """
        super()._handle_new_connection_id_frame(context, frame_type, buf)
        reserved = [path.peer_cid for path in self._network_paths if path.peer_cid is not None]
        in_use = {
            each.sequence_number for each in (self._peer_cid, *self._peer_cid_available, *reserved)
        }
        known = self._peer_cid_sequence_numbers
        while self._peer_retire_prior_to in known - in_use:
            known.discard(self._peer_retire_prior_to)
            self._peer_retire_prior_to += 1

    def _handle_retire_connection_id_frame(
        self, context: QuicReceiveContext, frame_type: int, buf: Buffer
    ) -> None:
        """We go on to take packets with what the peer has retired, RFC 9000 section 5.1.2: after a
        change of the path (`path_change`) the frame overtakes what is under way on a slower one.
        With our first id as a server, which the client was told to retire, and with the last two.
        """
        before = list(self._host_cids)
        super()._handle_retire_connection_id_frame(context, frame_type, buf)
        for gone in before:
            if gone not in self._host_cids:
                self._events.remove(ConnectionIdRetired(connection_id=gone.cid))
                self._host_cids.append(gone)
                self._retired = [each for each in self._retired if each is not gone]
                self._retired.append(gone)
        later = [each for each in self._retired if self._is_client or each.sequence_number]
        for forgotten in later[:-_RETIRED_KEPT]:
            self._retired.remove(forgotten)
            self._host_cids.remove(forgotten)
            self._events.append(ConnectionIdRetired(connection_id=forgotten.cid))
