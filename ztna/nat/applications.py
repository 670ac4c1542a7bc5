"""What users of the laboratory reach: a page over HTTP and an echo over UDP, in one process.

Run beside the connector, as a program: python -m ztna.nat.applications ADDRESS
"""

import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HTTP_PORT, ECHO_PORT = 8080, 9999
PAGE = "Hello from a web server behind the connector's NAT.\n"


class _Page(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer with the page, whatever the path."""
        body = PAGE.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main(address: str) -> None:
    """Serve until killed."""
    http = ThreadingHTTPServer((address, HTTP_PORT), _Page)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind((address, ECHO_PORT))
        threading.Thread(target=http.serve_forever, daemon=True).start()
        # As the roles say it.
        sys.stdout.write("] ready\n")
        sys.stdout.flush()
        while True:
            data, peer = udp.recvfrom(65_535)
            udp.sendto(data, peer)


if __name__ == "__main__":
    main(*sys.argv[1:])
