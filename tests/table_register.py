"""What bounds each table that packets may fill. `test_security_page.py` finds the tables.

A value is the names of limits of docs/security.md, each with a test there that reaches it, or
words: why the network cannot fill the table. A table that is new needs a line here.
"""

BATCH = "of the batch at hand, and gone with it: a receive is bounded by its calls"
FLOWS = "ztna.core.flow_shares:MAX_FLOWS"
OUTBOUND = "ztna.core.outbound:MAX_TCP"
SINGLE_PACKETS = "ztna.core.flows:MAX_ANSWERS ztna.core.outbound:MAX_QUEUED"
SESSIONS = "ztna.net.endpoint_settings:EndpointSettings.sessions"
ALL_FRAGMENTED = "ztna.core.packet.fragments:MAX_ALL_PACKETS"
OWN_FILE = "from this node's own file, or for its own requests"
EVENTS = "drained by the driver after every call, which one batch or timer fills"
SERVICES = "ztna.core.registry:MAX_SERVICES"
CHANNELS = "ztna.core.channels:MAX_CHANNELS"
PARTED = "ztna.core.parted:MAX_PARTED"
AGENTS = "ztna.roles.connector_peers:MAX_AGENTS"
CONNECTORS = "ztna.roles.agent_peers:MAX_PEERS"
GUESSED = "ztna.core.ice.birthday:BirthdayBudget.sockets"
EXTRA_PORTS = "ztna.roles.punching:MAX_EXTRA_PORTS"
STREAMS = "ztna.net.stream_listener:MAX_CONNECTIONS"

TABLES = {
    "ztna.backend.terminator:Terminator._drivers": FLOWS,
    "ztna.backend.terminator:Terminator._draining": "ztna.backend.terminator:MAX_DRAINING",
    "ztna.backend.terminator:Terminator._heard": OWN_FILE,
    "ztna.core.bbr:Bbr._rates": "a fixed number of rounds",
    "ztna.core.bbr:Bbr._extras": "a fixed number of rounds",
    "ztna.core.channels:ChannelTable._legs": f"{CHANNELS} {SESSIONS}",
    "ztna.core.channels:ChannelTable._owned": f"{CHANNELS} {SESSIONS}",
    "ztna.core.channels:ChannelTable._addresses": SESSIONS,
    "ztna.core.channels:ChannelTable._budgets": SESSIONS,
    "ztna.core.coalesce:_Train.segments": BATCH,
    "ztna.core.encapsulation:Decapsulator.relayed": BATCH,
    "ztna.core.flow:UdpFlow.inbox": "ztna.core.flow:MAX_INBOX ztna.core.flow:MAX_INBOX_BYTES",
    "ztna.core.flow_shares:Shares.pending": "ztna.core.flow_shares:MAX_PENDING_CONNECTS",
    "ztna.core.flow_shares:Shares.flows_of": FLOWS,
    "ztna.core.flow_timers:FlowTimers._at": f"{FLOWS} {OUTBOUND}",
    "ztna.core.flow_timers:FlowTimers._heap": "swept when it has twice the flows, and 64",
    "ztna.core.flows:FlowTable._flows": FLOWS,
    "ztna.core.flows:FlowTable._events": EVENTS,
    "ztna.core.ice.agent:IceAgent._events": EVENTS,
    "ztna.core.ice.agent:IceAgent._extra_ports": f"{GUESSED} {EXTRA_PORTS}",
    "ztna.core.ice.checklist:CheckList._pairs": "ztna.core.ice.checklist:MAX_PAIRS",
    "ztna.core.ice.exchange:CheckExchange._outbox": EVENTS,
    "ztna.core.ice.owner:OwnerBook._owners": "what exchanges keep: two names and their open checks",
    "ztna.core.ice.exchange:CheckExchange._keys": "two generations",
    "ztna.core.ice.exchange:CheckExchange._sent": "ztna.core.ice.exchange:MAX_OUTSTANDING",
    "ztna.core.ice.exchange:CheckExchange._seen": "ztna.core.ice.exchange:MAX_REMEMBERED",
    "ztna.core.ice.negotiation:Negotiation._messages": EVENTS,
    "ztna.core.ice.paths:PathTable._paths": "ztna.core.ice.paths:MAX_PATHS",
    "ztna.core.inner_channels:InnerChannels._inner": SESSIONS,
    "ztna.core.inner_channels:InnerChannels._asking": SESSIONS,
    "ztna.core.limits:KeyedLimiter._buckets": (
        "ztna.core.limits:MAX_SOURCES ztna.core.flow_shares:MAX_SYN_SOURCES "
        "ztna.roles.served:MAX_ARRIVALS ztna.core.refusal:MAX_ERROR_SOURCES "
        "ztna.core.ice.stun_gate:MAX_PROVEN"
    ),
    "ztna.core.messages:FrameReader._buffer": "ztna.core.messages:MAX_FRAME",
    "ztna.core.mtuprobe:MtuProber._requests": "probes that this node sent",
    "ztna.core.mtuprobe:MtuProber._outbox": "probes that this node sends",
    "ztna.core.mtusearch:MtuSearch._outbox": "probes that this node sends",
    "ztna.core.natprobe:NatProber._running": "probes that this node sent",
    "ztna.core.natprobe:NatProber._outbox": "probes that this node sends",
    "ztna.core.natprobe:NatProber._events": EVENTS,
    "ztna.core.offload:_Run.pieces": "one super-packet of 64 KiB; its index has 15 bits",
    "ztna.core.outbound:OutboundTable._flows": f"{OUTBOUND} ztna.core.outbound:MAX_UDP",
    "ztna.core.outbound:OutboundTable._sizes": "two protocols",
    "ztna.core.outbound:OutboundTable._events": EVENTS,
    "ztna.core.packet.fragments:_Partial.pieces": "ztna.core.packet.fragments:MAX_FRAGMENTS",
    "ztna.core.packet.fragments:_Partial.ecn": "two bits",
    "ztna.core.packet.fragments:_Partial.head": "an IP header",
    "ztna.core.packet.fragments:_Share.keys": "ztna.core.packet.fragments:MAX_PACKETS",
    "ztna.core.packet.fragments:Reassembler._partials": ALL_FRAGMENTED,
    "ztna.core.packet.fragments:Reassembler._shares": ALL_FRAGMENTED,
    "ztna.core.reassembly:_Partial.pieces": "the count of pieces has one byte",
    "ztna.core.reassembly:MessageReassembler._partials": "ztna.core.reassembly:MAX_MESSAGES",
    "ztna.core.registration:Registrar._services": OWN_FILE,
    "ztna.core.registration:Registrar._events": EVENTS,
    "ztna.core.registry:AgentRoute.destinations": "ztna.core.registry:MAX_DESTINATIONS",
    "ztna.core.registry:Client.routes": SERVICES,
    "ztna.core.registry:Client.routes_by_number": SERVICES,
    "ztna.core.registry:Client.provides": SERVICES,
    "ztna.core.registry:Registry.reserved": "identities that our CA has certified",
    "ztna.core.registry:Registry._clients": SESSIONS,
    "ztna.core.registry:Registry._by_address": SESSIONS,
    "ztna.core.registry:Registry._providers": f"{SERVICES} {SESSIONS}",
    "ztna.core.registry:Registry._awaited": "services whose connector has gone, for seconds",
    "ztna.core.registry:Registry._numbers": "services that the policy names; numbers have 16 bits",
    "ztna.core.registry:Registry._free_numbers": "numbers have 16 bits",
    "ztna.core.parted:PartedTable._sessions": PARTED,
    "ztna.core.parted:PartedTable._owners": PARTED,
    "ztna.core.relay:_Output.messages": BATCH,
    "ztna.core.relay:_Output.packets": BATCH,
    "ztna.core.relay:_Output.slices": BATCH,
    "ztna.core.relay:_Way.messages": BATCH,
    "ztna.core.relay:_Batch.ways": BATCH,
    "ztna.core.relay:_Batch.verdicts": BATCH,
    "ztna.core.relay:_Batch.outputs": BATCH,
    "ztna.core.relay:_Batch.unsettled": BATCH,
    "ztna.core.relay:Relay._legs": SESSIONS,
    "ztna.core.rendezvous:_Wishes.sessions": "ztna.core.rendezvous:MAX_KNOWN",
    "ztna.core.rendezvous:_Wishes.told": SERVICES,
    "ztna.core.rendezvous:_Pair.told": "the two ends; a client that is replaced is forgotten",
    "ztna.core.rendezvous:Rendezvous._wishes": SESSIONS,
    "ztna.core.rendezvous:Rendezvous._pairs": f"{CHANNELS} {SESSIONS}",
    "ztna.core.rendezvous:Rendezvous._ids": f"{CHANNELS} {SESSIONS}",
    "ztna.core.rendezvous:Rendezvous._moves": SESSIONS,
    "ztna.core.rendezvous:Rendezvous._events": EVENTS,
    "ztna.core.relay:Relay._inner": BATCH,
    "ztna.core.waiting:_Queue.packets": "ztna.core.waiting:MAX_PACKETS ztna.core.waiting:MAX_BYTES",
    "ztna.core.waiting:WaitingPackets._queues": OWN_FILE,
    "ztna.core.routes:RouteTable._by_address": OWN_FILE,
    "ztna.core.routes:RouteTable.labels": OWN_FILE,
    "ztna.core.routes:RouteTable.refused": OWN_FILE,
    "ztna.core.routes:RouteTable._by_number": OWN_FILE,
    "ztna.core.routes:RouteTable._flows": "ztna.core.routes:MAX_FLOWS",
    "ztna.core.stream_frames:BatchReader._buffer": "ztna.core.stream_frames:MAX_DATA",
    "ztna.core.tcp.block:ControlBlock.events": "drained by the splice at every wake",
    "ztna.core.tcp.block:ControlBlock.replies": BATCH,
    "ztna.core.tcp.buffers:ChunkQueue._chunks": "the receive window: TcpConfig.receive_buffer",
    "ztna.core.tcp.buffers:SendBuffer._starts": "what the application wrote: TcpConfig.send_buffer",
    "ztna.core.tcp.buffers:SendBuffer._chunks": "what the application wrote: TcpConfig.send_buffer",
    "ztna.core.tcp.buffers:ReassemblyQueue._ranges": "ztna.core.tcp.buffers:MAX_RANGES",
    "ztna.core.tcp.departure:_Writer._segments": BATCH,
    "ztna.core.tcp.rtt:RttEstimator._minima": "rising samples of one minute",
    "ztna.core.tcp.scoreboard:Scoreboard.flights": "ztna.core.tcp.scoreboard:MAX_FLIGHTS",
    "ztna.core.turns:Turns._last_words": SINGLE_PACKETS,
    "ztna.core.turns:Turns._packets": SINGLE_PACKETS,
    "ztna.core.turns:Turns._ready": f"{FLOWS} {OUTBOUND}",
    "ztna.core.upnp.xml:_Builder.open": "ztna.core.upnp.xml:MAX_DEPTH",
    "ztna.ingress.directory:Directory._by_name": OWN_FILE,
    "ztna.ingress.directory:Directory._by_address": OWN_FILE,
    "ztna.ingress.forward:UdpForward._flows": "ztna.ingress.forward:MAX_PEERS",
    "ztna.ingress.host:UserspaceHost._drivers": f"{OUTBOUND} ztna.core.outbound:MAX_UDP",
    "ztna.ingress.socks:_UdpAssociation._flows": "ztna.core.outbound:MAX_UDP",
    "ztna.net.aioquic_private.path_change:PathBook._memories": (
        "ztna.net.aioquic_private.path_change:MAX_MEMORIES"
    ),
    "ztna.net.closing:Farewell.batches": "the last packet alone",
    "ztna.net.endpoint:Endpoint._due": SESSIONS,
    "ztna.net.peer_path:PathTable._by_address": f"{AGENTS} {CONNECTORS}",
    "ztna.net.peer_path:PathTable._by_channel": "one of each path",
    "ztna.net.session:Session._inbox": "ztna.net.session_settings:SessionSettings.inbox_bytes",
    "ztna.net.session_queues:SessionQueues._outgoing": (
        "ztna.net.session_settings:SessionSettings.outgoing_datagrams"
    ),
    "ztna.net.session_queues:SessionQueues._incoming": (
        "ztna.net.session_settings:SessionSettings.incoming_datagrams"
    ),
    "ztna.net.session_queues:SessionQueues._control_out": (
        "ztna.net.session_settings:SessionSettings.control_backlog"
    ),
    "ztna.net.session_queues:SessionQueues._control_in": (
        "ztna.net.session_settings:SessionSettings.control_backlog"
    ),
    "ztna.net.session_mtu:SessionMtu._answers": "probes that this node sent",
    "ztna.net.session_queues:SessionQueues._questions": OWN_FILE,
    "ztna.net.session_table:SessionTable.by_id": SESSIONS,
    "ztna.net.session_table:SessionTable.half_open": (
        "ztna.net.endpoint_settings:EndpointSettings.half_open"
    ),
    "ztna.net.session_table:SessionTable.outbound": "sessions that this node began",
    "ztna.net.session_table:SessionTable._ids": SESSIONS,
    "ztna.net.stream_listener:StreamListener._half_open": "ztna.net.stream_listener:MAX_HALF_OPEN",
    "ztna.net.stream_dialer:StreamDialer._asked": "connections that this node asked for",
    "ztna.net.stream_port:StreamPort._streams": STREAMS,
    "ztna.net.stream_port:StreamPort._inbound": f"one read of each stream: {STREAMS}",
    "ztna.net.tls_stream:TlsStream._queue": "ztna.net.tls_stream:MAX_QUEUE",
    "ztna.net.udp:SocketUdpPort._local_addresses": "ztna.net.udp:_MAX_LOCAL_ADDRESSES",
    "ztna.net.udp_inlets:Inlets._buffer": "of one size",
    "ztna.roles.agent_peers:AgentPeers.unavailable": OWN_FILE,
    "ztna.roles.agent_peers:AgentPeers._peers": CONNECTORS,
    "ztna.roles.connector_peers:ConnectorPeers._numbers": OWN_FILE,
    "ztna.roles.connector_peers:ConnectorPeers._agents": AGENTS,
    "ztna.roles.control_keeper:ControlKeeper._ways": "two ways",
    "ztna.roles.echoes:Record.outcomes": "REMEMBERED rounds; it forgets the oldest",
    "ztna.roles.echoes:EchoBook.records": OWN_FILE,
    "ztna.roles.echoes:EchoBook._waiting": "ztna.roles.echoes:MAX_WAITING",
    "ztna.roles.gathering:Gatherer._asked": "questions that this node asks",
    "ztna.roles.gathering:Gatherer._resolved": "one of each IP version",
    "ztna.roles.health:HealthDesk._results": OWN_FILE,
    "ztna.roles.health:HealthDesk._silent_at": OWN_FILE,
    "ztna.roles.health:HealthAsks._waiting": OWN_FILE,
    "ztna.roles.health:HealthAsks._answers": OWN_FILE,
    "ztna.roles.address_book:AddressBook.by_identity": "identities that our CA has certified",
    "ztna.roles.served:Served.refused": SERVICES,
    "ztna.roles.served:Served.unauthorised": SERVICES,
    "ztna.roles.served:Intermediate.served": SESSIONS,
    "ztna.roles.served:Intermediate._arrivals": "ztna.roles.served:MAX_ARRIVALS",
    "ztna.roles.control_client:ControlLink.labels": OWN_FILE,
    "ztna.roles.control_client:ControlLink.refused": OWN_FILE,
    "ztna.roles.control_client:ControlLink.numbers": "of one frame: ztna.core.messages:MAX_FRAME",
    "ztna.roles.control_keeper:ControlKeeper._streams": "sessions that this node began",
    "ztna.roles.peer_link:PeerLink.services": "of one frame: ztna.core.messages:MAX_FRAME",
    "ztna.roles.peer_link:PeerLink.labels": "of one frame: ztna.core.messages:MAX_FRAME",
    "ztna.roles.punching:Puncher._peers": f"{AGENTS} {CONNECTORS}",
    "ztna.roles.punching:Puncher._by_exchange": f"{AGENTS} {CONNECTORS}",
    "ztna.roles.punching:DirectPath._ports": EXTRA_PORTS,
    "ztna.roles.punching:DirectPath._scopes": EXTRA_PORTS,
    "ztna.roles.session_race:Race._failures": "sessions that this node began",
    "ztna.roles.session_race:Race.runners": "one of UDP, one of TLS",
    "ztna.roles.signed_policy:SignedPolicy.refused": "keys are words of ours",
    "ztna.roles.signed_policy:SignedPolicy._callbacks": "parts of this node",
    "ztna.roles.tree:StatisticsRegistry._sources": "parts of this node",
}
