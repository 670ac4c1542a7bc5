"""The last line of `ztna ping`, by the node, or by whoever ends it with Ctrl-C."""

from collections.abc import Sequence

from ztna.errors import NotDirectError, UnreachableError


def summary(
    service_id: str, sent: int, times: Sequence[float], *, direct: bool, until_direct: bool
) -> dict[str, object]:
    """times: round trips of the echoes that were answered, s. direct: the last one was."""
    answered = len(times)
    code = 0 if answered else UnreachableError.exit_code
    if until_direct and answered and not direct:
        code = NotDirectError.exit_code
    return {
        "kind": "summary",
        "service": service_id,
        "sent": sent,
        "answered": answered,
        "loss": 0.0 if not sent else 1 - answered / sent,
        "least": min(times, default=None),
        "mean": sum(times) / answered if answered else None,
        "most": max(times, default=None),
        "direct": direct,
        "exit_code": code,
    }
