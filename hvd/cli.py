"""hvd <step> --config NAME [--dotted.field value]...

Each step is the `main` of one module, imported only when it runs. Exit codes: 0 complete; 2 the user's mistake (one
line); 143 stopped by a signal after saving, run me again; 75 lost a companion process, 76 hung: worth a few more
attempts; 130 interrupted; 1 anything else: a run that cannot go on says why in a line, a bug gives a traceback.
"""

import contextlib
import ctypes
import errno
import faulthandler
import importlib
import inspect
import io
import os
import re
import signal
import sys
import tempfile
import traceback
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from hvd import overrides
from hvd.checks import check_config
from hvd.configs import Experiment
from hvd.errors import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_LOST,
    EXIT_STOPPED,
    EXIT_USER,
    Failed,
    Lost,
    Stopped,
    UserError,
    nearest,
)
from hvd.experiments import CONFIGS
from hvd.runtime import job, processes

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Step:
    """One step of the way: the module whose `main` does it, and a line of help."""

    module: str
    help: str
    own_flags: bool = False  # main(argv) parses its own command line


STEPS: Mapping[str, Step] = types.MappingProxyType(
    {
        "simulate": Step("hvd.sim.record", "record the simulated R1's optimal and mixed demonstrations"),
        "convert": Step("hvd.data.convert", "recordings (JoyLo HDF5) -> LeRobot v3.0 dataset", own_flags=True),
        "plan": Step("hvd.plan.command", "does a run fit its devices? without the devices", own_flags=True),
        "norm-stats": Step("hvd.data.normalize", "normalisation statistics of the optimal set"),
        "prepare": Step("hvd.prepare", "all that a stage needs before it trains: the steps above, where they apply"),
        "train-value": Step("hvd.method.value", "value stage: V and the levels' Q"),
        "advantages": Step("hvd.method.advantages", "V, Q, A and weights of every frame the policy will visit"),
        "train-policy": Step("hvd.method.policy", "policy stage: weighted flow matching, or imitation"),
        "evaluate": Step("hvd.evaluate.command", "rollouts in the simulator, or action errors on held-out episodes"),
        "report": Step("hvd.report.command", "report.html of the experiment"),
        "serve": Step("hvd.serve.command", "a trained policy behind openpi's websocket protocol", own_flags=True),
        "export": Step("hvd.export", "a complete run as a checkpoint of openpi", own_flags=True),
        "jobs": Step("hvd.jobs.command", "submitted jobs: list, logs, cancel, wait", own_flags=True),
        "gate": Step(
            "hvd.clusters.kubernetes.gate",
            "in a Kubernetes pod: release the policy Job after the value Job",
            own_flags=True,
        ),
        "verify": Step("hvd.train.complete", "is the run complete, undamaged and finite?"),
    }
)


def usage() -> str:
    width = max(len(name) for name in STEPS)
    lines = [
        "usage: hvd <step> --config NAME [--data PATH] [--resume | --overwrite] [--dotted.field value]...",
        "",
        *(f"  {name:<{width}}  {step.help}" for name, step in STEPS.items()),
        f"  {'configs':<{width}}  list the configs",
        "",
        "hvd <step> --help [--config NAME] shows every field with its value in that config.",
        "--resume (the default) goes on where a run stopped; --overwrite deletes that run directory and starts again.",
        "All steps in one go: python launch/submit.py --stage all --config NAME",
    ]
    return "\n".join(lines)


def command() -> NoReturn:
    """The command `hvd`: `main` as a process; a scheduler's job is told how it ended (hvd.runtime.job)."""
    if processes.several():
        faulthandler.enable()  # JAX aborts a process whose companions have gone: say where it was
    try:
        code, disk_full = _main(sys.argv[1:])
    except SystemExit as stop:
        job.tell_exit(stop.code if isinstance(stop.code, int) else EXIT_FAILED if stop.code else EXIT_COMPLETE)
        raise
    except BaseException:
        traceback.print_exc()
        code, disk_full = EXIT_FAILED, False
    job.tell_exit(code)
    # Whoever still holds a file complains at exit, Orbax's threads array by array: the one line would be lost in it.
    # And one of several processes that fails must not wait for the others to leave with it: they wait for this one.
    if disk_full or (processes.several() and code not in (EXIT_COMPLETE, EXIT_STOPPED)):
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one step and return its exit code; anything that is a bug propagates as a traceback."""
    return _main(list(sys.argv[1:] if argv is None else argv))[0]


def _main(argv: list[str]) -> tuple[int, bool]:
    """Exit code, and whether the disk is full."""
    _die_with_launcher()
    try:
        return _to_code(argv), False
    except Exception as error:
        line = no_space(error)
        if line is not None:
            return _fail(line), True
        lost = processes.lost_companion(error)
        if lost is None:
            raise
        print(f"lost: {lost}; run the same command again to go on", file=sys.stderr)
        return EXIT_LOST, False


def _to_code(argv: list[str]) -> int:
    try:
        with stopped_by_signals():
            return run(argv)
    except UserError as error:
        return _fail(str(error))
    except Failed as error:
        print(f"failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    except Lost as error:
        print(f"lost: {error}; run the same command again to go on", file=sys.stderr)
        return EXIT_LOST
    except Stopped as stop:
        print(f"stopped: {stop}; run the same command again to go on", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `hvd configs | head`: the reader has gone, and nothing can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def run(argv: list[str]) -> int:
    """What `main` does, without turning errors into exit codes."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return EXIT_COMPLETE if argv else EXIT_USER
    name, *rest = argv
    if name == "configs":
        print("\n".join(config_lines()))
        return EXIT_COMPLETE
    if name not in STEPS:
        raise UserError(f"unknown step {name!r}{nearest(name, [*STEPS, 'configs'])}")
    step = STEPS[name]
    if step.own_flags:
        return importlib.import_module(step.module).main(rest) or EXIT_COMPLETE
    if "-h" in rest or "--help" in rest:
        print(step_help(name, [arg for arg in rest if arg not in ("-h", "--help")]))
        return EXIT_COMPLETE
    rest, overwrite = take_overwrite(rest)
    cfg = overrides.experiment(rest)
    check_config(cfg)
    function = importlib.import_module(step.module).main
    options = {}
    if "overwrite" in inspect.signature(function).parameters:
        options["overwrite"] = overwrite
    elif overwrite:
        raise UserError(f"--overwrite: {name} keeps no run directory; it is for train-value and train-policy")
    return function(cfg, **options) or EXIT_COMPLETE


def take_overwrite(argv: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without --resume and --overwrite, and whether --overwrite was among them."""
    chosen = {arg for arg in argv if arg in ("--resume", "--overwrite")}
    if len(chosen) == 2:
        raise UserError("--resume and --overwrite contradict each other; give one")
    return [arg for arg in argv if arg not in chosen], "--overwrite" in chosen


def config_lines() -> list[str]:
    """One line a config: its name and the first line of its docstring."""
    width = max(len(name) for name in CONFIGS)
    return [f"{name:<{width}}  {(build.__doc__ or '').strip().splitlines()[0]}" for name, build in CONFIGS.items()]


def step_help(name: str, argv: Sequence[str]) -> str:
    """The step's help: usage and every field, with the values that the named config (demo by default) has."""
    import tyro

    config, _ = overrides.take_config(argv, "demo")
    default = overrides.get_config(config)
    build = CONFIGS[config]
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        tyro.cli(Experiment, default=default, args=["--help"])
    # without tyro's own usage line, and without colours: the page may go to a file
    fields = re.sub(r"\x1b\[[0-9;]*m", "", page.getvalue()).partition("One experiment:")[2].partition("\n")[2]
    doc = inspect.cleandoc(build.__doc__ or "")
    return f"usage: hvd {name} --config NAME [options]\n\n{STEPS[name].help}\n\nconfig {config}: {doc}\n{fields}"


@contextlib.contextmanager
def stopped_by_signals():
    """SIGTERM, SIGUSR1 and SIGUSR2 end a step that has no handler of its own with Stopped instead of a sudden death."""

    def stop(number, frame):
        raise Stopped(f"by {signal.Signals(number).name}")

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def no_space(error: BaseException | None) -> str | None:
    """One line about a full disk or quota when that is what the error, or one that caused it, is about; else None."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = str(error)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # Libraries in C++ (tensorstore under Orbax, HDF5) carry only strerror's text.
        if full or re.search(r"no space left on device|disk quota exceeded", text, re.IGNORECASE):
            named = getattr(error, "filename", None) or _path_in(text)
            where = str(named) if named else f"one of {os.getcwd()}, its runs folder or {tempfile.gettempdir()}"
            return f"no space left on the disk of {where}; free some or set --runs_dir; the same command then goes on"
        error = error.__cause__ or error.__context__
    return None


def _path_in(text: str) -> str | None:
    found = re.search(r"(?:file://|['\"\s:])(/[^'\"\s:\]]+)", text)
    return found.group(1) if found else None


def _fail(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return EXIT_USER


def _die_with_launcher() -> None:
    """A step that launch/ started is stopped (and saves) when its launcher dies, so that no two runs share a folder."""
    launcher = os.environ.get("HVD_LAUNCHER_PID")
    if launcher and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGTERM))
        if os.getppid() != int(launcher):
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    command()
