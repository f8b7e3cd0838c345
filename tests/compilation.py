"""How tests compile: without most optimisations, and with one cache for all processes that outlives the session.

The same goes for Python's own bytecode: there are hundreds of processes, and each would compile all of jax's source.

Compiling costs more than the few steps of a test. Tests that compare with numbers of others, or with the trainer's own
program, carry the marker `optimised` on their module.
"""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import stat
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LARGEST = 1 << 30  # bytes of a cache that is kept
QUICK = "JAX_DISABLE_MOST_OPTIMIZATIONS"


def optimise(wanted: bool) -> None:
    """Compile with all optimisations from now on, or without most."""
    import jax

    jax.config.update("jax_disable_most_optimizations", not wanted)
    if wanted:
        os.environ.pop(QUICK, None)
    else:
        os.environ[QUICK] = "1"


def every_process_writes() -> None:
    """jax lets process 0 alone write its cache. On CPUs each process has keys of its own: the others would never find
    their programs there."""
    from jax._src import compiler

    class Distributed:
        class global_state:
            process_id, client = 0, None

    compiler.distributed = Distributed  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]


def _cache() -> Path:
    """A folder that only this user can write, since what is in it is run: below .pytest_cache, else a temporary one."""
    if (given := os.environ.get("HVD_TEST_CACHE")) is not None:  # of the process that started this one
        return Path(given)
    folder = ROOT / ".pytest_cache" / f"jax-{importlib.metadata.version('jaxlib')}-{_machine()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
        if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) != 0o700 or not os.access(folder, os.W_OK):
            raise PermissionError(folder)
        if sum(path.stat().st_size for path in folder.iterdir()) > LARGEST:
            shutil.rmtree(folder)
            folder.mkdir(mode=0o700)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="hvd-jax-cache-"))
    os.environ["HVD_TEST_CACHE"] = str(folder)
    return folder


def _machine() -> str:
    """Programs are compiled for the instructions of this CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(f"{platform.platform()} {platform.processor()} {features}".encode()).hexdigest()[:12]


# Set for this process and its children, before jax is imported
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ[QUICK] = "1"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_cache())
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
