"""When the flow table has to look at which flow.

`FlowTable` arms a flow after it acted upon it; `due` gives the flows whose time has come, each
once, and they are armed again. A flow has one valid entry, its earliest; entries that became void
stay in the heap until they come up, or until they are most of it and are swept.
"""

import heapq
import itertools
from collections.abc import Iterator

import attrs

from ztna.core.flow import Flow, TcpFlow

# Our choice: sweeping fewer void entries than these is not worth the work.
_LEAST_SWEEP = 64


@attrs.define
class FlowTimers:
    """A heap of (when, order of arming, flow)."""

    _at: dict[Flow, float] = attrs.Factory(dict)
    _heap: list[tuple[float, int, Flow]] = attrs.Factory(list)
    _order: Iterator[int] = attrs.Factory(itertools.count)

    def __len__(self) -> int:
        """Entries, void ones included: behind `arm`, at most twice the flows, and 64."""
        return len(self._heap)

    def arm(self, flow: Flow, at: float) -> None:
        """Look at flow by `at`. An earlier look that is due anyway is enough: it arms again."""
        if self._at.get(flow, at + 1) <= at:
            return
        self._at[flow] = at
        heapq.heappush(self._heap, (at, next(self._order), flow))
        if len(self._heap) > 2 * len(self._at) + _LEAST_SWEEP:
            self._heap = [entry for entry in self._heap if self._is_valid(entry)]
            heapq.heapify(self._heap)

    def arm_tcp(self, flow: TcpFlow, now: float) -> None:
        """Look at a connection when its own timer is due; not at all if it has none."""
        due = flow.connection.get_timer()
        if due is not None:
            self.arm(flow, max(due, now))

    def forget(self, flow: Flow) -> None:
        """The flow is gone."""
        self._at.pop(flow, None)

    def get_timer(self) -> float | None:
        """When the next flow is due; None when none is."""
        while self._heap and not self._is_valid(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> list[Flow]:
        """The flows whose time has come, earliest first; they are not armed any more."""
        flows = []
        while (at := self.get_timer()) is not None and at <= now:
            flow = heapq.heappop(self._heap)[2]
            del self._at[flow]
            flows.append(flow)
        return flows

    def _is_valid(self, entry: tuple[float, int, Flow]) -> bool:
        return self._at.get(entry[2]) == entry[0]
