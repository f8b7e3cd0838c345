"""What identifies a dataset's contents: a digest, and a quick fingerprint by which a known digest is found again."""

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from hvd.data.cache import cache_folder, cached, is_own, remove
from hvd.data.layout import Layout
from hvd.errors import UserError

_VERSION = "1"  # of what is in the cache
_NOTE = "digest"  # the entry that remembers the value
_SAMPLE = 64 * 1024  # bytes hashed at the beginning, middle and end of each video
_OF_A_DIGEST = re.compile(r"^[a-z]+-([0-9a-f]{16})-")  # names of the cache's entries: <kind>-<digest>-<more>


@dataclass(frozen=True)
class Digest:
    """`value`: sha256 over the contents of meta and data, and over size and sampled bytes of each video. `fingerprint`
    changes when size or time of any of these files does."""

    value: str
    fingerprint: str
    known: bool

    def keep(self, layout: Layout) -> None:
        """Remember the value, so that the next opening reads no data, and drop the cache of other contents."""
        if self.known:
            return
        folder = cache_folder(layout.root)
        cached(folder / _NOTE, self._write, anew=True)
        for entry in folder.iterdir():
            match = _OF_A_DIGEST.match(entry.name)
            if match and match[1] != self.value[:16]:
                remove(entry)

    def _write(self, note: Path) -> None:
        note.mkdir()
        (note / "digest.json").write_text(json.dumps({"files": self.fingerprint, "digest": self.value}))


def digest(layout: Layout, needed: Set[Path]) -> Digest:
    """The digest of the dataset, from the cache if it is remembered there.

    Files that are not on this disk are left out. Raises UserError naming one that is `needed` and missing, or that is
    unreadable or no regular file.
    """
    meta = sorted(p for p in (layout.root / "meta").rglob("*") if p.is_file())
    prefix = len(str(layout.root)) + 1  # Path.relative_to takes as long as all the rest
    files = []
    fingerprint = hashlib.sha256(str(layout.root.resolve()).encode())
    named = [(p, False) for p in (*meta, *layout.data_paths)] + [(p, True) for p in layout.video_paths]
    for path, partly in named:
        try:
            state = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            if path in needed:
                raise UserError(f"{path}: file of the dataset is missing") from None
            continue
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: file of the dataset is unreadable ({error})") from None
        if not stat.S_ISREG(state.st_mode):
            raise UserError(f"{path} is not a regular file")
        files.append((path, partly))
        fingerprint.update(f"{str(path)[prefix:]} {state.st_size} {state.st_mtime_ns}\n".encode())
    note = cache_folder(layout.root) / _NOTE
    with contextlib.suppress(ValueError, KeyError, OSError):  # a damaged note is as good as none
        said = json.loads((note / "digest.json").read_bytes()) if is_own(note) else {}
        if said.get("files") == fingerprint.hexdigest():
            return Digest(said["digest"], fingerprint.hexdigest(), True)
    total = hashlib.sha256(_VERSION.encode())
    for path, partly in tqdm(files, unit="file", desc=f"hashing {layout.root.name}", delay=2):
        total.update(f"{str(path)[prefix:]}\n".encode())
        with path.open("rb") as file:
            total.update(_sampled(file) if partly else hashlib.file_digest(file, "sha256").digest())
    return Digest(total.hexdigest(), fingerprint.hexdigest(), False)


def _sampled(file: BinaryIO) -> bytes:
    size = file.seek(0, os.SEEK_END)
    total = hashlib.sha256(str(size).encode())
    for start in sorted({0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)}):
        file.seek(start)
        total.update(file.read(_SAMPLE))
    return total.digest()
