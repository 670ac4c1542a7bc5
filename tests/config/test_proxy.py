"""The proxy's URL, the environment's variables, and which hosts they except, as curl(1) does."""

import pytest

from tests.config.test_model import AGENT, CONNECTOR, read, refusal
from ztna.config.load import load_config
from ztna.config.model import AgentConfig, IntermediateAddress
from ztna.config.proxy import is_excepted, parse_proxy, proxy_of_environment
from ztna.core.http_connect import Proxy
from ztna.core.identity import Role
from ztna.errors import ConfigError

HERE = "`intermediate.proxy`"


@pytest.mark.parametrize(
    ("text", "proxy"),
    [
        ("http://proxy.example.com:3128", Proxy("proxy.example.com", 3128)),
        ("HTTP://10.0.0.1:80/", Proxy("10.0.0.1", 80)),
        ("http://[2001:DB8::1]:8080", Proxy("2001:db8::1", 8080)),
        ("http://me:pass@p:1", Proxy("p", 1, "me", "pass")),
        ("http://me@p:1", Proxy("p", 1, "me", "")),
        ("http://m%65:p%40%3a%C3%A9:@/@p:1", Proxy("p", 1, "me", "p@:\u00e9:@/")),
    ],
)
def test_urls(text: str, proxy: Proxy) -> None:
    assert parse_proxy(text, HERE) == proxy


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("proxy:3128", "expected http://HOST:PORT or http://USER:PASSWORD@HOST:PORT"),
        (3128, "expected http://HOST:PORT"),
        ("https://me:hush@proxy:3128", "only those of HTTP are spoken"),
        ("socks5://me:hush@proxy:1080", "only those of HTTP are spoken"),
        ("http://me:hush@proxy", "with the port"),
        ("http://me:hush@proxy:99999", "with the port"),
        ("http://me:hush@proxy:1/x", "with the port"),
        ("http://me:hush%0d%0a@proxy:1", "no control characters"),
        ("http://m%3ae:hush@proxy:1", "a name that has no colon"),
        ("http://:hush@proxy:1", "a name that has no colon"),
        ("http://me:hush%ff@proxy:1", "bytes of UTF-8"),
    ],
)
def test_wrong_urls_are_told_without_the_password(url: object, words: str) -> None:
    told = refusal(
        Role.CONNECTOR, {**CONNECTOR, "intermediate": {"host": "relay.example.net", "proxy": url}}
    )
    assert words in told
    assert told.startswith("c.json:4: $.intermediate.proxy: the value is wrong; ")
    assert "hush" not in told


def test_in_the_file_and_in_ztnas_own_variable() -> None:
    there = {**AGENT["intermediate"], "proxy": "http://me:hush@proxy:3128"}
    config = read(Role.AGENT, {**AGENT, "intermediate": there})
    assert config.intermediate.proxy == Proxy("proxy", 3128, "me", "hush")
    assert "hush" not in repr(config)
    assert read(Role.AGENT, AGENT).intermediate.proxy is None
    with pytest.raises(ConfigError, match="ZTNA_INTERMEDIATE_PROXY") as caught:
        load_config(AgentConfig, None, environment={"ZTNA_INTERMEDIATE_PROXY": "ftp://a:hush@p:1"})
    assert "hush" not in str(caught.value)


def of(**environment: str) -> Proxy | None:
    return proxy_of_environment("relay.example.net", environment)


def test_environment() -> None:
    assert of() is None
    assert of(http_proxy="http://p:1", ALL_PROXY="http://p:1") is None
    assert of(HTTPS_PROXY="http://p:1") == Proxy("p", 1, source="the environment's HTTPS_PROXY")
    assert of(HTTPS_PROXY="http://p:1", https_proxy="p:2") == Proxy(
        "p", 2, source="the environment's https_proxy"
    )
    assert of(HTTPS_PROXY="http://p:1", https_proxy="") is not None
    assert of(HTTPS_PROXY="http://p:1", NO_PROXY="example.net") is None
    assert of(HTTPS_PROXY="http://p:1", NO_PROXY="example.net", no_proxy="other") is not None
    with pytest.raises(ConfigError, match="environment variable HTTPS_PROXY: expected") as caught:
        of(HTTPS_PROXY="socks5://me:hush@p:1")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("exceptions", "hosts", "others"),
    [
        ("*", "a.b 10.0.0.1 ::1", ""),
        ("", "", "a.b 10.0.0.1"),
        ("*,a.b", "a.b", "c.d"),
        ("example.net", "example.net EXAMPLE.net. relay.example.net", "nonexample.net net"),
        (".Example.net.", "example.net relay.example.net", "nonexample.net"),
        ("a.b, c.d e.f", "a.b c.d e.f", "b d f"),
        ("10.0.0.0/8,192.0.2.1", "10.9.8.7 192.0.2.1", "11.0.0.1 192.0.2.11 10.example.net"),
        ("10.1.2.3/8", "10.9.8.7", "11.0.0.1"),
        ("0.0.2.1 2.1", "", "192.0.2.1"),
        ("2001:db8::/32 [2001:db9::1]", "2001:db8::5 2001:db9::1", "2001:db9::2 10.0.0.1"),
        ("10.0.0.0/40,/,x/8", "", "10.0.0.1"),
    ],
)
def test_exceptions(exceptions: str, hosts: str, others: str) -> None:
    assert [host for host in hosts.split() if not is_excepted(host, exceptions)] == []
    assert [host for host in others.split() if is_excepted(host, exceptions)] == []


def test_the_address_shows_no_password() -> None:
    there = IntermediateAddress("relay", proxy=Proxy("p", 1, "me", "hush"))
    assert "hush" not in repr(there)
