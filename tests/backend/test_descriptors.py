"""Flows within a process's descriptors, in a process of its own: a hard limit cannot be raised."""

import subprocess
import sys

import pytest

from ztna.core.flow_shares import MAX_FLOWS

SCRIPT = """
import resource, sys
from ztna.backend.descriptors import flows_within_descriptors
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
print(flows_within_descriptors(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("soft", "hard", "flows", "files"),
    [
        (256, 256, 128, 256),
        (256, 1024, 512, 1024),
        (1024, 18_000, MAX_FLOWS, 2 * MAX_FLOWS),
        (17_000, 18_000, MAX_FLOWS, 17_000),
    ],
)
def test_flows_within_descriptors(soft: int, hard: int, flows: int, files: int) -> None:
    """The soft limit is raised as far as it helps; the log names what is missing."""
    command = [sys.executable, "-c", SCRIPT, str(soft), str(hard)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    *lines, last = ran.stdout.splitlines()
    assert last == f"{flows} {files}"
    assert any("LimitNOFILE" in line for line in lines) == (flows < MAX_FLOWS)
