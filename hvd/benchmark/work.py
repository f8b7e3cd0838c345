"""Does the items of a benchmark: several at a time, each on its share of the cores; what is done is not done again.

An item that ended well leaves `items/<name>.json` (written last, in one step) and the config that it was made with. A
killed benchmark loses nothing else: its commands go on where they stopped.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from msgspec import Struct
from tqdm import tqdm

from hvd import documents, files, overrides
from hvd.benchmark.matrix import Elsewhere, Item, plain
from hvd.clusters.local import runner
from hvd.configs import Experiment
from hvd.documents import Count
from hvd.errors import EXIT_COMPLETE, EXIT_STOPPED, UserError
from hvd.evaluate.results import folder as results_folder
from hvd.evaluate.results import read_results
from hvd.fields import leaves


class Episode(Struct):
    """How one rollout ended; `stage`: the most sub-tasks that were completed at once."""

    seed: Count
    success: bool
    stage: Count
    steps: Count


class Done(Struct):
    """What an item leaves.

    Attributes:
        cpu_s: CPU seconds of its processes, all tries together as far as they ended by themselves.
        scores: content of scores.json, where the policy has `evaluate.checks`.
        elsewhere: the program that made or played it, as the file said it.
    """

    name: str
    cpu_s: float
    wall_s: float
    cell: dict[str, Any] | None = None
    episodes: list[Episode] = []
    scores: dict[str, Any] | None = None
    elsewhere: Elsewhere | None = None


@dataclass
class _Running:
    item: Item
    process: subprocess.Popen
    log: TextIO
    cores: set[int]
    left: list[str]  # steps after this one
    started: float
    cpu_s: float = 0.0


@dataclass
class Work:
    """The items in the folder `out`, `at_a_time` of them side by side."""

    out: Path
    items: Sequence[Item]
    at_a_time: int
    done: set[str] = field(default_factory=set)
    failed: dict[str, int] = field(default_factory=dict)
    _running: list[_Running] = field(default_factory=list)
    _signal: int = 0
    _lock: int = -1
    _said: bool = False

    def run(self) -> int:
        """Do what is left; 0, 143 when a signal stopped it, 1 when items failed (the others are done all the same)."""
        for name in ("items", "configs", "logs"):
            (self.out / name).mkdir(parents=True, exist_ok=True)
        with files.locked(self.out / ".lock", self._wait, keep=True) as self._lock, self._signals():
            self.done = {item.name for item in self.items if finished(self.out, item)}
            cells = [item for item in self.items if item.cell]
            bar = tqdm(total=len(cells), initial=sum(i.name in self.done for i in cells), desc="cells", unit="cell")
            with bar:
                self._loop(bar)
        if self._signal:
            return EXIT_STOPPED
        for name, code in self.failed.items():
            print(f"{name}: exit code {code}; log: {self.out / 'logs' / f'{name}.log'}", flush=True)
        return 1 if self.failed else EXIT_COMPLETE

    def _loop(self, bar: tqdm) -> None:
        free = runner.shares(self.at_a_time)
        while True:
            for item in self._ready():
                if not free or self._signal:
                    break
                self._start(item, free.pop(0), list(item.steps))
            if not self._running:
                return
            time.sleep(0.1)
            for one in list(self._running):
                found, status, used = os.wait4(one.process.pid, os.WNOHANG)
                if found:
                    one.cpu_s += used.ru_utime + used.ru_stime
                    one.process.returncode = os.waitstatus_to_exitcode(status)
                    self._running.remove(one)
                    if self._ended(one, bar):
                        free.append(one.cores)

    def _ready(self) -> list[Item]:
        begun = self.done | self.failed.keys() | {one.item.name for one in self._running}
        return [item for item in self.items if item.name not in begun and self.done.issuperset(item.needs)]

    def _start(self, item: Item, cores: set[int], steps: list[str], one: _Running | None = None) -> None:
        """The first of `steps`, of an item that begins or goes on (`one`)."""
        files.write_atomic(self.out / item.config, plain(item.cfg))
        program, *words = item.command(steps[0])
        argv = [*(runner.COMMAND if program == "hvd" else (program,)), *words]
        log = one.log if one else (self.out / "logs" / f"{item.name}.log").open("a", encoding="utf-8")
        print(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(argv)}", file=log, flush=True)
        env = os.environ | runner.environment(cores) | {"PYTHONPATH": os.pathsep.join(_import_path())}
        with runner.affinity(cores):
            process = subprocess.Popen(
                argv,
                cwd=self.out,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(self._lock,),  # a benchmark that was killed leaves steps that still save
            )
        begun, spent = (one.started, one.cpu_s) if one else (time.monotonic(), 0.0)
        self._running.append(_Running(item, process, log, cores, steps[1:], begun, spent))
        if self._signal:
            os.kill(process.pid, signal.SIGTERM)

    def _ended(self, one: _Running, bar: tqdm) -> bool:
        """One step of an item has ended; whether its cores are free."""
        code = one.process.returncode
        if code == EXIT_COMPLETE and one.left and not self._signal:
            self._start(one.item, one.cores, one.left, one)
            return False
        one.log.close()
        if code != EXIT_COMPLETE:
            if not self._signal:
                self.failed[one.item.name] = code
                bar.write(f"{one.item.name} failed (exit code {code}): {_last_line(self.out, one.item)}")
        elif not one.left:
            result = self._finish(one)
            if one.item.cell:
                bar.update()
                won = sum(episode.success for episode in result.episodes)
                share = f"{won}/{len(result.episodes)} = {won / len(result.episodes):.2f}"
                bar.write(f"[{time.strftime('%H:%M:%S')}] {one.item.name}: {share}, {result.cpu_s / 60:.1f} CPU-min")
        return True

    def _finish(self, one: _Running) -> Done:
        item = one.item
        done = Done(item.name, round(one.cpu_s, 1), round(time.monotonic() - one.started, 1), elsewhere=item.elsewhere)
        if item.cell:
            with contextlib.chdir(self.out):
                found = read_results(results_folder(item.cfg, item.cfg.policy.run_name) / "results.json")
                scores = Path(item.cfg.exp_dir) / "evaluation" / "scores.json"
                if item.cfg.evaluate.checks and scores.exists():
                    done.scores = documents.read_with_nan(scores, dict[str, Any])
            done.cell = asdict(item.cell)
            done.episodes = documents.convert(found["episodes"], list[Episode], item.name)
        files.write_atomic(_path(self.out, item), json.dumps(_plain(done), indent=1) + "\n")
        self.done.add(item.name)
        return done

    def _wait(self) -> None:
        if not self._said:
            print(f"{self.out}: another benchmark is at work here, or its steps still end; waiting", flush=True)
        self._said = True
        time.sleep(0.2)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def forward(number, frame):
            self._signal = number
            for one in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one.process.pid, signal.SIGTERM)  # Popen's own would reap it, and wait4 find nothing

        before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def finished(out: Path, item: Item) -> Done | None:
    """What the item left, if it is done.

    Raises:
        UserError: it was made with another config, or by another program.
    """
    path = _path(out, item)
    if not path.exists():
        return None
    made = overrides.read(str(out / item.config))
    for leaf in leaves(Experiment).values():
        there, asked = leaf.of(made), leaf.of(item.cfg)
        if there != asked:
            raise UserError(
                f"{path} was made with {leaf.name} {there!r}, not {asked!r}: choose another --out, or delete it"
            )
    found = documents.read_with_nan(path, Done)
    if found.elsewhere != item.elsewhere:
        raise UserError(f"{path} was made by another program or with other arguments: choose another --out")
    return found


def _path(out: Path, item: Item) -> Path:
    return out / "items" / f"{item.name}.json"


def _plain(done: Done) -> dict[str, Any]:
    import msgspec

    return msgspec.to_builtins(done)


def _import_path() -> list[str]:
    """Where the children find this hvd, in whose folder they do not run."""
    import hvd

    return [str(Path(hvd.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]


def _last_line(out: Path, item: Item) -> str:
    lines = (out / "logs" / f"{item.name}.log").read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else ""
