"""A server of files by ranges, as an object store is, and a proxy of a real one, that answer with faults as told."""

import contextlib
import http.client
import http.server
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

STALL = 3.0  # seconds; tests let a request take less
PASSING = ("503", "429", "reset", "cut", "stall", "other", "short")
SILENT = ("flip", "lie")  # wrong bytes that nothing but a checksum shows


class Server:
    """Serves the files below `root`, over HTTP, and as the buckets of S3.

    Attributes:
      fault: called with (name of the file, start, stop) of a request; returns the fault to answer with, "" for none.
      requests: those that came, in order.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.fault = root, no_fault
        self.requests: list[tuple[str, int, int]] = []
        self.seed = 0
        self._server: http.server.ThreadingHTTPServer | None = None
        self.port = 0

    def start(self) -> "Server":
        """Listens, on the port it had before, if any."""
        handler = type("Handler", (self.handler,), {"served": self})
        self._server = _Listening(("127.0.0.1", self.port), handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Is gone, as a killed server: connections are refused."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._server.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def handler(self) -> type["_Handler"]:
        return _Handler

    def names(self) -> list[str]:
        """Names of the files that were asked for."""
        return [name for name, _, _ in self.requests]


class Proxy(Server):
    """Stands before a real object store, an S3 endpoint, whose answers it spoils as it is told to.

    Attributes:
      upstream: the store's address; requests are handed on with the signature that the client gave them.
    """

    def __init__(self, upstream: str) -> None:
        super().__init__(Path())
        self.upstream = upstream

    @property
    def handler(self) -> type["_Handler"]:
        return _Forwarding


def no_fault(name: str, start: int, stop: int) -> str:
    return ""


@contextlib.contextmanager
def serving(root: Path) -> Iterator[Server]:
    server = Server(root).start()
    try:
        yield server
    finally:
        server.stop()


def first(count: int, fault: str, name: str = "") -> Callable[[str, int, int], str]:
    """A fault in the first answers that have to do with a file whose name has `name` in it."""
    left, lock = [count], threading.Lock()

    def found(file: str, start: int, stop: int) -> str:
        with lock:
            if name not in file or not left[0]:
                return ""
            left[0] -= 1
            return fault

    return found


def once_each(fault: str, name: str = "") -> Callable[[str, int, int], str]:
    """A fault in the first answer that begins at each byte of the files whose names have `name` in them."""
    met, lock = set(), threading.Lock()

    def found(file: str, start: int, stop: int) -> str:
        with lock:
            if name not in file or (file, start) in met:
                return ""
            met.add((file, start))
            return fault

    return found


def some(share: float, faults: tuple[str, ...], seed: int = 0) -> Callable[[str, int, int], str]:
    """One of `faults` in a share of the answers, by chance."""
    chance, lock = random.Random(seed), threading.Lock()

    def found(file: str, start: int, stop: int) -> str:
        with lock:
            return chance.choice(faults) if chance.random() < share else ""

    return found


class _Listening(http.server.ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def __init__(self, *arguments) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        pass


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Server

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        path = self.served.root / self.path.lstrip("/")
        if not path.is_file():
            self.answer(404, b"no such file", {})
        else:
            self.respond(path.read_bytes(), *self.asked(path.stat().st_size))

    def do_HEAD(self) -> None:
        self.answer(200, b"", {}, declared=(self.served.root / self.path.lstrip("/")).stat().st_size)

    def asked(self, size: int) -> tuple[bool, int, int, str]:
        """Returns whether a range is asked for, which one, and the fault of the answer."""
        name = self.path.rpartition("/")[2]
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(asked[1]), int(asked[2]) + 1) if asked else (0, size)
        self.served.requests.append((name, start, stop))
        return bool(asked), start, stop, self.served.fault(name, start, stop)

    def respond(self, content: bytes, asked: bool, start: int, stop: int, fault: str) -> None:
        """Answers with a part of `content`, or with the fault."""
        if fault == "killed":
            self.close_connection = True
            threading.Thread(target=self.served.stop).start()
        elif fault.isdigit():
            self.answer(int(fault), b"<Error><Code>SlowDown</Code></Error>", {})
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif start >= len(content):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        elif fault == "whole" or not asked:
            self.send(200, content, {}, fault)
        else:
            self.send_range(content, start, min(stop, len(content)), fault)

    def send_range(self, content: bytes, start: int, stop: int, fault: str) -> None:
        """Sends part of a file; "other" is another range and says so, "lie" is another and does not."""
        shift = 1 if start else -1
        first, last = (start + shift, stop + shift) if fault == "other" else (start, stop)
        body = content[max(0, first) : last]
        if fault == "lie":
            body = content[stop:][: stop - start] + content[: max(0, 2 * stop - start - len(content))]
            body = (body + content)[: stop - start]
        self.send(206, body, {"Content-Range": f"bytes {max(0, first)}-{last - 1}/{len(content)}"}, fault)

    def send(self, status: int, body: bytes, headers: dict[str, str], fault: str) -> None:
        if fault == "flip" and body:
            self.served.seed += 1
            position = random.Random(self.served.seed).randrange(len(body))
            body = body[:position] + bytes([body[position] ^ 16]) + body[position + 1 :]
        if fault in ("cut", "stall", "short"):
            self.answer(status, body[: len(body) // 2], headers, declared=len(body))
            if fault == "stall":
                time.sleep(STALL)
            self.close_connection = True
        else:
            self.answer(status, body, headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str], declared: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body) if declared is None else declared)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class _Forwarding(_Handler):
    served: Proxy

    def do_GET(self) -> None:
        asked, start, stop, fault = self.asked(0)
        try:
            if fault in ("", "flip", "cut", "stall", "short"):
                self.send(*self.forwarded(self.path, dict(self.headers)), fault)
            elif fault in ("other", "lie", "whole"):
                self.respond(self.whole(), asked, start, stop, fault)
            else:
                self.respond(b"?", asked, 0, 1, fault)
        except (OSError, http.client.HTTPException):  # the store is gone
            self.respond(b"?", asked, 0, 1, "reset")

    def forwarded(self, path: str, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        """Returns status, body and headers of the store's answer."""
        connection = http.client.HTTPConnection(self.served.upstream.rpartition("/")[2], timeout=30)
        with contextlib.closing(connection):
            connection.putrequest("GET", path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            kept = {name: value for name, value in answer.getheaders() if name.lower() in _HANDED_ON}
            return answer.status, answer.read(), kept

    def whole(self) -> bytes:
        """Returns the object that a part of is asked for."""
        import obstore
        from obstore.store import from_url

        bucket, _, name = self.path.lstrip("/").partition("/")
        store = from_url(f"s3://{bucket}", endpoint=self.served.upstream, client_options={"allow_http": True})
        return obstore.get(store, name).bytes().to_bytes()


_HANDED_ON = {"content-range", "content-type", "etag", "last-modified", "accept-ranges"}
