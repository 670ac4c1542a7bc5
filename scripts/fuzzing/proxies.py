"""The target that asks an HTTP proxy for a connection: answers of a hostile one."""

from ztna.core.http_connect import ConnectExchange, Proxy

ANSWERS = [
    b"HTTP/1.1 200 Connection established\r\nVia: 1.1 proxy (squid)\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 502 Bad Gateway\r\nContent-Length: 5\r\n\r\nsorry",
    (
        b'HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm="x"\r\n'
        b"Proxy-Authenticate: Negotiate\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
]


def http_connect(data: bytes) -> None:
    """An answer, in two pieces."""
    exchange = ConnectExchange(Proxy("proxy", 3128), ("relay", 443))
    exchange.request_to_send()
    middle = len(data) // 2
    answer = exchange.receive_bytes_untrusted(data[:middle])
    if answer is None:
        answer = exchange.receive_bytes_untrusted(data[middle:])
    assert answer is None or (answer.status >= 200 and answer.reason.isprintable())
