"""A service's way in stages, what is true of each, and the first that is broken.

Whoever looks (`roles.agent_why`) fills in a `Stage` after another; `Diagnosis` then says in one
sentence what is wrong and what to do. The order is the order of the way: what stands before the
first broken stage is known to work.
"""

import enum
from collections.abc import Sequence

import attrs


class StageState(enum.Enum):
    """The value is for programs."""

    OK = "ok"
    DEGRADED = "degraded"
    BROKEN = "broken"
    NOT_TOLD = "not told"
    NOT_TRIED = "not tried"


class StageName(enum.Enum):
    """In the order of the way."""

    NAME = "name"
    ROUTE = "route"
    CERTIFICATE = "certificate"
    AGENT = "agent"
    INTERMEDIATE = "intermediate"
    POLICY = "policy"
    CONNECTOR = "connector"
    BACKEND = "backend"
    PATH = "path"


# Exit codes of `ztna.errors` that fit: configuration, identity, refused, unreachable.
_CODES = {
    StageName.NAME: 3,
    StageName.ROUTE: 3,
    StageName.CERTIFICATE: 4,
    StageName.POLICY: 5,
}
_UNREACHABLE = 6


@attrs.frozen
class Stage:
    """One stage. found: what is true, in words. todo: what to do about it; empty if nothing.

    passing: it will be another one soon, by itself.
    """

    name: StageName
    state: StageState
    found: str
    todo: str = ""
    passing: bool = False


def ok(name: StageName, found: str) -> Stage:
    """A stage that works."""
    return Stage(name, StageState.OK, found)


def degraded(name: StageName, found: str, todo: str) -> Stage:
    """A stage that works, and not as it should."""
    return Stage(name, StageState.DEGRADED, found, todo)


def broken(name: StageName, found: str, todo: str, *, passing: bool = False) -> Stage:
    """A stage at which it ends."""
    return Stage(name, StageState.BROKEN, found, todo, passing)


@attrs.frozen
class Diagnosis:
    """All stages of one service, in order."""

    service: str
    stages: tuple[Stage, ...]
    code: int = 0

    @classmethod
    def of(cls, service: str, known: Sequence[Stage], code: int = 0) -> "Diagnosis":
        """The stages that were looked at; the others were not tried. code: an exit code that says
        more than the stage; 0 for the stage's."""
        by_name = {stage.name: stage for stage in known}
        waiting = "an earlier stage is broken"
        return cls(
            service,
            tuple(
                by_name.get(name, Stage(name, StageState.NOT_TRIED, waiting)) for name in StageName
            ),
            code,
        )

    @property
    def cause(self) -> Stage | None:
        """The first broken stage; None if there is none."""
        return next((each for each in self.stages if each.state is StageState.BROKEN), None)

    @property
    def weak(self) -> tuple[Stage, ...]:
        """Stages that work, and not as they should."""
        return tuple(each for each in self.stages if each.state is StageState.DEGRADED)

    @property
    def exit_code(self) -> int:
        """Of the kind of the cause; 0 if there is none."""
        if self.cause is None:
            return 0
        return self.code or _CODES.get(self.cause.name, _UNREACHABLE)

    def to_json(self) -> dict[str, object]:
        """For programs."""
        cause = self.cause
        return {
            "service": self.service,
            "works": cause is None,
            "broken": None if cause is None else cause.name.value,
            "found": "" if cause is None else cause.found,
            "todo": "" if cause is None else cause.todo,
            "exit_code": self.exit_code,
            "stages": [
                {
                    "name": each.name.value,
                    "state": each.state.value,
                    "found": each.found,
                    "todo": each.todo,
                }
                for each in self.stages
            ],
        }
