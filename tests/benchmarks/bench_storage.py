"""Fetching a checkpoint: hvd.storage against one request after another, and against google-cloud-storage's own manager.

    uv run python -m tests.benchmarks.bench_storage [--megabytes 512] [--latency 0.05] [--rate 20]

The server is a small one of this file (the emulator of the tests answers one request at a time): Google's interface
over objects in memory, in a process of its own. Each request waits `latency` seconds and gets at most `rate` MB/s, as
one connection to a distant bucket does; --latency 0 --rate 0 measures the machine itself.
"""

import argparse
import base64
import http.server
import json
import multiprocessing
import os
import re
import shutil
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import google_crc32c
import numpy as np

BUCKET = "bench"
MB = 1_000_000
# like an OCDBT checkpoint: a few large files, many small ones
SHARES = (0.4, 0.3, 0.15, *[0.14 / 6] * 6, *[0.01 / 30] * 30)


def contents(megabytes: int) -> dict[str, bytes]:
    noise = np.random.default_rng(0).bytes(int(megabytes * MB * max(SHARES)))
    return {f"params/d/{i:03d}": noise[: int(share * megabytes * MB)] for i, share in enumerate(SHARES)}


def serve(megabytes: int, latency: float, rate: float, port: Connection) -> None:
    """The server's process; sends the port it listens on."""
    files = contents(megabytes)
    about = {
        name: {
            "name": name,
            "bucket": BUCKET,
            "size": str(len(data)),
            "generation": "1",
            "crc32c": base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode(),
        }
        for name, data in files.items()
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            time.sleep(latency)
            url = urllib.parse.urlparse(self.path)
            query = urllib.parse.parse_qs(url.query)
            name = urllib.parse.unquote(url.path.rpartition("/o/")[2])
            if url.path.endswith("/o"):
                prefix = query.get("prefix", [""])[0]
                self.answer(json.dumps({"items": [a for n, a in about.items() if n.startswith(prefix)]}).encode())
            elif name not in files:
                self.answer(b"{}", 404)
            elif query.get("alt") == ["media"]:
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
                whole = memoryview(files[name])
                if asked:
                    start, stop = int(asked[1]), min(int(asked[2]) + 1, len(whole))
                    self.answer(whole[start:stop], 206, f"bytes {start}-{stop - 1}/{len(whole)}")
                else:
                    self.answer(whole)
            else:
                self.answer(json.dumps(about[name]).encode())

        def answer(self, body: bytes | memoryview, status: int = 200, content_range: str = ""):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()
            begin, step = time.perf_counter(), 1 << 18
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                if rate:
                    ahead = (start + step) / (rate * MB) - (time.perf_counter() - begin)
                    time.sleep(max(0.0, ahead))

        def log_message(self, format, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 128

        def handle_error(self, request, client_address):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    port.send(server.server_address[1])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port.recv()  # until the other end is closed or says so


def client():
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    return storage.Client(project="bench", credentials=AnonymousCredentials())


def one_after_another(folder: Path) -> None:
    """What a short script does: list, then download each object."""
    for blob in client().list_blobs(BUCKET, prefix="params/"):
        path = folder / blob.name
        path.parent.mkdir(parents=True, exist_ok=True)
        blob.download_to_filename(path)


def transfer_manager(folder: Path, workers: int) -> None:
    """google-cloud-storage's own parallel download: threads over whole objects, as `gsutil -m` and gcloud do."""
    from google.cloud.storage import transfer_manager as manager

    google = client()
    names = [blob.name for blob in google.list_blobs(BUCKET, prefix="params/")]
    results = manager.download_many_to_path(
        google.bucket(BUCKET), names, destination_directory=str(folder), worker_type=manager.THREAD, max_workers=workers
    )
    assert not [r for r in results if isinstance(r, Exception)], results


def in_chunks(folder: Path, workers: int) -> None:
    """The same package, each object in ranges (`download_chunks_concurrently`), one object after another."""
    from google.cloud.storage import transfer_manager as manager

    google = client()
    for blob in google.list_blobs(BUCKET, prefix="params/"):
        path = folder / blob.name
        path.parent.mkdir(parents=True, exist_ok=True)
        manager.download_chunks_concurrently(
            blob, str(path), chunk_size=16 << 20, worker_type=manager.THREAD, max_workers=workers
        )


def ours(folder: Path) -> None:
    from hvd.storage import cache as storage

    os.environ["HVD_CACHE"] = str(folder)
    storage.fetch(f"gs://{BUCKET}/params")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before each answer")
    parser.add_argument("--rate", type=float, default=20.0, help="MB/s of one connection; 0 = as fast as it goes")
    parser.add_argument("--folder", default=None, help="where to write; default: the temporary folder")
    args = parser.parse_args()
    from hvd.storage.remote import THREADS

    mine, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(args.megabytes, args.latency, args.rate, theirs), daemon=True
    )
    server.start()
    os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{mine.recv()}"
    want = {name: google_crc32c.value(data) for name, data in contents(args.megabytes).items()}
    rows: list[tuple[str, Callable[[Path], None]]] = [
        ("one object after another", one_after_another),
        (f"transfer_manager, {THREADS} threads", lambda folder: transfer_manager(folder, THREADS)),
        (f"its ranges, {THREADS} threads", lambda folder: in_chunks(folder, THREADS)),
        (f"hvd.storage, {THREADS} threads", ours),
    ]
    limit = f"{args.rate:g} MB/s a connection" if args.rate else "no limit"
    print(f"{args.megabytes} MB in {len(SHARES)} objects, {args.latency * 1e3:g} ms a request, {limit}\n")
    print(f"{'':<32}{'seconds':>9}{'MB/s':>9}{'CPU s':>8}")
    for name, run in rows:
        folder = Path(tempfile.mkdtemp(prefix="bench-storage-", dir=args.folder))
        try:
            begin, cpu = time.perf_counter(), time.process_time()
            run(folder)
            took, cpu = time.perf_counter() - begin, time.process_time() - cpu
            found = {p.relative_to(p.parents[2]).as_posix(): p for p in folder.rglob("d/*")}
            assert {n: google_crc32c.value(p.read_bytes()) for n, p in found.items()} == want, name
            print(f"{name:<32}{took:>9.2f}{args.megabytes / took:>9.0f}{cpu:>8.2f}", flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    mine.send("end")
    server.join()


if __name__ == "__main__":
    main()
