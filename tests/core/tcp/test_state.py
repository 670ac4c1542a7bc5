"""Configurations that cannot work are refused."""

import pytest

from ztna.core.tcp.state import TcpConfig
from ztna.errors import LocalProtocolError


@pytest.mark.parametrize(
    "options",
    [
        {"mss": 63},
        {"mss": 65_496},
        {"default_mss": 10},
        {"largest_payload": 1000},
        {"largest_payload": 65_001},
        {"receive_buffer": 1000},
        {"send_buffer": 1000},
        {"receive_buffer": (1 << 30) + 1},
    ],
)
def test_impossible_values(options: dict[str, int]) -> None:
    with pytest.raises(LocalProtocolError):
        TcpConfig(**options)  # type: ignore[arg-type] # the test's own keywords


@pytest.mark.parametrize(
    ("buffer", "scale"), [(2000, 0), (65_535, 0), (65_536, 1), (1 << 20, 5), (1 << 30, 15)]
)
def test_window_scale(buffer: int, scale: int) -> None:
    config = TcpConfig(receive_buffer=buffer)
    assert config.window_scale == min(scale, 14)
    assert min(buffer, (1 << 30) - 1) >> config.window_scale <= 0xFFFF
