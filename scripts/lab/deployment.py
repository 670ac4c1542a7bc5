"""`ztna.nat.deployment` for scripts and tests of a source tree, run by its virtual environment."""

from pathlib import Path

from ztna.nat.deployment import (
    CONFIGURED,
    READY,
    REFUSED,
    REGISTERED,
    START_DEADLINE,
    TRUST_DOMAIN,
    Deployment,
    LoggedProcess,
    Machine,
    NotReadyError,
    start,
)

__all__ = [
    "CONFIGURED",
    "PYTHON",
    "READY",
    "REFUSED",
    "REGISTERED",
    "ROOT",
    "START_DEADLINE",
    "TRUST_DOMAIN",
    "ZTNA",
    "Deployment",
    "LoggedProcess",
    "Machine",
    "NotReadyError",
    "start",
]

ROOT = Path(__file__).resolve().parents[2]
ZTNA = ROOT / ".venv/bin/ztna"
PYTHON = ROOT / ".venv/bin/python"
