"""Runs damaged inputs in forked children, which may hang, crash or take memory."""

import collections
import contextlib
import dataclasses
import faulthandler
import itertools
import json
import multiprocessing
import os
import random
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from hvd.errors import Failed, Lost, UserError
from tests.fuzz.door import Door
from tests.fuzz.doors import DOORS

WRONGLY = ("wrong", "traceback", "hang", "memory", "crash")
SECONDS, MEMORY = 20.0, 2 << 30
BATCH = 1000  # inputs of a child


@dataclasses.dataclass
class Tally:
    """What became of the inputs of a door: their ends, the first example of each wrong end and place, and the largest
    resident memory of a child in MB."""

    ends: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)
    peak: int = 0


def run(name: str, inputs: int, seconds: float, seed: int, keep: Path | None = None) -> Tally:
    """Give a door so many inputs. The files of each wrong end are copied to `keep`/DOOR-SEED."""
    tally, end = Tally(), time.monotonic() + seconds
    shared = Path("/dev/shm")
    place = shared if shared.is_dir() else None
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-", dir=place) as folder:
        at, last = seed, seed + inputs
        while at < last and time.monotonic() < end:
            for found in _batch(name, Path(folder), at, min(last, at + BATCH), end, keep, tally):
                tally.ends[found["end"]] += 1
                if found["end"] in WRONGLY:
                    if found["end"] in ("hang", "crash") and keep:
                        _copy(Path(folder) / "work", keep / f"{name}-{at}")
                    place_of = f"{found['end']} {found['at']}"
                    tally.examples.setdefault(place_of, f"--doors {name} --inputs 1 --seed {at}: {found['text']}")
                at += 1
    return tally


def run_shared(name: str, inputs: int, seconds: float, seed: int, keep: Path | None, workers: int) -> Tally:
    """`run` by several processes, each of which takes inputs that follow each other; their tallies as one."""
    if workers == 1:
        return run(name, inputs, seconds, seed, keep)
    context, bounds = multiprocessing.get_context("fork"), [seed + inputs * i // workers for i in range(workers + 1)]
    pipes = []
    for first, last in itertools.pairwise(bounds):
        reading, writing = context.Pipe(duplex=False)
        arguments = (writing, name, last - first, seconds, first, keep)
        with warnings.catch_warnings():  # as in _batch
            warnings.simplefilter("ignore", DeprecationWarning)
            context.Process(target=_send, args=arguments).start()
        writing.close()
        pipes.append(reading)
    tally = Tally()
    for pipe in pipes:  # one that died sends nothing: EOFError
        part: Tally = pipe.recv()
        tally.ends += part.ends
        tally.examples = part.examples | tally.examples
        tally.peak = max(tally.peak, part.peak)
    return tally


def _send(pipe: Connection, name: str, inputs: int, seconds: float, seed: int, keep: Path | None) -> None:
    pipe.send(run(name, inputs, seconds, seed, keep))


def _copy(work: Path, to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(work, to, symlinks=True)


def _batch(
    name: str, folder: Path, first: int, last: int, end: float, keep: Path | None, tally: Tally
) -> Iterator[dict[str, str]]:
    """What each input of a child ended as, until the child has."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():  # of a thread: it is that of pyarrow's allocator
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        os.close(reading)
        _child(name, folder, first, last, end, writing, keep)
    os.close(writing)
    began, buffer, made = time.monotonic(), b"", False
    with contextlib.closing(os.fdopen(reading, "rb", 0)) as pipe:
        while True:
            if select.select([pipe], [], [], 0.2)[0]:
                data = pipe.read(1 << 16)
                if not data:
                    break
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    began = time.monotonic()
                    if made:
                        yield json.loads(line)
                    made = True  # the first line says that the good files are there
            if time.monotonic() - began > (SECONDS if made else 10 * SECONDS):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                yield {"end": "hang", "at": "", "text": ""}
                return
    _, status, used = os.wait4(pid, 0)
    tally.peak = max(tally.peak, used.ru_maxrss >> 10)
    if status:
        yield {"end": "crash", "at": f"exit {os.waitstatus_to_exitcode(status)}", "text": ""}


def _child(name: str, folder: Path, first: int, last: int, end: float, pipe: int, keep: Path | None) -> None:
    """Make the good files too: no thread of a library may run in the process that is forked."""
    faulthandler.disable()
    os.environ["TQDM_DISABLE"] = "1"
    told = 2
    try:
        good, work = folder / "good", folder / "work"
        shutil.rmtree(good, ignore_errors=True)
        good.mkdir()
        door = DOORS[name](good)
        before = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (before + MEMORY, before + MEMORY))
        os.write(pipe, b"\n")
        null, told = os.open(os.devnull, os.O_WRONLY), os.dup(2)
        os.dup2(null, 1)
        os.dup2(null, 2)
        for seed in range(first, last):
            if time.monotonic() > end:
                break
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(good, work, symlinks=True)
            found = _end(door, work, random.Random(f"{name} {seed}"))
            if found["end"] in WRONGLY and keep:
                _copy(work, keep / f"{name}-{seed}")
            os.write(pipe, json.dumps(found).encode() + b"\n")
    except BaseException:  # of the door itself
        os.write(told, traceback.format_exc().encode())
        os._exit(1)
    os._exit(0)


def _end(door: Door, work: Path, rng: random.Random) -> dict[str, str]:
    what = door.damage(work, rng)
    try:
        wrong = door.read(work)
        return {"end": "wrong" if wrong else "same", "at": "", "text": f"{what}: {wrong}"}
    except (UserError, Failed, Lost) as error:
        text = str(error)
        if not text.isprintable() or len(text) > 5_000:
            return {"end": "wrong", "at": "error line", "text": f"{what}: {text!r:.300}"}
        return {"end": "refused", "at": "", "text": ""}
    except MemoryError:
        return {"end": "memory", "at": "", "text": what}
    except BaseException as error:
        places = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}hvd{os.sep}" in f.filename]
        place = f"{places[-1].filename}:{places[-1].lineno}" if places else "?"
        return {"end": "traceback", "at": f"{type(error).__name__} {place}", "text": f"{what}: {str(error)[:150]!r}"}
