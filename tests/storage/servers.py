"""Storage servers on loopback: Google's and S3's interfaces by emulators, and a proxy before them that makes faults."""

import contextlib
import http.client
import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

BUCKET = "models"


@dataclass(frozen=True)
class Fault:
    """What the proxy does to one answer instead of passing it on."""

    status: int = 0  # answer this at once
    cut_after: int = -1  # close the connection after so many bytes of the body
    flip: bool = False  # one bit of the body is another
    slow_s: float = 0.0  # pause before every 64 kB


@dataclass
class Request:
    """One request that the proxy has seen."""

    method: str
    path: str
    sent: int = 0  # bytes of the body that were passed on
    ended: bool = False  # its last bytes are on their way

    @property
    def is_read(self) -> bool:
        """It asks for bytes of an object, and not for a listing or what is known of an object."""
        return self.method == "GET" and not self.path.startswith("/storage/") and "list-type" not in self.path


@dataclass
class Proxy:
    """`fault(request, n)` says what to do with the n-th request for bytes of an object (from 0); None passes it on."""

    upstream: tuple[str, int]
    fault: Callable[[Request, int], Fault | None] = lambda request, n: None
    requests: list[Request] = field(default_factory=list)
    address: str = ""

    @property
    def reads(self) -> list[Request]:
        return [r for r in self.requests if r.is_read]

    @property
    def bytes_read(self) -> int:
        return sum(r.sent for r in self.reads)


def _handler(proxy: Proxy) -> type[http.server.BaseHTTPRequestHandler]:
    lock = threading.Lock()
    one_at_a_time = threading.Lock()  # as the emulator answers; it refuses connections when many wait

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            request = Request(self.command, self.path)
            with lock:
                n = len(proxy.reads)
                proxy.requests.append(request)
            fault = (proxy.fault(request, n) if request.is_read else None) or Fault()
            if fault.status:
                body = b"fault"
                self.send_response(fault.status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                return
            upstream = http.client.HTTPConnection(*proxy.upstream, timeout=30)
            with one_at_a_time, contextlib.closing(upstream):
                upstream.request(self.command, self.path, headers=dict(self.headers))
                answer = upstream.getresponse()
                body = bytearray(answer.read())
            if fault.flip:
                body[len(body) // 2] ^= 1
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                    self.send_header(name, value)
            length = len(body) if self.command == "GET" else int(answer.headers.get("Content-Length") or 0)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            end = len(body) if fault.cut_after < 0 else min(fault.cut_after, len(body))
            with contextlib.suppress(ConnectionError):  # a client that was killed
                for start in range(0, end, 1 << 16):
                    time.sleep(fault.slow_s)
                    piece = body[start : min(end, start + (1 << 16))]
                    request.ended = start + len(piece) == end
                    self.wfile.write(piece)
                    request.sent += len(piece)
            if end < len(body):
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

        do_HEAD = do_GET

        def log_message(self, format, *args):
            pass

    return Handler


@contextlib.contextmanager
def proxy_before(host: str, port: int) -> Iterator[Proxy]:
    proxy = Proxy((host, port))

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128  # with the usual 5 a connection may wait a second
        block_on_close = False  # a slow answer to a client that was killed must not hold up the test

        def handle_error(self, request, client_address):
            pass  # a client that went away in the middle of a request

    with Server(("127.0.0.1", 0), _handler(proxy)) as server:
        proxy.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def google_server() -> Iterator[tuple[str, int]]:
    """gcp-storage-emulator with the bucket BUCKET, in memory."""
    from gcp_storage_emulator.server import create_server

    port = _free_port()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    try:
        yield "127.0.0.1", port
    finally:
        server.stop()


def google_put(address: tuple[str, int], files: dict[str, bytes], bucket: str = BUCKET) -> None:
    """Objects by name."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    where = {"api_endpoint": f"http://{address[0]}:{address[1]}"}
    client = storage.Client(project="test", credentials=AnonymousCredentials(), client_options=where)
    made = client.bucket(bucket) if bucket == BUCKET else client.create_bucket(bucket)
    for name, data in files.items():
        made.blob(name).upload_from_string(data, content_type="application/octet-stream")
    client.close()


@contextlib.contextmanager
def s3_server() -> Iterator[tuple[str, int]]:
    """moto's S3, in memory, with the bucket BUCKET."""
    import requests
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        requests.post(f"http://{host}:{port}/moto-api/reset", timeout=30)  # moto's servers of one process share buckets
        s3_client((host, port)).create_bucket(Bucket=BUCKET)
        yield host, port
    finally:
        server.stop()
        if server._server is not None:
            server._server.server_close()  # moto itself leaves the socket open


def s3_client(address: tuple[str, int]):
    import boto3

    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    return boto3.client("s3", endpoint_url=f"http://{address[0]}:{address[1]}", region_name="us-east-1", **keys)


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def downloads_have_ended() -> None:
    """Threads of a download that was stopped in this process end a little later."""
    for thread in threading.enumerate():
        if thread.name.startswith("hvd-download"):
            thread.join(20)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
