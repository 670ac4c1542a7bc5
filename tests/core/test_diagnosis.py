"""The way of a service in stages: which one is the cause, and what the exit code says of it."""

import pytest

from ztna.core.diagnosis import Diagnosis, StageName, StageState, broken, degraded, ok

NAME, ROUTE = ok(StageName.NAME, "web is known"), ok(StageName.ROUTE, "10.100.0.2")


def test_what_was_not_looked_at_was_not_tried() -> None:
    found = Diagnosis.of("web", [ROUTE, NAME, broken(StageName.POLICY, "no rule", "ask for one")])
    assert [stage.name for stage in found.stages] == list(StageName)
    states = {stage.name: stage.state for stage in found.stages}
    assert states[StageName.NAME] is StageState.OK
    assert states[StageName.BACKEND] is StageState.NOT_TRIED
    assert found.cause is not None
    assert found.cause.name is StageName.POLICY


@pytest.mark.parametrize(
    ("name", "code"),
    [
        (StageName.NAME, 3),
        (StageName.ROUTE, 3),
        (StageName.CERTIFICATE, 4),
        (StageName.AGENT, 6),
        (StageName.INTERMEDIATE, 6),
        (StageName.POLICY, 5),
        (StageName.CONNECTOR, 6),
        (StageName.BACKEND, 6),
        (StageName.PATH, 6),
    ],
)
def test_exit_codes_by_kind_of_cause(name: StageName, code: int) -> None:
    found = Diagnosis.of("web", [broken(name, "broken", "mend it")])
    assert found.exit_code == code
    said = found.to_json()
    assert (said["works"], said["broken"], said["todo"]) == (False, name.value, "mend it")


def test_an_exit_code_that_says_more_than_the_stage() -> None:
    stage = broken(StageName.AGENT, "its file is wrong", "")
    assert Diagnosis.of("web", [stage], 3).exit_code == 3
    assert Diagnosis.of("web", [NAME], 3).exit_code == 0


def test_the_first_broken_stage_is_the_cause() -> None:
    found = Diagnosis.of(
        "web", [broken(StageName.BACKEND, "refuses", ""), broken(StageName.CONNECTOR, "gone", "")]
    )
    assert found.cause is not None
    assert found.cause.name is StageName.CONNECTOR


def test_what_is_weak_is_no_cause() -> None:
    found = Diagnosis.of("web", [NAME, degraded(StageName.PATH, "relay", "open UDP")])
    assert found.cause is None
    assert found.exit_code == 0
    assert [stage.found for stage in found.weak] == ["relay"]
    said = found.to_json()
    assert (said["works"], said["broken"], said["found"], said["todo"]) == (True, None, "", "")
    stages = said["stages"]
    assert isinstance(stages, list)
    assert stages[0] == {"name": "name", "state": "ok", "found": "web is known", "todo": ""}
