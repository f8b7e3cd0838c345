"""Run as a program: kills conversions with SIGKILL at their file operations, and checks what each leaves behind.

    python -m tests.data.killed_conversion RAW OUT SEED KILLS

Forks of this process convert RAW. Each kills itself at its n-th file operation (audit events: files opened, folders
made, things renamed or removed), for n drawn at random; another fork then runs the same command to its end, and the
result must be what an undisturbed conversion wrote. Forking is safe here, and fast: this process has no threads.
"""

import contextlib
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from hvd.data import convert as converting
from hvd.data.convert import ConvertConfig, convert
from tests.data import joylo
from tests.data.joylo import tree

converting.Isolated = joylo.Here  # a worker would not be killed at its file operations
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


def convert_in_fork(raw: Path, target: Path, kill_at: int = 0, overwrite: bool = False) -> int:
    """Returns the number of file operations, or -9 when the fork killed itself at number `kill_at`."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, args: tuple) -> None:
            nonlocal count
            if event in EVENTS:
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(hook)
            config = ConvertConfig((str(raw),), "me/set", root=str(target), workers=1, overwrite=overwrite)
            convert(config)
            os.write(write, str(count).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), f"the conversion ended with {code}"
    return int(said) if code == 0 else code


def import_what_a_conversion_imports(raw: Path, out: Path) -> None:
    """Else each fork imports it again: most file operations, and most of the time, would be those of imports."""
    code = (
        "import sys; from tests.data.killed_conversion import *; "
        f"convert(ConvertConfig(({str(raw)!r},), 'me/set', root={str(out / 'imports')!r}, workers=1)); "
        "print('modules', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in done.stdout.rpartition("modules ")[2].split():
        if not name.startswith("__"):
            with contextlib.suppress(Exception):  # a name in sys.modules need not be one that can be imported
                importlib.import_module(name)


def main(raw: Path, out: Path, seed: int, kills: int) -> None:
    import_what_a_conversion_imports(raw, out)
    total = convert_in_fork(raw, out / "reference")
    reference = tree(out / "reference")
    rng = random.Random(seed)
    target, work = out / "set", out / "set.partial"
    complete = 0
    points = [1, total, *rng.sample(range(2, total), kills - 2)]
    for n in points:
        killed = convert_in_fork(raw, target, n) == -signal.SIGKILL
        assert killed, f"no operation {n}"
        if target.exists():  # killed after the last step, or while tidying up
            complete += 1
            assert tree(target) == reference, f"a half dataset after a kill at {n}"
        assert convert_in_fork(raw, target) >= 0
        assert tree(target) == reference, f"another dataset after a kill at {n}"
        assert not work.exists(), f"{work} left after a kill at {n}"
        shutil.rmtree(target)
    # killed again and again, each time a little later, it still gets done
    n = 5
    while convert_in_fork(raw, target, n) < 0:
        n += 7
    assert tree(target) == reference and not work.exists()
    # overwriting: one of both datasets is whole at any moment
    for n in rng.sample(range(2, total), 5):
        convert_in_fork(raw, target, n, overwrite=True)
        place = target if target.exists() else work / "replaced"
        assert tree(place) == reference, f"the old dataset was damaged by a kill at {n}"
        assert convert_in_fork(raw, target, overwrite=True) >= 0
        assert tree(target) == reference and not work.exists()
    print(f"{len(points)} kills among {total} operations, {complete} after the dataset was there")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
