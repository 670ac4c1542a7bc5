"""Messages of UPnP, as UDA 1.1 draws them and miniupnpd answers them."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.upnp.gateway import (
    PPP,
    ROUTER,
    SEARCH_ANSWER,
    V1,
    V2,
    answer,
    description,
    envelope,
    fault,
    result,
)
from ztna.core.upnp.http import Response, parse_response_untrusted
from ztna.core.upnp.messages import (
    MAX_SERVICES,
    Fault,
    Service,
    Url,
    build_action,
    build_description_request,
    build_search,
    parse_action_answer_untrusted,
    parse_search_answer_untrusted,
    parse_services_untrusted,
    parse_url_untrusted,
)
from ztna.errors import RemoteProtocolError

BASE = Url(43507, "/some/rootDesc.xml")


def parsed(data: bytes) -> Response:
    response = parse_response_untrusted(data, ended=True)
    assert response is not None
    return response


def test_requests() -> None:
    assert build_search() == (
        b"M-SEARCH * HTTP/1.1\r\nHOST: 239.255.255.250:1900\r\n"
        b'MAN: "ssdp:discover"\r\nMX: 1\r\n'
        b"ST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n\r\n"
    )
    head = build_description_request(ROUTER, BASE)
    assert head.startswith(b"GET /some/rootDesc.xml HTTP/1.1\r\nHost: 10.1.0.1:43507\r\n")
    action = build_action(ROUTER, Service(V2, Url(5000, "/ctl")), "Do", {"NewA": 1, "NewB": ""})
    head, _, body = action.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /ctl HTTP/1.1\r\nHost: 10.1.0.1:5000\r\n")
    assert f'SOAPAction: "{V2}#Do"'.encode() in head
    assert f"Content-Length: {len(body)}".encode() in head
    assert body == envelope(f'<u:Do xmlns:u="{V2}"><NewA>1</NewA><NewB></NewB></u:Do>').encode()


def test_answer_to_a_search() -> None:
    assert parse_search_answer_untrusted(SEARCH_ANSWER, ROUTER) == Url(43507, "/rootDesc.xml")
    later = SEARCH_ANSWER.replace(b"GatewayDevice:1", b"GatewayDevice:2")
    assert parse_search_answer_untrusted(later, ROUTER) == Url(43507, "/rootDesc.xml")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"200 OK", b"404 No", "status 404"),
        (b"ST: urn:schemas-upnp-org:device:Int", b"ST: urn:schemas-upnp-org:device:Pr", "else"),
        (b"ST:", b"XX:", "something else"),
        (b"LOCATION:", b"XX:", "none of a gateway"),
        (b"http://10.1.0.1", b"http://203.0.113.66", "203.0.113.66, which is not the gateway"),
        (b"http://10.1.0.1", b"https://10.1.0.1", "none of a gateway"),
        (b"http://10.1.0.1", b"http://localhost", "none of a gateway"),
        (b"http://10.1.0.1", b"http://10.1.0.1@203.0.113.66", "none of a gateway"),
        (b"http://10.1.0.1", b"http://010.1.0.1", "not the gateway"),
        (b":43507/", b":0/", "port 0"),
        (b":43507/", b":65536/", "port 65536"),
        (b"rootDesc.xml", b"a b", "none of a gateway"),
        (b"rootDesc.xml", b"x" * 600, "none of a gateway"),
    ],
)
def test_search_answers_that_are_refused(old: bytes, new: bytes, words: str) -> None:
    """A gateway speaks for itself alone: nobody can have us ask another host."""
    assert SEARCH_ANSWER.replace(old, new) != SEARCH_ANSWER
    with pytest.raises(RemoteProtocolError, match=words):
        parse_search_answer_untrusted(SEARCH_ANSWER.replace(old, new), ROUTER)


def test_urls() -> None:
    assert parse_url_untrusted("HTTP://10.1.0.1", ROUTER) == Url(80, "/")
    assert parse_url_untrusted("http://10.1.0.1:1/a?b=c", ROUTER) == Url(1, "/a?b=c")


@pytest.mark.parametrize(
    ("control", "base", "url"),
    [
        ("/ctl/IPConn", "", Url(43507, "/ctl/IPConn")),
        ("ctl/IPConn", "", Url(43507, "/some/ctl/IPConn")),
        ("http://10.1.0.1:5000/ctl", "", Url(5000, "/ctl")),
        ("/ctl", "http://10.1.0.1:5000/base/", Url(5000, "/ctl")),
        ("ctl", "http://10.1.0.1:5000/base/x", Url(5000, "/base/ctl")),
    ],
)
def test_where_a_service_is(control: str, base: str, url: Url) -> None:
    response = parsed(description((V1, control), base=base))
    assert parse_services_untrusted(response, BASE, ROUTER) == [Service(V1, url)]


@pytest.mark.parametrize(
    ("control", "base", "words"),
    [
        ("http://203.0.113.66/ctl", "", "not the gateway"),
        ("/ctl", "http://203.0.113.66/", "not the gateway"),
        ("", "", "control URL"),
        ("/c t l", "", "control URL"),
        ("/x\r\nHost: y", "", "control URL"),
        ("/" + "x" * 600, "", "control URL"),
    ],
)
def test_services_that_are_elsewhere(control: str, base: str, words: str) -> None:
    response = parsed(description((V1, control), base=base))
    with pytest.raises(RemoteProtocolError, match=words):
        parse_services_untrusted(response, BASE, ROUTER)


def test_the_best_service_first() -> None:
    kinds = [PPP, V1, "urn:schemas-upnp-org:service:Other:1", V2]
    response = parsed(description(*((kind, f"/{n}") for n, kind in enumerate(kinds))))
    found = parse_services_untrusted(response, BASE, ROUTER)
    assert [(each.kind, each.control.path) for each in found] == [
        (V2, "/3"),
        (V1, "/1"),
        (PPP, "/0"),
    ]
    many = parsed(description(*[(V1, "/x")] * 20))
    assert len(parse_services_untrusted(many, BASE, ROUTER)) == MAX_SERVICES


def test_description_that_is_not_there() -> None:
    with pytest.raises(RemoteProtocolError, match="status 404"):
        parse_services_untrusted(Response(404, b""), BASE, ROUTER)


def test_answers_to_actions() -> None:
    values = {"NewA": "1", "NewB": ""}
    assert parse_action_answer_untrusted(parsed(result("Do", values)), "Do") == values
    assert parse_action_answer_untrusted(parsed(fault(714)), "Do") == Fault(714)
    assert parse_action_answer_untrusted(parsed(fault("no")), "Do") == Fault(0)
    # Some refuse with status 200.
    odd = Response(200, parsed(fault(718)).body)
    assert parse_action_answer_untrusted(odd, "Do") == Fault(718)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (answer("", "404 Not Found"), "status 404"),
        (result("Other", {}), "another action"),
        (answer("<html>"), "broken XML"),
    ],
)
def test_answers_that_are_none(data: bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        parse_action_answer_untrusted(parsed(data), "Do")


@given(st.binary(max_size=300), st.integers(0, 400))
def test_any_bytes(data: bytes, at: int) -> None:
    for good in (SEARCH_ANSWER, description((V1, "/x")), result("Do", {"NewA": 1})):
        broken = good[:at] + data + good[at + len(data) :]
        with contextlib.suppress(RemoteProtocolError):
            parse_search_answer_untrusted(broken, ROUTER)
        with contextlib.suppress(RemoteProtocolError):
            parse_services_untrusted(parsed(broken), BASE, ROUTER)
        with contextlib.suppress(RemoteProtocolError):
            parse_action_answer_untrusted(parsed(broken), "Do")


@given(st.text(max_size=40))
def test_any_url(text: str) -> None:
    for url in (text, "http://10.1.0.1" + text):
        with contextlib.suppress(RemoteProtocolError):
            found = parse_url_untrusted(url, ROUTER)
            assert found.path.isascii()
            assert found.path.isprintable()
            assert " " not in found.path
