"""Laboratories as fixtures: a test names its topology in one line.

async def test_x(memory_lab: MemoryLab, autojump_clock: MockClock) -> None:
    agent = memory_lab.host(behind=memory_lab.gateway(SYMMETRIC))

@pytest.mark.kernel
async def test_y(kernel_lab: KernelNatLab) -> None:
    agent = kernel_lab.host(behind=kernel_lab.gateway(SYMMETRIC))
"""

from collections.abc import AsyncIterator

import pytest

from ztna.nat.kernel_nat import KernelNatLab, open_kernel_lab, supported
from ztna.nat.memory_lab import MemoryLab, open_lab


@pytest.fixture
async def memory_lab() -> AsyncIterator[MemoryLab]:
    """An empty laboratory in memory. The test itself takes `autojump_clock`."""
    async with open_lab(seed=7) as lab:
        yield lab


@pytest.fixture
async def kernel_lab() -> AsyncIterator[KernelNatLab]:
    """An empty laboratory in the kernel; skips, with the reason, where there can be none."""
    if reason := supported():
        pytest.skip(reason)
    async with open_kernel_lab() as lab:
        yield lab
