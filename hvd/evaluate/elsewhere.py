"""hvd rollouts --config NAME [--field value]... -- PROGRAM [ARGUMENT]...: the policy in an environment of your own.

The policy is served to the program, which may need another Python. It is told by variables:

    HVD_URL          where the policy is, for openpi's client or hvd.client
    HVD_FIRST_SEED   the seed of the first episode; the others follow
    HVD_EPISODES     how many to play
    HVD_EXECUTE      actions of a chunk that are executed before the next is asked (evaluate.execute_steps)

and prints a line of JSON when an episode has ended; its other lines are passed on:

    {"seed": 1000000, "success": true, "stage": 2, "steps": 143}

`stage` is the number of sub-tasks that were done (--stages names them). The table, results.json and the report are
those of `hvd evaluate`. docs/examples has such programs.
"""

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta, Struct
from tqdm import tqdm

from hvd import documents, overrides
from hvd.checks import check_config
from hvd.configs import EvaluateConfig
from hvd.documents import Count
from hvd.errors import EXIT_COMPLETE, Failed, UserError
from hvd.fields import POSITIVE, option

SERVE = (sys.executable, "-m", "hvd.cli", "serve")
_LINE = 10_000  # characters of a line of JSON


@dataclass(frozen=True)
class Options:
    """What `hvd rollouts` is told beside the fields of the experiment."""

    task: str = option("own", "name of the task, for the table")
    stages: str = option("success", "names of the sub-tasks in their order, separated by commas")
    hours: float = option(24.0, POSITIVE, "the program is stopped after so long")


class Episode(Struct):
    """How one episode ended; `stage` -1: the last one where it succeeded, else the first."""

    seed: Count
    success: bool
    steps: Count = 0
    stage: Annotated[int, Meta(ge=-1, le=100)] = -1


def main(argv: Sequence[str]) -> int:
    """Serve, play, write results.json and print the table."""
    if overrides.asks_help(argv[: argv.index("--")] if "--" in argv else argv):
        overrides.print_help("hvd rollouts --config NAME -- PROGRAM [ARGUMENT]...", __doc__ or "", Options())
        return EXIT_COMPLETE
    options, rest, program = parse(argv)
    from hvd.evaluate.command import credit_checks, print_table, summary  # numpy, which a help page does without
    from hvd.evaluate.results import folder, write_json
    from hvd.method import extraction
    from hvd.train.complete import check_complete
    from hvd.train.inputs import check_writable

    cfg = overrides.experiment(rest)
    check_config(cfg)
    if cfg.sim.task:
        raise UserError(f"config {cfg.name}: its task is simulated here: `hvd evaluate` plays it")
    check_writable(cfg.exp_dir)
    found = check_complete(cfg.policy_dir, stage="policy", cfg=cfg)
    stages = [name.strip() for name in options.stages.split(",") if name.strip()]
    if not stages:
        raise UserError("--stages has no name in it")
    settings, started = cfg.evaluate, time.monotonic()
    with _served([*SERVE, *rest, "--port", "0", "--log-every-s", "0"]) as url:
        episodes = play(program, url, settings, len(stages), options.hours * 3600)
    results = {
        **summary(cfg, options.task, "", stages, [(e.success, e.stage) for e in episodes]),
        "run_name": cfg.policy.run_name,
        "weighting": extraction.label(cfg),
        "observes": None,
        "horizon": max(episode.steps for episode in episodes),
        "policy_digest": found.digest,
        "policy_step": found.step,
        "episodes": [
            {"seed": e.seed, "success": e.success, "stage": e.stage, "steps": e.steps, "video": ""} for e in episodes
        ],
        "wall_s": round(time.monotonic() - started, 1),
    }
    write_json(folder(cfg, cfg.policy.run_name) / "results.json", results)
    print_table([results])
    credit_checks(cfg)
    return EXIT_COMPLETE


def parse(argv: Sequence[str]) -> tuple[Options, list[str], list[str]]:
    """(our options, those of an experiment, the program with its arguments); UserError where there is no program."""
    ours = list(argv[: argv.index("--")]) if "--" in argv else list(argv)
    program = list(argv[len(ours) + 1 :])
    if not program:
        raise UserError("hvd rollouts --config NAME -- PROGRAM: give the program that plays the episodes, behind --")
    return (*overrides.take(Options(), ours), program)


def play(program: Sequence[str], url: str, asked: EvaluateConfig, stages: int, seconds: float) -> list[Episode]:
    """The episodes of `asked.num_rollouts` seeds from `asked.seed` on, in their order, as the program plays them.

    Raises:
        UserError: no such program, or it says of an episode what cannot be.
        Failed: it ends with another exit code than 0, or before all episodes are played, or takes too long.
    """
    first_seed, count = asked.seed, asked.num_rollouts
    told = {"HVD_URL": url, "HVD_FIRST_SEED": str(first_seed), "HVD_EPISODES": str(count)}
    told["HVD_EXECUTE"] = str(asked.execute_steps)
    try:
        process = subprocess.Popen(
            program, env=os.environ | told, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
        )
    except OSError as error:
        raise UserError(f"{program[0]}: {error.strerror}") from None
    played: dict[int, Episode] = {}
    alarm = _after(seconds, process)
    with alarm, tqdm(total=count, desc="episodes", unit="episode", mininterval=0.5) as bar:
        try:
            assert process.stdout is not None
            while line := process.stdout.readline(_LINE):
                if not line.lstrip().startswith(b"{"):
                    bar.write(repr(line.decode(errors="replace").rstrip())[1:-1])
                    continue
                episode = _episode(line, program[0], first_seed, count, stages)
                if episode.seed in played:
                    raise UserError(f"{program[0]}: it played the episode of seed {episode.seed} twice")
                played[episode.seed] = episode
                bar.update()
            code = process.wait()
        finally:
            _end(process)
            process.stdout.close() if process.stdout else None
    if alarm.rang:
        raise Failed(f"{program[0]} was stopped after {seconds / 3600:g} hours (--hours) with {len(played)} episodes")
    if code:
        raise Failed(f"{program[0]} ended with exit code {code} after {len(played)} of {count} episodes")
    if len(played) < count:
        missing = next(seed for seed in range(first_seed, first_seed + count) if seed not in played)
        raise Failed(f"{program[0]} played {len(played)} of {count} episodes; that of seed {missing} is missing")
    return [played[seed] for seed in sorted(played)]


def _episode(line: bytes, name: str, first_seed: int, count: int, stages: int) -> Episode:
    found = documents.decode(line, Episode, f"{name}: its line {line[:200].decode(errors='replace')!r}")
    if not first_seed <= found.seed < first_seed + count:
        raise UserError(f"{name}: it played seed {found.seed}; asked for were {first_seed} to {first_seed + count - 1}")
    if found.stage < 0:
        found.stage = stages if found.success else 0
    if found.stage > stages or found.success != (found.stage == stages):
        said = f"stage {found.stage} of {stages} (--stages), success {found.success}"
        raise UserError(f"{name}: it says of seed {found.seed} what cannot be: {said}")
    return found


class _after(contextlib.AbstractContextManager["_after"]):
    """Ends a process after so many seconds; `rang` says that it did."""

    def __init__(self, seconds: float, process: subprocess.Popen):
        self.rang, self._process = False, process
        self._timer = threading.Timer(seconds, self._ring)
        self._timer.daemon = True
        self._timer.start()

    def _ring(self) -> None:
        self.rang = True
        _end(self._process)

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


@contextlib.contextmanager
def _served(command: Sequence[str]) -> Iterator[str]:
    """The url of a server that `command` starts; it is stopped afterwards. Its lines are passed on."""
    env = os.environ | {"HVD_LAUNCHER_PID": str(os.getpid())}  # it ends when this process is killed
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    )
    ready: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            text = line.decode(errors="replace").rstrip()
            print(text, flush=True)
            if found := re.search(r"^serving .* on (ws://\S+)$", text):
                ready.put(found.group(1))
        ready.put("")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        url = ready.get()
        if not url:
            raise Failed(f"hvd serve ended with exit code {process.wait()} before it was ready")
        yield url
    finally:
        _end(process)
        reader.join(10)
        process.stdout.close() if process.stdout else None


def _end(process: subprocess.Popen) -> None:
    """Stop a process and its children: asked first, killed after ten seconds."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
