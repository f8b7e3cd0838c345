"""Where derived data of a dataset are kept (memory-mapped columns, packet lists, resized frames), and how they come
there: whole or not at all, made by one process while the others wait.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from hvd.files import disk_errors, locked, replacing


def cache_folder(root: Path) -> Path:
    """<dataset>/.hvd_cache, or a folder of the user's cache when the dataset is read-only."""
    beside = root / ".hvd_cache"
    if os.access(beside if beside.exists() else root, os.W_OK):
        return beside
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(home) / "hvd" / hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]


def cached(target: Path, make: Callable[[Path], object]) -> Path:
    """`target`, a file or folder of a cache; if it is not there, `make(temporary path)` makes it first.

    After an error nothing stays. A full disk or a folder that cannot be written is a UserError.
    """
    if target.exists():
        return target
    try:
        with (
            disk_errors(target.parent, "the dataset's cache needs room here"),
            locked(target.parent / f".{target.name}.lock"),
        ):
            if not target.exists():  # another process may have made it while this one waited
                with replacing(target) as temporary:
                    make(temporary)
    finally:
        with contextlib.suppress(OSError):  # not empty, or gone
            target.parent.rmdir()
    return target
