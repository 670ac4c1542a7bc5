"""What tests with whole roles see of hole punching inside them."""

from typing import Any

import pytest

from ztna.core.ice.agent import IceAgent
from ztna.roles import punching
from ztna.roles.punching import Puncher


class Punchers:
    """The `Puncher` of every role that starts from now on: of agents, and of connectors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of_agents: list[Puncher] = []
        self.of_connectors: list[Puncher] = []
        for role, found in (("agent", self.of_agents), ("connector", self.of_connectors)):
            monkeypatch.setattr(f"ztna.roles.{role}.open_puncher", self._recording(found))

    @staticmethod
    def _recording(found: list[Puncher]) -> Any:
        def open_puncher(*args: Any, **kwargs: Any) -> Puncher | None:
            puncher = punching.open_puncher(*args, **kwargs)
            if puncher is not None:
                found.append(puncher)
            return puncher

        return open_puncher


def only_ice(puncher: Puncher) -> IceAgent:
    """That of a node's only peer session."""
    (peer,) = puncher._peers
    return peer.ice
