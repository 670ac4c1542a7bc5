"""Small XML: what is read, and what is refused."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.upnp.xml import MAX_DEPTH, MAX_DOCUMENT, MAX_ELEMENTS, parse_xml_untrusted
from ztna.errors import RemoteProtocolError

BILLION_LAUGHS = b"""<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;">]>
<a>&c;&c;&c;</a>"""
FROM_A_FILE = b"""<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>"""
FROM_AFAR = b"""<!DOCTYPE a SYSTEM "http://203.0.113.66/a.dtd"><a/>"""


def test_names_texts_and_order() -> None:
    root = parse_xml_untrusted(
        b'<?xml version="1.0"?>\r\n<s:a xmlns:s="urn:x"><b> 1 &amp; 2 </b><c><b>3<!-- no -->4</b>'
        b"<d/></c></s:a>\0"
    )
    assert (root.name, root.text) == ("a", "")
    assert [each.text for each in root.all("b")] == ["1 & 2", "34"]
    assert root.value("b") == "1 & 2"
    assert root.value("d") == root.value("e") == ""
    assert root.first("e") is None


@pytest.mark.parametrize("data", [BILLION_LAUGHS, FROM_A_FILE, FROM_AFAR, b"<!DOCTYPE a><a/>"])
def test_no_document_type(data: bytes) -> None:
    """So no entities, and nothing to fetch."""
    with pytest.raises(RemoteProtocolError, match="document type"):
        parse_xml_untrusted(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no",
        b"<a>",
        b"<a></b>",
        b"<a>&b;</a>",
        b"<a/><b/>",
        b"<a>\xff</a>",
        # In what it says of its coding it is not believed.
        '<?xml version="1.0" encoding="UTF-16"?><a/>'.encode("utf-16"),
    ],
)
def test_broken(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="broken XML"):
        parse_xml_untrusted(data)


def test_coding_is_utf_8() -> None:
    data = '<?xml version="1.0" encoding="zip"?><a>ü</a>'.encode()
    assert parse_xml_untrusted(data).text == "ü"


@pytest.mark.parametrize(
    "data",
    [
        b"<a>" + b"x" * MAX_DOCUMENT + b"</a>",
        b"<a>" * (MAX_DEPTH + 1),
        b"<a>" + b"<b/>" * MAX_ELEMENTS + b"</a>",
    ],
    ids=["bytes", "levels", "elements"],
)
def test_bounds(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="XML of more than"):
        parse_xml_untrusted(data)


def test_up_to_the_bounds() -> None:
    names = [f"<a{i}>" for i in range(MAX_DEPTH)]
    ends = [f"</a{i}>" for i in reversed(range(MAX_DEPTH))]
    assert parse_xml_untrusted("".join(names + ends).encode()).name == "a0"
    assert parse_xml_untrusted(b"<a>" + b"<b/>" * (MAX_ELEMENTS - 1) + b"</a>").name == "a"


@given(st.one_of(st.binary(max_size=200), st.text(alphabet="<>/ab&;! []:\0", max_size=60)))
def test_any_bytes(data: bytes | str) -> None:
    with contextlib.suppress(RemoteProtocolError):
        parse_xml_untrusted(data if isinstance(data, bytes) else data.encode())
