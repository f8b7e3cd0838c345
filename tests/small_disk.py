"""Commands on a real file system of few bytes: a tmpfs in a mount namespace of its own, which needs no root."""

import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.folders import ROOT

IN_NAMESPACE = ["unshare", "-rm"]


def need_small_disk() -> None:
    """Skip the test where no small file system can be mounted."""
    argv = [*IN_NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", tempfile.gettempdir()]
    try:
        possible = subprocess.run(argv, capture_output=True, timeout=20).returncode == 0
    except OSError:
        possible = False
    if not possible:
        pytest.skip("no user namespaces here, so no small file system can be mounted")


def run_on_small_disk(disk: Path, kilobytes: int, script: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """The shell script with `disk` (an existing folder) as a file system of that size; `$enlarge` gives it 100 MB."""
    script = f"""
        mount -t tmpfs -o size={kilobytes}k tmpfs {disk}
        enlarge="mount -o remount,size=100m {disk}"
        {script}
    """
    return subprocess.run(
        [*IN_NAMESPACE, "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
