"""The applications of a long run: a page and a file over HTTP, an echo over TCP and UDP.

One process with few threads, since the machine is the laboratory's too.
"""

import socket
import socketserver
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HTTP_PORT, ECHO_PORT = 8080, 9999


class _Pages(BaseHTTPRequestHandler):
    folder: Path

    def do_GET(self) -> None:
        """Answer with the file of that name."""
        body = (self.folder / Path(self.path).name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing: the requests are counted where they are made."""


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        """Send back what comes, until the peer ends."""
        try:
            while data := self.request.recv(65_536):
                self.request.sendall(data)
        except OSError:
            return


class _EchoServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def main(address: str, folder: str) -> None:
    """Serve until killed."""
    _Pages.folder = Path(folder)
    http = ThreadingHTTPServer((address, HTTP_PORT), _Pages)
    echo = _EchoServer((address, ECHO_PORT), _Echo)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((address, ECHO_PORT))
    for server in (http, echo):
        threading.Thread(target=server.serve_forever, args=(5,), daemon=True).start()
    print("] ready", flush=True)
    while True:
        data, peer = udp.recvfrom(65_535)
        udp.sendto(data, peer)


if __name__ == "__main__":
    main(*sys.argv[1:])
