"""Where derived data of a dataset are kept (memory-mapped columns, packet lists, resized frames), and how they come
there: whole or not at all, made by one process while the others wait.

An entry is a folder. Its seal names the inode and the times of each of its files. The kernel sets the time of change
(ctime), and no copy, archive or download keeps it. So an entry that came with a dataset, or that was changed or
damaged later, does not match its seal and is made anew. All nodes, containers and users of a file system agree on it.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from hvd.files import disk_errors, locked, remove_left_over, replacing

_SEAL = "seal.json"


def cache_folder(root: Path) -> Path:
    """<dataset>/.hvd_cache, or a folder of the user's cache when the dataset is read-only."""
    beside = root / ".hvd_cache"
    if os.access(beside if beside.exists() else root, os.W_OK):
        return beside
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(home) / "hvd" / hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]


def cached(target: Path, make: Callable[[Path], object], *, anew: bool = False) -> Path:
    """`target`, a folder of a cache. If it is not there as hvd left it, `make(temporary path)` makes it first.

    After an error nothing stays. A full disk or a folder that cannot be written is a UserError.

    Args:
        anew: make it even if it is there.
    """
    if not anew and is_own(target):
        return target
    try:
        with (
            disk_errors(target.parent, "the dataset's cache needs room here"),
            locked(target.parent / f".{target.name}.lock"),
        ):
            remove_left_over(target.parent, target.name)  # gigabytes of decoded frames, maybe
            if anew or not is_own(target):  # another process may have made it while this one waited
                with replacing(target) as temporary:
                    make(temporary)
                    _seal(temporary)
                    remove(target)
    finally:
        with contextlib.suppress(OSError):  # not empty, or gone
            target.parent.rmdir()
    return target


def is_own(entry: Path) -> bool:
    """Whether hvd made this entry here, and nothing has touched it since."""
    try:
        marks = _marks(entry)  # first, as it knows regular files
        return json.loads((entry / _SEAL).read_bytes()) == marks
    except (OSError, ValueError, RecursionError):
        return False


def remove(entry: Path) -> None:
    """Remove an entry, also what an older version left as a file. A link is removed, not what it leads to."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)


def _seal(entry: Path) -> None:
    for path in entry.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    (entry / _SEAL).write_text(json.dumps(_marks(entry)))


def _marks(entry: Path) -> dict[str, list[int]]:
    """Name -> inode, size and times of each file of an entry. ValueError when it holds anything but files."""
    with os.scandir(entry) as files:
        states = {file.name: file.stat(follow_symlinks=False) for file in files}
    if not all(stat.S_ISREG(state.st_mode) for state in states.values()):
        raise ValueError(f"{entry} holds something that is not a regular file")
    states.pop(_SEAL, None)
    return {n: [s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for n, s in states.items()}
