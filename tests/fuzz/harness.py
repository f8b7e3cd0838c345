"""Runs damaged inputs in forked children, which may hang, crash or take memory."""

import collections
import contextlib
import faulthandler
import json
import os
import random
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from hvd.errors import Failed, Lost, UserError
from tests.fuzz.doors import DOORS, Door

WRONGLY = ("wrong", "traceback", "hang", "memory", "crash")
SECONDS, MEMORY = 20.0, 2 << 30
BATCH = 200  # inputs of a child


def run(name: str, inputs: int, seconds: float, seed: int) -> tuple[collections.Counter[str], dict[str, str]]:
    """How many inputs of a door ended in which way, and the first example of each wrong way and place."""
    tally: collections.Counter[str] = collections.Counter()
    examples: dict[str, str] = {}
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as folder:
        at, last = seed, seed + inputs
        while at < last and time.monotonic() < end:
            for found in _batch(name, Path(folder), at, min(last, at + BATCH), end):
                tally[found["end"]] += 1
                if found["end"] in WRONGLY:
                    examples.setdefault(f"{found['end']} {found['at']}", f"--seed {at}: {found['text']}")
                at += 1
    return tally, examples


def _batch(name: str, folder: Path, first: int, last: int, end: float) -> Iterator[dict[str, str]]:
    """What each input of a child ended as, until the child has."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        _child(name, folder, first, last, end, writing)
    os.close(writing)
    began, buffer, told = time.monotonic(), b"", 0
    with contextlib.closing(os.fdopen(reading, "rb", 0)) as pipe:
        while True:
            if select.select([pipe], [], [], 0.2)[0]:
                data = pipe.read(1 << 16)
                if not data:
                    break
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    told, began = told + 1, time.monotonic()
                    yield json.loads(line)
            if time.monotonic() - began > SECONDS:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                yield {"end": "hang", "at": "", "text": ""}
                return
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        yield {"end": "crash", "at": f"signal {os.WTERMSIG(status)}", "text": ""}


def _child(name: str, folder: Path, first: int, last: int, end: float, pipe: int) -> None:
    """Make the good files too: no thread of a library may run in the process that is forked."""
    faulthandler.disable()
    good, work = folder / "good", folder / "work"
    shutil.rmtree(good, ignore_errors=True)
    good.mkdir()
    door = DOORS[name](good)
    before = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (before + MEMORY, before + MEMORY))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for seed in range(first, last):
        if time.monotonic() > end:
            break
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(good, work, symlinks=True)
        found = _end(door, work, random.Random(f"{name} {seed}"))
        os.write(pipe, json.dumps(found).encode() + b"\n")
    os._exit(0)


def _end(door: Door, work: Path, rng: random.Random) -> dict[str, str]:
    what = door.damage(work, rng)
    try:
        wrong = door.read(work)
        return {"end": "wrong" if wrong else "accepted", "at": "", "text": f"{what}: {wrong}"}
    except (UserError, Failed, Lost) as error:
        text = str(error)
        if not text.isprintable() or len(text) > 5_000:
            return {"end": "wrong", "at": "error line", "text": f"{what}: {text!r:.300}"}
        return {"end": "line", "at": "", "text": ""}
    except MemoryError:
        return {"end": "memory", "at": "", "text": what}
    except BaseException as error:
        places = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}hvd{os.sep}" in f.filename]
        place = f"{places[-1].filename}:{places[-1].lineno}" if places else "?"
        return {"end": "traceback", "at": f"{type(error).__name__} {place}", "text": f"{what}: {str(error)[:150]!r}"}
