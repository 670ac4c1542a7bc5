"""The TUN driver: names, its refusals in words, and the steps down to fewer offloads."""

import errno
import fcntl
import os
import struct
import subprocess
from pathlib import Path

import pytest

from tests.tun.namespace import drop_privileges, in_namespace
from ztna.errors import SystemSetupError
from ztna.tun import linux

_SETOFFLOAD = 0x400454D0
_CSUM, _TSO, _USO = 0x01, 0x0E, 0x60


@pytest.mark.parametrize("name", ["a", "tun-7.x", "ztna0", "fifteen-bytes-x", "übertun"])
def test_names_taken_as_given(name: str) -> None:
    assert linux.interface_request(name) == name


def test_utun_is_the_next_free_unit() -> None:
    assert linux.interface_request("utun") == "utun%d"
    assert linux.interface_request("utun7") == "utun7"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "all", "default", "a/b", "a b", "a\tb", "a\n", "a:1", "tun%d", "a\0b", "\udcff",
     "sixteen-bytes-xx", "ü" * 8],
)  # fmt: skip
def test_impossible_names_are_refused(name: str) -> None:
    with pytest.raises(SystemSetupError, match="cannot be the name of a tunnel interface"):
        linux.interface_request(name)


def test_missing_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(linux, "CLONE_DEVICE", str(tmp_path / "tun"))
    with pytest.raises(SystemSetupError, match="modprobe tun"):
        linux.open_tun_fd("utun")


def test_closed_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        SystemSetupError, match=r"no permission to open /dev/net/tun.*CAP_NET_ADMIN"
    ):
        linux.open_tun_fd("utun")


class _Driver:
    """Answers ioctl as a kernel that takes only some offloads, or none of ours."""

    def __init__(self, supported: int, *, features: int = 0x5001, bind_errno: int = 0) -> None:
        self.supported = supported
        self.features = features
        self.bind_errno = bind_errno
        self.asked: list[int] = []

    def ioctl(self, _fd: int, request: int, argument: int | bytes | bytearray) -> int:
        if request == 0x800454CF:
            assert isinstance(argument, bytearray)
            struct.pack_into("I", argument, 0, self.features)
        elif request == 0x400454CA and self.bind_errno:
            raise OSError(self.bind_errno, os.strerror(self.bind_errno))
        elif request == 0x400454CA:
            assert isinstance(argument, bytearray)
            argument[:6] = b"utun3\0"
        elif request == _SETOFFLOAD:
            assert isinstance(argument, int)
            self.asked.append(argument)
            if argument & ~self.supported:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return 0


def _open_with(
    driver: _Driver, monkeypatch: pytest.MonkeyPatch, *, offload: bool = True
) -> linux.TunFd:
    monkeypatch.setattr(linux, "CLONE_DEVICE", os.devnull)
    monkeypatch.setattr(fcntl, "ioctl", driver.ioctl)
    tun = linux.open_tun_fd("utun", offload=offload)
    os.close(tun.fd)
    return tun


@pytest.mark.parametrize(
    ("supported", "label", "asked"),
    [
        (_CSUM | _TSO | _USO, "tso+uso", [0x6F]),
        (_CSUM | _TSO, "tso", [0x6F, 0x0F]),
        (_CSUM, "csum", [0x6F, 0x0F, 0x01]),
        (0, "none", [0x6F, 0x0F, 0x01, 0]),
    ],
)
def test_fewer_offloads_on_older_kernels(
    supported: int, label: str, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = _Driver(supported)
    assert _open_with(driver, monkeypatch).offload == label
    assert driver.asked == asked


def test_offload_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = _Driver(_CSUM | _TSO | _USO)
    tun = _open_with(driver, monkeypatch, offload=False)
    assert (tun.name, tun.offload, driver.asked) == ("utun3", "none", [0])


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EPERM, "CAP_NET_ADMIN"),
        (errno.EBUSY, "in use by another program"),
        (errno.EINVAL, "not a TUN interface"),
        (errno.ENOMEM, "cannot be made"),
    ],
)
def test_refusals_in_words(number: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(SystemSetupError, match=words):
        _open_with(_Driver(0, bind_errno=number), monkeypatch)
    assert set(os.listdir("/proc/self/fd")) == open_before


def test_kernel_without_vnet_header(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemSetupError, match="IFF_VNET_HDR"):
        _open_with(_Driver(0, features=0x1001), monkeypatch)


@in_namespace
def test_names_and_conflicts_in_the_kernel() -> None:
    first, second = linux.open_tun_fd("utun"), linux.open_tun_fd("utun")
    assert (first.name, second.name) == ("utun0", "utun1")
    with pytest.raises(SystemSetupError, match="utun0 is in use by another program"):
        linux.open_tun_fd("utun0")
    with pytest.raises(SystemSetupError, match="lo exists and is not a TUN interface"):
        linux.open_tun_fd("lo")
    os.close(first.fd)
    assert linux.open_tun_fd("utun").name == "utun0"
    subprocess.run(["ip", "tuntap", "add", "dev", "kept", "mode", "tun"], check=True)
    assert linux.open_tun_fd("kept").name == "kept"


@in_namespace
def test_without_privilege() -> None:
    drop_privileges()
    with pytest.raises(SystemSetupError, match=r"run as root, .*CAP_NET_ADMIN.*--tun none"):
        linux.open_tun_fd("utun")
