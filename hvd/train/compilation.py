"""Where compiled programs are kept. They are machine code that each later process runs unchecked, so the folder is the
user's own: never one that came with a run, never one in a place where others may write.
"""

import grp
import os
import pwd
import stat
from pathlib import Path

import jax

from hvd.files import is_local
from hvd.runtime import processes
from hvd.storage.cache import cache_root

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def use_cache() -> None:
    """Keep compiled programs in $JAX_COMPILATION_CACHE_DIR, else $HVD_CACHE/jax, else ~/.cache/hvd/jax (mode 0700).

    A restart then compiles nothing. Where others could put programs there, none are kept, and a line says so.
    """
    given = os.environ.get(_VARIABLE, "")
    folder: str | None = given
    if is_local(given):
        path = Path(given).expanduser().absolute() if given else cache_root() / "jax"
        problem = _problem(path)
        folder = None if problem else os.fspath(path)
        if problem and processes.rank() == 0:
            print(
                f"compiled programs are not kept, so each start compiles them: {problem} (set {_VARIABLE})", flush=True
            )
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _problem(folder: Path) -> str:
    """Why programs of this folder are not to be run; makes it first. "" = nothing."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
        about = folder.stat()
        if about.st_uid != os.geteuid():
            return f"{folder} belongs to another user"
        if about.st_mode & _OTHERS_WRITE:
            return f"others may write to {folder}"
        for parent in folder.parents:
            mode = parent.stat()
            ours = _OTHERS_WRITE & ~stat.S_IWGRP if _is_private(mode.st_gid) else _OTHERS_WRITE
            if mode.st_mode & ours and not mode.st_mode & stat.S_ISVTX:
                return f"others may write to {parent}"
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder} cannot be written"


def _is_private(group: int) -> bool:
    """A user's private group: it has the user's name and nobody else in it."""
    try:
        user, found = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:  # in a container: a number without a name
        return group == os.geteuid()
    return found.gr_name == user and set(found.gr_mem) <= {user}
