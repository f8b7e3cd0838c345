"""Doors to the outside: a server's clients, checkpoints of others, storage servers, a cluster's site file."""

import base64
import http.server
import json
import os
import random
import shutil
import socket
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz import mutations
from tests.fuzz.door import Door, spoil


def openpi(good: Path) -> Door:
    import jax

    from hvd.models import weights

    rng = np.random.default_rng(0)
    tree = {"a": {"w": rng.normal(size=(8, 6)).astype(np.float32)}, "b": rng.normal(size=5).astype(np.float32)}
    weights.write(good / "params", jax.tree.map(jax.numpy.asarray, tree))

    def damage(folder: Path, rng: random.Random) -> str:
        files = sorted(path for path in (folder / "params").rglob("*") if path.is_file())
        path = rng.choice(files)
        if rng.random() < 0.06:
            path.unlink()
            return f"{path.name} is gone"
        try:
            json.loads(path.read_bytes())
        except ValueError:
            path.write_bytes(mutations.damaged(rng, path.read_bytes()))
        else:
            path.write_bytes(mutations.document(rng, path.read_bytes()))
        return str(path.relative_to(folder))

    def read(folder: Path) -> str:
        opened = weights.open_checkpoint(folder, "weight_loader")
        place = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
        wanted = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in opened.arrays.items()}
        weights.match(opened, wanted)
        weights.read(opened, wanted)
        return ""  # openpi's format has no checksums: other numbers cannot be told

    return Door(damage, read)


def message(good: Path) -> Door:
    from openpi_client import msgpack_numpy

    from hvd.serve import msgpack
    from hvd.serve.observation import Refused
    from tests.serve.test_observation import GOOD, LEROBOT, make_reader

    reader = make_reader()
    (good / "message").write_bytes(b"")

    def damage(folder: Path, rng: random.Random) -> str:
        tree: Any = rng.choice((GOOD, LEROBOT)) | {"seed": 3, "num_flow_steps": 7}
        if rng.random() < 0.5:
            odd = (np.arange(3), np.array(["a", "\ud800"]), np.float64(1.5), np.zeros((0, 3), np.uint8), np.array(True))
            way = rng.choice([way for way in mutations.places(tree) if way])
            tree = tree | {way[0]: rng.choice((*odd, *mutations.VALUES))} if len(way) == 1 else tree
        try:
            data = msgpack_numpy.packb(tree)
        except (OverflowError, ValueError):
            data = msgpack_numpy.packb(GOOD)
        if rng.random() < 0.6:
            data = mutations.damaged(rng, data)
        (folder / "message").write_bytes(data)
        return repr(data[:200])

    def read(folder: Path) -> str:
        try:
            request = reader.read(msgpack.unpack((folder / "message").read_bytes()), 1)
        except msgpack.Malformed as error:
            raise Refused(str(error)) from None
        return "" if np.isfinite(request.observation["state"]).all() else "a state that is not finite"

    return Door(damage, read)


def site(good: Path) -> Door:
    from hvd.clusters.slurm import site as sites

    root = Path(__file__).parents[2]
    (good / "site.toml").write_bytes((root / "slurm/site.toml").read_bytes())
    values = (
        '"a b"',
        '"$(id)"',
        '"a\\nb"',
        '""',
        "5",
        "-1",
        "99999999999999999999",
        "true",
        "[]",
        '["a"]',
        "{a=1}",
        "nan",
    )
    values += ("1979-05-27", '"\\u0000"', '"999999999999G"', '"1-2:3:4"', '"' + "x" * 100_000 + '"', "[[1]]", '["#x"]')

    def damage(folder: Path, rng: random.Random) -> str:
        path = folder / "site.toml"
        if rng.random() < 0.4:
            path.write_bytes(mutations.damaged(rng, path.read_bytes()))
            return "bytes"
        rows = path.read_text().splitlines()
        at = rng.choice([i for i, row in enumerate(rows) if " = " in row and not row.startswith("#")])
        rows[at] = f"{rows[at].split(' = ')[0]} = {rng.choice(values)}"
        path.write_text("\n".join(rows + ([rng.choice(rows)] if rng.random() < 0.2 else [])))
        return rows[at][:100]

    def read(folder: Path) -> str:
        os.environ["HVD_SITE"] = str(folder / "site.toml")
        sites.load()
        return ""

    return Door(damage, read)


def connection(good: Path) -> Door:
    """Bytes on the server's port: HTTP, handshakes, frames, messages."""
    from openpi_client import msgpack_numpy

    from hvd.errors import UserError
    from hvd.serve import limits
    from hvd.serve.limits import Limits
    from tests.serve.running import Model, Running
    from tests.serve.test_observation import GOOD, make_reader

    limits._HTTP_PER_S, limits._HTTP = 1e6, 1_000_000  # else an address gets 100 a second
    running = Running(Model(), make_reader(), limits=Limits(pause=0.0, open=5.0, connections=8, idle=0.0))
    (good / "bytes").write_bytes(b"")
    key = base64.b64encode(bytes(16)).decode()
    upgrade = {"Host": "x", "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    upgrade |= {"Sec-WebSocket-Key": key}
    names = (*upgrade, "Authorization", "Content-Length", "Transfer-Encoding", "Origin", "Expect", "a b", "\u00e9")
    values = (
        "",
        "x",
        "-1",
        "9" * 5000,
        "chunked",
        "Api-Key x",
        "\u00e9",
        "a\tb",
        "websocket, x",
        "8",
        "http://x",
        key[:5],
    )

    paths = ("/healthz", "/metrics", "/", "/x", "/" + "y" * 9000, "//../../etc/passwd", "*")

    def request(rng: random.Random, path: str) -> bytes:
        headers = list((upgrade if path == "/" else {"Host": "x"}).items())
        for _ in range(rng.choice((0, 0, 1, 2))):
            headers.append((rng.choice(names), rng.choice(values)))
        if rng.random() < 0.1:
            headers = headers * 40
        verb = rng.choice(("GET",) * 8 + ("POST", "HEAD", "", "G" * 9000))
        lines = [f"{verb} {path} HTTP/1.{rng.choice('1110')}", *(f"{name}: {value}" for name, value in headers)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def frame(rng: random.Random, data: bytes) -> bytes:
        first = rng.choice((0x82,) * 6 + (0x81, 0x89, 0x88, 0x8A, 0x02, 0x00, 0x83, 0xF2))
        length = rng.choice((len(data),) * 8 + (0, 2**20, 2**40, 2**63))
        size = bytes([0x80 | 127]) + struct.pack(">Q", length)
        if length == len(data) and length < 126:
            size = bytes([0x80 | length])
        return bytes([first]) + (size if rng.random() < 0.97 else bytes([size[0] & 0x7F])) + bytes(4) + data

    def damage(folder: Path, rng: random.Random) -> str:
        lot = rng.random()
        if lot < 0.5:
            data = request(rng, rng.choice(paths))
            data = mutations.damaged(rng, data) if rng.random() < 0.5 else data
        else:
            headers = "".join(f"{name}: {value}\r\n" for name, value in upgrade.items())
            data = f"GET / HTTP/1.1\r\n{headers}\r\n".encode()
            for _ in range(rng.choice((1, 1, 2, 5))):
                message = msgpack_numpy.packb(GOOD | {"seed": 3}) or b""
                message = mutations.damaged(rng, message) if rng.random() < 0.7 else message
                data += frame(rng, message)
        (folder / "bytes").write_bytes(data)
        return repr(data[:200])

    def read(folder: Path) -> str:
        failed, answer = running.count("failed"), b""
        with socket.create_connection(("127.0.0.1", running.port), timeout=15) as sock:
            try:
                sock.sendall((folder / "bytes").read_bytes())
                sock.shutdown(socket.SHUT_WR)
                while more := sock.recv(1 << 16):
                    answer += more
            except ConnectionError:
                pass  # it does not read what nobody may send
        if running.count("failed") > failed or b"the server failed" in answer or b" 500 " in answer[:40]:
            return f"the server failed: {answer[:200]!r}"
        if answer.startswith((b"HTTP/1.1 101", b"HTTP/1.1 200", b"HTTP/1.1 204")):
            return ""
        raise UserError(ascii(answer[:100].decode("latin-1")))

    return Door(damage, read)


def store(good: Path) -> Door:
    """What a storage server lists, and what an earlier download noted in the cache."""
    from hvd.errors import UserError
    from hvd.storage import cache, remote

    remote.BACKOFF_S, remote.LONGEST_S, remote.TRIES = 0.0, 0.0, 1
    for name in ("HVD_OFFLINE", "GOOGLE_APPLICATION_CREDENTIALS"):
        os.environ.pop(name, None)
    files = {"params/a": b"first", "params/b/c": b"second" * 50, "params/empty": b""}
    items = [
        {"name": name, "size": str(len(data)), "generation": "7", "crc32c": _crc32c(data)}
        for name, data in files.items()
    ]
    (good / "listing.json").write_text(json.dumps({"kind": "storage#objects", "items": items}))
    answers: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self):
            where, _, asked = self.path.partition("?")
            name = where.rpartition("/o/")[2].replace("%2F", "/")
            status, body = 404, b"{}"
            if "alt=media" in asked and name in files:
                status, body = 200, files[name]
                first, dash, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
                if dash:
                    status, body = 206, body[int(first or 0) : int(last or len(body)) + 1]
            elif where.endswith("/o"):
                status, body = 200, answers["listing"]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            if status == 206:
                self.send_header("Content-Range", f"bytes 0-{len(body) - 1}/{len(files[name])}")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{server.server_address[1]}"
    answers["listing"] = (good / "listing.json").read_bytes()
    os.environ["HVD_CACHE"] = str(good / "cache")
    note = cache.fetch("gs://models/params").parent.relative_to(good) / cache.MANIFEST

    def damage(folder: Path, rng: random.Random) -> str:
        if rng.random() < 0.4:
            return spoil(str(note))(folder, rng)
        shutil.rmtree(folder / "cache")
        return spoil("listing.json")(folder, rng)

    def read(folder: Path) -> str:
        os.environ["HVD_CACHE"] = str(folder / "cache")
        answers["listing"] = (folder / "listing.json").read_bytes()
        place = cache.fetch("gs://models/params", "policy.weight_loader")
        if {path.name for path in folder.iterdir()} != {"listing.json", "cache"}:
            return "files beside the cache"
        for path in place.rglob("*"):
            name = f"params/{path.relative_to(place)}"
            if path.is_file() and path.read_bytes() != files.get(name, b"") and name not in _empty(answers["listing"]):
                return f"other bytes in {path.name}"
        missing = [name for name in files if not (place.parent / name).is_file()]
        if missing and all(json.dumps(name)[1:-1].encode() in answers["listing"] for name in missing):
            return f"without {missing}"
        if not place.exists():
            raise UserError("nothing came")
        return ""

    return Door(damage, read)


def _empty(listing: bytes) -> set[str]:
    """What a listing gives as empty, with the checksum of nothing: its word stands against nobody's."""
    try:
        items = json.loads(listing)["items"]
        return {each["name"] for each in items if str(each["size"]) == "0" and each["crc32c"] == "AAAAAA=="}
    except (ValueError, TypeError, LookupError):
        return set()


def _crc32c(data: bytes) -> str:
    import google_crc32c

    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()
