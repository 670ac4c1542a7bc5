"""How many flows the process may have at once: each takes a file descriptor.

The other half of the descriptors is for all else: sessions over TLS, ports to guess with, connects
to an application of several addresses, the status socket, files that a reload reads.
"""

import resource

import structlog

from ztna.core.flow_shares import MAX_FLOWS

log = structlog.get_logger(__name__)

# Our choice: one of so many descriptors is a flow's.
_PARTS = 2


def flows_within_descriptors() -> int:
    """Raise the soft limit on descriptors as far as it helps and the hard one lets; return how many
    flows then are safe, `MAX_FLOWS` at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _PARTS * MAX_FLOWS
    if not _reaches(soft, wanted):
        raised = wanted if _reaches(hard, wanted) else hard
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
        except (ValueError, OSError) as error:  # macOS: more than the kernel gives to a process
            log.debug("the limit on open files stays", files=soft, error=str(error))
    flows = MAX_FLOWS if _reaches(soft, wanted) else soft // _PARTS
    if flows < MAX_FLOWS:
        log.warning(
            "few flows at once, for want of open files: allow more (LimitNOFILE, ulimit -Hn)",
            flows=flows,
            files=soft,
            wanted=wanted,
        )
    return flows


def _reaches(limit: int, wanted: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= wanted
