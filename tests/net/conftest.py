"""Fixtures for all tests of sessions."""

import pytest

from ztna.net.fastpath import FastPath


@pytest.fixture(params=[True, False], ids=["fast", "plain"])
def fast_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run a test with the fast path and without."""
    fast: bool = request.param
    if not fast:
        monkeypatch.setattr(FastPath, "ready", lambda _self: False)
    return fast
